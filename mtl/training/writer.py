"""Writes checkpoints in a thread while the training goes on: the newest states and the best ones."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mtl.distributed.collectives import rank, world_size
from mtl.errors import UserError
from mtl.files import Folder, why
from mtl.safety.shards import KEY
from mtl.training import checkpoint
from mtl.training.shards import References, Staged, Together, copied, new_folder, split

Value = float | None
Better = Callable[[Any, Any], bool]
UNCHANGED = "earlier ones are unchanged"


class Job(NamedTuple):
    """A state to be written.

    Attributes:
        name: The name of the file, `last` or `best`.
        state: The state, as plain types and tensors.
        better: Compares two values, for states that are ranked; else None.
        shards: The sharded tensors of the state, which all processes write together; None if there are none.
    """

    name: str
    state: dict[str, Any]
    better: Better | None = None
    shards: Staged | None = None


class Writer:
    """Writes states into a folder, in a separate thread and in the order in which they arrive.

    If a write fails, existing files are not changed, and later writes are tried. If states arrive faster than they can
    be written, a newer state replaces the last one in the queue, so that the training never waits for the disk.

    With several processes, the one of rank 0 writes, and the others do nothing. A write that fails ends the training
    unless a second attempt succeeds, see `try_again`. Sharded tensors are written by all processes together. The
    training then waits until earlier states are written, and there is no second attempt.

    Args:
        folder: The folder of the checkpoints, inside the folder of the run.
        keep: The number of newest states to keep: last.pt, last-1.pt, …; None for all.
        best: The number of best states to keep: best.pt, best-1.pt, …, the best one first.
        report: Called with a message when a write fails in one process, but not again for the same reason.
        timeout: The number of seconds that processes wait for one another while they write sharded tensors.

    Attributes:
        failed: By name, the newest state that couldn't be written or, if states are ranked, the best one.
        reason: The reason why the last write failed; empty if it succeeded.
        written: By name, the `global_step` of the last state that was written.
        ranked: The value and the epoch of best.pt, best-1.pt, ….
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int | None,
        best: int = 1,
        report: Callable[[str], None],
        timeout: float | None = None,
    ) -> None:
        self._writes = rank() == 0
        self._alone = world_size() == 1
        if self._writes:
            folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.keep = keep
        self.best = best
        self.report = report
        self.failed: dict[str, Job] = {}
        self.reason = ""
        self.written: dict[str, int] = {}
        self.ranked: list[tuple[Value, int]] = []
        self._home = Folder(folder.parent) if self._writes else None
        self._together: Together | None = None  # exists once there are sharded tensors
        self._shards: tuple[str, Any, Staged] | None = None  # those of the newest state, and its place in the training
        self._references = References()
        self._timeout = timeout
        self._lost = ""  # why sharded tensors couldn't be written
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None  # exists while there are states to write

    def save(self, name: str, state: dict[str, Any], better: Better | None = None) -> None:
        """Copies a state and queues it; the thread writes it while the training goes on.

        Args:
            name: The name of the file, `last` or `best`.
            state: Plain types and tensors; with `value` and `epoch` if states are ranked.
            better: Compares two values if states are ranked; else None.

        Raises:
            UserError: If the folder of the run is missing, see `check`.
        """
        self.check()
        plain, tensors = split(state)
        staged = self._stage(name, state, tensors) if tensors else None
        if self._writes or staged:
            self._begin(Job(name, copied(plain) if self._writes else {}, better, staged))

    def _stage(self, name: str, state: dict[str, Any], tensors: dict[str, Tensor]) -> Staged:
        """Copies sharded tensors, unless the last state is the best one as well, whose tensors have been copied.

        Raises:
            UserError: In all processes, if sharded tensors could not be written before.
        """
        place = [state.get(key) for key in ("global_step", "epoch", "position")]
        if self._shards is not None and (name, self._shards[:2]) == ("last", ("best", place)):
            return self._shards[2]
        self.complete()
        if self._together is None:
            self._together = Together(self._timeout)
        self._shards = name, place, Staged(copied(tensors))
        return self._shards[2]

    def complete(self) -> None:
        """Waits like `wait`.

        Raises:
            UserError: In all processes, if sharded tensors couldn't be written.
        """
        self.wait()
        if self._lost:
            raise UserError(self._lost)

    @property
    def has_failed(self) -> bool:
        """Whether a state can't be written, as far as this process knows."""
        return bool(self.failed or self._lost)

    def try_again(self) -> None:
        """Tries states again whose writing failed.

        Raises:
            UserError: If one can't be written, or if the folder of the run is missing: in all processes if there are
                sharded tensors, otherwise in the one of rank 0, whose end the others notice.
        """
        self.check()
        self.complete()
        if self.failed:
            raise UserError(f"{self._why(min(self.failed), self.reason)}; {UNCHANGED}")

    def check(self) -> None:
        """Raises a UserError if the folder of the run, or a file that was saved in it, is missing."""
        if self._home is None:  # the process of rank 0 checks
            return
        self._home.check()
        for name in list(self.written):  # a copy, since the writing thread may add names at the same time
            if not (path := self.folder / f"{name}.pt").exists():
                raise UserError(f"{path} no longer exists: it was deleted or moved while the run trained")

    def is_there(self) -> bool:
        """Returns whether the folder of the run, and all files that were saved in it, exist."""
        try:
            self.check()
        except UserError:
            return False
        return True

    def wait(self) -> None:
        """Waits until the queue is written, and tries states again whose writing failed."""
        for again in (True, False):
            with self._changed:
                self._changed.wait_for(lambda: self._thread is None)
            if again:
                for _, job in sorted(self.failed.items()):  # best first
                    self._begin(job)

    def ranks(self, value: Value, better: Better) -> bool:
        """Returns whether a state with this value is among the best ones, if several of these are kept."""
        return self._writes and self.best > 1 and self._rank(value, better) < self.best

    def continue_after(self, epochs: int) -> None:
        """Continues after a number of epochs: reads the ranked states up to that epoch, and deletes later ones.

        Later epochs are trained again, and their states are saved again if they are among the best.
        """
        if self.best == 1 or not self._writes:
            return
        ranked: dict[int, Value] = {}
        path = self.folder / "best.pt"
        for file, _ in checkpoint.numbered(path):
            try:
                state = checkpoint.load(file, whole=False)
            except UserError as error:
                self.report(f"warning  {error}")
                continue
            epoch = state.get("epoch")
            if isinstance(epoch, int) and epoch <= epochs and epoch not in ranked and len(ranked) < self.best:
                file.replace(checkpoint.with_number(path, len(ranked)))
                ranked[epoch] = state.get("value", state.get("best"))  # `value` is missing if only one was kept
        for file, number in checkpoint.numbered(path):
            if 0 < len(ranked) <= number:
                file.unlink()
        self.ranked = [(value, epoch) for epoch, value in ranked.items()]

    def _rank(self, value: Value, better: Better) -> int:
        return sum(not better(value, other) for other, _ in self.ranked)

    def _begin(self, job: Job) -> None:
        with self._changed:
            if self._jobs and self._jobs[-1].name == job.name and job.better is None and not job.shards:
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
            if job.shards and self._lost:
                continue
            try:
                self._write(job)
            except Exception as error:
                if job.shards:
                    self._lost = self._lost or f"{self._why(job.name, why(error))}; {UNCHANGED}"
                else:
                    self._note(job, why(error))
                continue
            self.written[job.name] = job.state.get("global_step", 0)
            former = self.failed.pop(job.name, None)
            self.reason = self.reason if self.failed else ""
            if former is not None and former is not job and job.better is not None:
                with self._changed:
                    self._jobs.appendleft(former)  # it may be better than the one just written

    def _write(self, job: Job) -> None:
        if job.shards is None:
            self._home_checked()
            if (number := self._number(job)) is not None:
                self._put(job, number)
                self._references.prune(self.folder)
            return
        assert self._together is not None
        number, folder = self._together.in_first(lambda: self._prepare(job))
        if number is None:
            return
        try:
            index = job.shards.write(folder, self._together)
            self._together.in_first(lambda: self._put(job._replace(state=job.state | {KEY: index}), number))
        finally:
            if self._writes:
                self._references.prune(self.folder)

    def _prepare(self, job: Job) -> tuple[int | None, Path | None]:
        """Returns the number of the new file, see `_number`, and a new folder for its sharded tensors."""
        self._home_checked()
        number = self._number(job)
        is_new = number is not None and job.shards is not None and job.shards.index is None
        return number, new_folder(self.folder, job.state.get("global_step", 0)) if is_new else None

    def _home_checked(self) -> None:
        assert self._home is not None
        self._home.check()

    def _number(self, job: Job) -> int | None:
        """Returns the number of the new file among those of its name; None if the state isn't one of the best."""
        rank = 0 if job.better is None else self._rank(job.state["value"], job.better)
        return rank if job.better is None or rank < self.best else None

    def _put(self, job: Job, number: int) -> None:
        path = self.folder / f"{job.name}.pt"
        if job.better is None:
            checkpoint.save(path, job.state, keep=self.keep if job.name == "last" else 1)
            return
        # If no state is ranked yet, an existing file isn't renamed but replaced.
        checkpoint.save(path, job.state, keep=self.best if self.ranked else 1, number=number)
        ranked = [*self.ranked[:number], (job.state["value"], job.state["epoch"]), *self.ranked[number:]]
        self.ranked = ranked[: self.best]

    def _note(self, job: Job, reason: str) -> None:
        former = self.failed.get(job.name)
        if former is None or job.better is None or job.better(job.state.get("value"), former.state.get("value")):
            self.failed[job.name] = job
        if self._alone and reason != self.reason and self.is_there():  # else an error with the reason follows
            with suppress(Exception):  # printing may fail as well
                goes_on = f"Training goes on, and later checkpoints are tried; {UNCHANGED}"
                self.report(f"error    {self._why(job.name, reason)}. {goes_on}")
        self.reason = reason

    def _why(self, name: str, reason: str) -> str:
        return f"the checkpoint {self.folder / name}.pt could not be written: {reason}"
