"""Files of training state: each written whole or not at all, beside the training, and known by its checksum."""

import json
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl import archive
from mtl.archive import FORMAT, MANIFEST
from mtl.bounded import leaves
from mtl.errors import UserError, first_line
from mtl.plain_types import plain_types

ROOM, LEAST_ROOM = 16, 2**28  # bytes of all tensors, for each byte of the file and besides; they may share storages
Job = tuple[str, dict[str, Any]]


class Writer:
    """Writes states into a folder in a thread of its own, in the order in which they come.

    A write that fails is told and costs nothing but itself: the files that are there stay, and the next is tried. Where
    states come faster than they can be written, a newer one takes the place of the last one that waits, so that nobody
    waits for the disk.

    Args:
        folder: for the checkpoints.
        keep: how many of the newest `last.pt` there are to be: last.pt, last-1.pt, …
        tell: is given a line for every failure.
    """

    def __init__(self, folder: Path, *, keep: int, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self.keep = keep
        self.tell = tell
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None  # there while there is something to write
        self.failed: dict[str, dict[str, Any]] = {}  # by name, the newest state if it couldn't be written
        self.written: dict[str, int] = {}  # by name, the `global_step` of the last that was

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Copies the state, plain types and tensors, and returns; it is written while training goes on."""
        self._begin((name, _copied(state)))

    def wait(self) -> None:
        """Returns when all is written that can be; what failed before is tried once more."""
        for again in (True, False):
            with self._changed:
                self._changed.wait_for(lambda: self._thread is None)
            if again:
                for name, state in sorted(self.failed.items()):  # best first
                    self._begin((name, state))

    def _begin(self, job: Job) -> None:
        with self._changed:
            if self._jobs and self._jobs[-1][0] == job[0]:
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
                name, state = self._jobs.popleft()
            try:
                save(self.folder / f"{name}.pt", state, keep=self.keep if name == "last" else 1)
                self.failed.pop(name, None)
                self.written[name] = state.get("global_step", 0)
            except Exception as error:  # torch's own writer raises a RuntimeError on a full disk
                self.failed[name] = state
                with suppress(Exception):  # the screen may be gone as well
                    self.tell(
                        f"error    the checkpoint {self.folder / name}.pt could not be written: {first_line(error)}. "
                        "Training goes on; what was saved before is still there"
                    )


def save(path: Path, state: dict[str, Any], *, keep: int = 1) -> None:
    """Writes the state beside the path, and puts it in place when it is on the disk.

    Args:
        path: of the file.
        state: plain types and tensors.
        keep: the files that there are under this name afterwards: the former path.pt is path-1.pt then, and so on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, archive.SAVED_AS: archive.name_of(path), **state}, file)
        file.flush()
        os.fsync(file.fileno())
    # The checksum is known before the file is there: whenever the process is killed, each file in place has one. More
    # are kept than there are files, since a process that was killed in between has noted one without a file.
    _note(path.parent, _checksum(temporary), path.name, keep=keep + 50)
    for number in range(keep - 1, 0, -1):
        older = path.with_stem(f"{path.stem}-{number}")
        newer = path.with_stem(f"{path.stem}-{number - 1}") if number > 1 else path
        if newer.exists():
            _replace_by_copy(newer, older)
    temporary.replace(path)
    for older, number in _numbered(path):
        if number >= keep:
            older.unlink()
    if os.name == "posix":  # elsewhere a folder can't be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """The state in the file, on the CPU. No code in it is run, and it takes about as much memory as the file has bytes.

    Raises:
        UserError: where there is no such file, or it is damaged, of another format, or saved under another name.
    """
    with archive.opened(path) as file:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        size = os.fstat(file.fileno()).st_size
        room = ROOM * size + LEAST_ROOM
        for value in leaves(state, f"the checkpoint {path}", most=size):  # each takes a byte at least
            if isinstance(value, Tensor):
                room -= value.numel() * value.element_size() if value.layout is torch.strided else 0
                if value.is_meta or room < 0:
                    raise UserError(f"the checkpoint {path} holds tensors of far more numbers than it has bytes")
        state = plain_types(state, f"the checkpoint {path}")
    state.pop(archive.SAVED_AS, None)
    return state


def newest(folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """The state of the newest last.pt that can be read; `tell` is given a line for each that can't.

    Raises:
        UserError: where there is none.
    """
    paths = [folder / "last.pt", *(path for path, _ in _numbered(folder / "last.pt"))]
    problems = []
    for path in paths:
        try:
            return load(path)
        except UserError as error:
            problems.append(str(error))
            tell(f"warning  {error}")
    raise UserError(f"there is no checkpoint to go on from in {folder}: {'; '.join(problems)}")


def _numbered(path: Path) -> list[tuple[Path, int]]:
    """The older files of this name with their numbers, newest first."""
    found = []
    for older in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        number = older.stem.removeprefix(f"{path.stem}-")
        if number.isdigit():
            found.append((older, int(number)))
    return sorted(found, key=lambda pair: pair[1])


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return archive.checksum(file)


def _note(folder: Path, checksum: str, name: str, *, keep: int) -> None:
    known = archive.manifest(folder)
    known[name] = [*known.get(name, []), checksum][-keep:]
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT, "sha256": known}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)


def _replace_by_copy(source: Path, target: Path) -> None:
    """Makes the target the same file as the source, which stays in place."""
    link = target.with_suffix(".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:  # a file system without links
        link.write_bytes(source.read_bytes())
    link.replace(target)
