"""Files of training state: each written whole or not at all, and known by its checksum."""

import filecmp
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.errors import UserError
from mtl.files import fill, temporary
from mtl.safety import archive
from mtl.safety.archive import FORMAT, MANIFEST
from mtl.safety.bounded import leaves
from mtl.safety.plain_types import plain_types

SPARE = 50  # checksums that are kept beside those of the files: a process that was killed noted one without a file
_checked_indices: Any = torch.sparse.check_sparse_tensor_invariants


def save(path: Path, state: dict[str, Any], *, keep: int | None = 1, number: int = 0) -> None:
    """Writes the state beside the path, and puts it in place when it is on the disk.

    Args:
        path: of the file; its folder is made where it isn't there, and not the folder that this is in.
        state: plain types and tensors.
        keep: the files that there are under this name afterwards: path.pt, path-1.pt, and so on. None for all.
        number: of the one among them that this state becomes; those from this number on are moved up by one.
    """
    path.parent.mkdir(exist_ok=True)
    with temporary(path.with_suffix(".tmp")) as new:
        fill(new, lambda file: torch.save({"format": FORMAT, archive.SAVED_AS: archive.name_of(path), **state}, file))
        # The checksum is known before the file is there: whenever the process is killed, each file in place has one.
        _note(path, _checksum(new))
        if keep is None or number + 1 < keep:
            _make_room(path, number)
        new.replace(with_number(path, number))
    for other, its_number in numbered(path):
        if keep is not None and its_number >= keep:
            other.unlink()
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
        with _checked_indices():  # or some versions of PyTorch believe what a sparse tensor says
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        size = os.fstat(file.fileno()).st_size
        room = archive.room(size)
        for value in leaves(state, f"the checkpoint {path}", most=size):  # each takes a byte at least
            if isinstance(value, Tensor):
                room -= Tensor.numel(value) * value.dtype.itemsize if value.layout is torch.strided else 0
                if value.is_meta or room < 0:
                    raise UserError(f"the checkpoint {path} has tensors with far more elements than the file has bytes")
        state = plain_types(state, f"the checkpoint {path}")
    state.pop(archive.SAVED_AS, None)
    return state


def newest(folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """The state of the newest last.pt that can be read; `report` is given a line for each that can't.

    Raises:
        UserError: where there is none.
    """
    problems = []
    for path in dict.fromkeys([folder / "last.pt", *(path for path, _ in numbered(folder / "last.pt"))]):
        try:
            return load(path)
        except UserError as error:
            problems.append(str(error))
            report(f"warning  {error}")
    raise UserError(f"there is no checkpoint to go on from in {folder}: {'; '.join(problems)}")


def numbered(path: Path) -> list[tuple[Path, int]]:
    """The files that there are of this name, path.pt with the number 0, path-1.pt, and so on."""
    found = [(path, 0)] if path.exists() else []
    for other in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        number = other.stem.removeprefix(f"{path.stem}-")
        if number.isdecimal():
            found.append((other, int(number)))
    return sorted(found, key=lambda pair: pair[1])


def with_number(path: Path, number: int) -> Path:
    """The path of the file with this number among those of this name."""
    return path.with_stem(f"{path.stem}-{number}") if number else path


def _make_room(path: Path, number: int) -> None:
    """Copies the file of this number, and those that follow it without a gap, up by one, the last one first.

    A process that is killed in between leaves one that is there twice, and next time the others stay where they are.
    """
    free = number
    while with_number(path, free).exists() and not (free > number and _same(path, free)):
        free += 1
    for each in range(free, number, -1):
        _replace_by_copy(with_number(path, each - 1), with_number(path, each))


def _same(path: Path, number: int) -> bool:
    """Whether the file of this number is a copy of the one before it."""
    one, other = with_number(path, number - 1), with_number(path, number)
    first, second = one.stat(), other.stat()
    if os.path.samestat(first, second):
        return True
    alike = (first.st_size, first.st_mtime_ns) == (second.st_size, second.st_mtime_ns)
    return alike and filecmp.cmp(one, other, shallow=False)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return archive.checksum(file)


def _note(path: Path, checksum: str) -> None:
    """Adds the checksum of what is about to be there as path.pt, or with a number."""
    known = archive.manifest(path.parent)
    noted = [*known.get(path.name, []), checksum]
    files = numbered(path)
    if len(noted) > len(files) + 2 * SPARE:  # seldom, since whole files are read for it
        there = {_checksum(each) for each, _ in files}
        noted = [each for each in noted[:-SPARE] if each in there] + noted[-SPARE:]
    known[path.name] = noted
    text = json.dumps({"format": FORMAT, "sha256": known}, indent=2) + "\n"
    with temporary(path.with_name(f"{MANIFEST}.tmp")) as new:
        fill(new, lambda file: file.write(text.encode()))
        new.replace(path.with_name(MANIFEST))


def _replace_by_copy(source: Path, target: Path) -> None:
    """Makes the target the same file as the source, which stays in place."""
    with temporary(target.with_suffix(".link.tmp")) as link:
        try:
            os.link(source, link)
        except OSError:  # a file system without links
            with source.open("rb") as file:
                fill(link, lambda copy: shutil.copyfileobj(file, copy))
            shutil.copystat(source, link)
        link.replace(target)
