"""Checkpoints written beside the training: the newest, and those of the best values."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mtl.errors import UserError
from mtl.files import Folder, why
from mtl.training import checkpoint

Value = float | None
Better = Callable[[Any, Any], bool]


class Job(NamedTuple):
    """A state that is to be written.

    Attributes:
        name: of the file, `last` or `best`.
        state: plain types and tensors.
        better: whether one value is better than another, for those that are ranked.
    """

    name: str
    state: dict[str, Any]
    better: Better | None = None


class Writer:
    """Writes states into a folder in a thread of its own, in the order in which they come.

    A write that fails costs nothing but itself: the files that are there stay, and the next is tried. Where states come
    faster than they can be written, a newer one takes the place of the last one that waits, so that nobody waits for
    the disk.

    Args:
        folder: for the checkpoints, in that of the run.
        keep: how many of the newest `last.pt` there are to be: last.pt, last-1.pt, …; None for all.
        best: how many of the best: best.pt, best-1.pt, …, the best one first.
        report: is given a line when a write fails, and none for the next ones that fail for the same reason.

    Attributes:
        failed: by name, the newest state if it couldn't be written; of those that are ranked, the best one.
        reason: why the last write failed; empty if it didn't.
        written: by name, the `global_step` of the last that was written.
        ranked: of best.pt, best-1.pt, …, value and epoch.
    """

    def __init__(self, folder: Path, *, keep: int | None, best: int = 1, report: Callable[[str], None]) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.keep = keep
        self.best = best
        self.report = report
        self.failed: dict[str, Job] = {}
        self.reason = ""
        self.written: dict[str, int] = {}
        self.ranked: list[tuple[Value, int]] = []
        self._home = Folder(folder.parent)
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None  # there while there is something to write

    def save(self, name: str, state: dict[str, Any], better: Better | None = None) -> None:
        """Copies the state, plain types and tensors, and returns; it is written while training goes on.

        Args:
            name: of the file.
            state: with its `value` and `epoch`, if it is one of several that are ranked.
            better: whether one value is better than another.

        Raises:
            UserError: see `check`.
        """
        self.check()
        self._begin(Job(name, _copied(state), better))

    def check(self) -> None:
        """Raises a UserError where the run's folder, or what was saved in it, is gone."""
        self._home.check()
        for name in list(self.written):  # a copy, since the thread that writes may add to it meanwhile
            if not (path := self.folder / f"{name}.pt").exists():
                raise UserError(f"{path} is gone: it was deleted or moved while the run trained")

    def is_there(self) -> bool:
        """Whether the run's folder, and what was saved in it, is."""
        try:
            self.check()
        except UserError:
            return False
        return True

    def wait(self) -> None:
        """Returns when all is written that can be; what failed before is tried once more."""
        for again in (True, False):
            with self._changed:
                self._changed.wait_for(lambda: self._thread is None)
            if again:
                for _, job in sorted(self.failed.items()):  # best first
                    self._begin(job)

    def ranks(self, value: Value, better: Better) -> bool:
        """Whether a state of this value is to be saved as one of several that are the best."""
        return self.best > 1 and self._rank(value, better) < self.best

    def resume(self, epochs: int) -> None:
        """Goes on after so many epochs: takes up what of them is ranked, and gives up what came later.

        Those come again, unless they come out otherwise.
        """
        if self.best == 1:
            return
        ranked: dict[int, Value] = {}
        path = self.folder / "best.pt"
        for file, _ in checkpoint.numbered(path):
            try:
                state = checkpoint.load(file)
            except UserError as error:
                self.report(f"warning  {error}")
                continue
            epoch = state.get("epoch")
            if isinstance(epoch, int) and epoch <= epochs and epoch not in ranked and len(ranked) < self.best:
                file.replace(checkpoint.with_number(path, len(ranked)))
                ranked[epoch] = state.get("value", state.get("best"))  # no `value` where one alone was kept
        for file, number in checkpoint.numbered(path):
            if 0 < len(ranked) <= number:
                file.unlink()
        self.ranked = [(value, epoch) for epoch, value in ranked.items()]

    def _rank(self, value: Value, better: Better) -> int:
        return sum(not better(value, other) for other, _ in self.ranked)

    def _begin(self, job: Job) -> None:
        with self._changed:
            if self._jobs and self._jobs[-1].name == job.name and job.better is None:
                self._jobs.pop()
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._thread = None
                    self._changed.notify_all()
                    return
                job = self._jobs.popleft()
            try:
                self._write(job)
            except Exception as error:
                self._note(job, why(error))
                continue
            self.written[job.name] = job.state.get("global_step", 0)
            self.reason = ""
            former = self.failed.pop(job.name, None)
            if former is not None and former is not job and job.better is not None:
                with self._changed:
                    self._jobs.appendleft(former)  # it may be the better one

    def _write(self, job: Job) -> None:
        path = self.folder / f"{job.name}.pt"
        self._home.check()
        if job.better is None:
            checkpoint.save(path, job.state, keep=self.keep if job.name == "last" else 1)
            return
        rank = self._rank(value := job.state["value"], job.better)
        if rank < self.best:
            # Without any that is ranked, the file that may be there is none that was given up.
            checkpoint.save(path, job.state, keep=self.best if self.ranked else 1, number=rank)
            self.ranked = [*self.ranked[:rank], (value, job.state["epoch"]), *self.ranked[rank:]][: self.best]

    def _note(self, job: Job, reason: str) -> None:
        former = self.failed.get(job.name)
        if former is None or job.better is None or job.better(job.state.get("value"), former.state.get("value")):
            self.failed[job.name] = job
        if reason != self.reason and self.is_there():  # else training ends at the next save, and says why
            with suppress(Exception):  # the screen may be gone as well
                self.report(
                    f"error    the checkpoint {self.folder / job.name}.pt could not be written: {reason}. Training "
                    "goes on, and later ones are tried; what was saved before is still there"
                )
        self.reason = reason


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value
