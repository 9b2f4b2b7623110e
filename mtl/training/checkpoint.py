"""Saving and loading of training state in files, each of which is written completely or not at all."""

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
from mtl.files import fill, sync, temporary
from mtl.safety import archive, shards
from mtl.safety.archive import FORMAT, MANIFEST
from mtl.safety.bounded import leaves
from mtl.safety.plain_types import plain_types
from mtl.training.shards import name_of, walk

SPARE = 50  # the number of further checksums to keep; a killed process may have noted one without a file
_checked_indices: Any = torch.sparse.check_sparse_tensor_invariants


def save(path: Path, state: dict[str, Any], *, keep: int | None = 1, number: int = 0) -> None:
    """Writes the state to a temporary file, and renames the file when it is on the disk.

    Args:
        path: The path of the file. The folder of the file is created if it doesn't exist; the folder's parent isn't.
        state: The state, as plain types and tensors.
        keep: The number of files with this name to keep: path.pt, path-1.pt, and so on; None for all.
        number: The number of the new file; the files from this number on are moved up by one.
    """
    path.parent.mkdir(exist_ok=True)
    with temporary(path.with_suffix(".tmp")) as new:
        fill(new, lambda file: torch.save({"format": FORMAT, archive.SAVED_AS: archive.name_of(path), **state}, file))
        # The checksum is noted before the file is renamed, so that each file has one whenever the process is killed.
        _note(path, _checksum(new))
        if keep is None or number + 1 < keep:
            _make_room(path, number)
        new.replace(with_number(path, number))
    for other, other_number in numbered(path):
        if keep is not None and other_number >= keep:
            other.unlink()
    sync(path.parent)


def load(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """Returns the state in a file, on the CPU.

    No code in the file is run, and the state takes about as much memory as the file has bytes.

    Args:
        path: The path of the file.
        whole: Whether to read sharded tensors, which are in further files. Otherwise the state has None for each of
            them, and contains the index of these files, with which `mtl.training.layouts.fitted` reads them.

    Raises:
        UserError: If there is no such file, or if it is damaged, has another format, or was saved under another name.
    """
    with archive.opened(path) as file:
        with _checked_indices():  # some versions of PyTorch don't check the indices of sparse tensors by default
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        size = os.fstat(file.fileno()).st_size
        room = archive.room(size)
        for value in leaves(state, f"the checkpoint {path}", most=size):  # each value takes at least one byte
            if isinstance(value, Tensor):
                room -= Tensor.numel(value) * value.dtype.itemsize if value.layout is torch.strided else 0
                if value.is_meta or room < 0:
                    raise UserError(f"the checkpoint {path} has tensors with far more elements than the file has bytes")
        state = plain_types(state, f"the checkpoint {path}")
        if shards.KEY in state:
            state[shards.KEY] = shards.parse(state[shards.KEY], path)
            state = _whole(state, path) if whole else state
    state.pop(archive.SAVED_AS, None)
    return state


def _whole(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the state with the sharded tensors of all processes in their places."""
    from mtl.training import shard_files  # takes a second to import

    index = state.pop(shards.KEY)
    archive.check_memory(sum(size for size, _ in index.files.values()), path)
    tensors = shard_files.whole(index)
    joined: dict[str, Any] = walk(state, lambda place, value: tensors.get(name_of(place), value))
    return joined


def newest(folder: Path, report: Callable[[str], None], *, whole: bool = True) -> dict[str, Any]:
    """Returns the state of the newest last.pt that can be read; calls `report` with a warning for each that can't.

    Args:
        folder: The folder of the checkpoints.
        report: Gets the warnings.
        whole: See `load`.

    Raises:
        UserError: If none can be read.
    """
    problems = []
    for path in dict.fromkeys([folder / "last.pt", *(path for path, _ in numbered(folder / "last.pt"))]):
        try:
            return load(path, whole=whole)
        except UserError as error:
            problems.append(str(error))
            report(f"warning  {error}")
    raise UserError(f"there is no checkpoint in {folder} to resume from: {'; '.join(problems)}")


def numbered(path: Path) -> list[tuple[Path, int]]:
    """Returns the existing files of this name with their numbers: path.pt with 0, path-1.pt with 1, and so on."""
    files = [(path, 0)] if path.exists() else []
    for other in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        number = other.stem.removeprefix(f"{path.stem}-")
        if number.isdecimal():
            files.append((other, int(number)))
    return sorted(files, key=lambda pair: pair[1])


def with_number(path: Path, number: int) -> Path:
    """Returns the path of the file of this name with this number."""
    return path.with_stem(f"{path.stem}-{number}") if number else path


def _make_room(path: Path, number: int) -> None:
    """Copies the file with this number, and those that follow without a gap, to the next number, the last one first.

    If the process is killed in between, one file exists twice. The next call then doesn't copy the files after it.
    """
    free = number
    while with_number(path, free).exists() and not (free > number and _same(path, free)):
        free += 1
    for each in range(free, number, -1):
        _replace_by_copy(with_number(path, each - 1), with_number(path, each))


def _same(path: Path, number: int) -> bool:
    """Returns whether the file with this number is a copy of the file before it."""
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
    """Adds the checksum of a new file of this name to the manifest, before the file is renamed."""
    manifest = archive.manifest(path.parent)
    checksums = [*manifest.get(path.name, []), checksum]
    files = numbered(path)
    if len(checksums) > len(files) + 2 * SPARE:  # seldom, because this reads whole files
        existing = {_checksum(each) for each, _ in files}
        checksums = [each for each in checksums[:-SPARE] if each in existing] + checksums[-SPARE:]
    manifest[path.name] = checksums
    text = json.dumps({"format": FORMAT, "sha256": manifest}, indent=2) + "\n"
    with temporary(path.with_name(f"{MANIFEST}.tmp")) as new:
        fill(new, lambda file: file.write(text.encode()))
        new.replace(path.with_name(MANIFEST))


def _replace_by_copy(source: Path, target: Path) -> None:
    """Replaces the target by a hard link to the source, or by a copy; the source stays in place."""
    with temporary(target.with_suffix(".link.tmp")) as link:
        try:
            os.link(source, link)
        except OSError:  # a file system without links
            with source.open("rb") as file:
                fill(link, lambda copy: shutil.copyfileobj(file, copy))
            shutil.copystat(source, link)
        link.replace(target)
