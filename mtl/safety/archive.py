"""Checks the file of a checkpoint, whose origin is unknown, before PyTorch reads it."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile

from mtl.errors import UserError, first_line
from mtl.safety import shards
from mtl.safety.bounded import LARGEST, leaves, read_json
from mtl.safety.regular import regular
from mtl.safety.skimming import Skimmed

FORMAT = 7
MANIFEST = "manifest.json"
_END, _LOCATOR, _END_OF_64 = 22, 20, 56  # bytes of the records at the end of a zip archive
PLAIN = 8 * LARGEST  # the most bytes of the pickle, which may take sixty times as many in memory
ROOM, LEAST_ROOM = 16, 2**28  # limits of the tensors' bytes, see `room`; tensors may share storages
SAVED_AS = "saved_as"  # the key of the state that contains the name under which it was saved


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a checkpoint's file, after checks that it is complete, has the right name, and fits in memory.

    Raises:
        UserError: If there is no such file, if a check fails, or if the block raises an error.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            _check(file, path)
            file.seek(0)
            yield file
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"there is no checkpoint {path}") from None
    except UserError:
        raise
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"the checkpoint {path} can't be read: {first_line(error)}") from error


def check_newest(folder: Path) -> None:
    """Checks that at least one `last` checkpoint in the folder is readable, if there are any.

    Raises:
        UserError: If none is readable; the message is about the newest.
    """
    problems: list[UserError] = []
    for path in sorted(folder.glob("last*.pt"), key=lambda path: (len(path.name), path.name)):
        try:
            with opened(path):
                return
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def checksum(file: BinaryIO) -> str:
    """Returns the SHA-256 digest of the file's content."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def manifest(folder: Path) -> dict[str, list[str]]:
    """Returns the checksums of the newest files by name; none if the manifest is missing or can't be read."""
    try:
        return {name: list(values) for name, values in read_json(folder / MANIFEST)["sha256"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # the file's own checksums are then checked


def name_of(path: Path) -> str:
    """Returns the name under which a file was saved: `last` for last.pt, and for last-1.pt, an older last.pt."""
    stem, _, number = path.stem.rpartition("-")
    return stem if stem and number.isdecimal() else path.stem


def room(size: int) -> int:
    """Returns the most bytes that the tensors of a file of that size may take."""
    return ROOM * size + LEAST_ROOM


def check_memory(size: int, path: Path) -> None:
    """Raises a UserError if a checkpoint of so many bytes doesn't fit into this machine's memory."""
    if size > _memory():
        raise UserError(f"the checkpoint {path} has {size:,} bytes, which is more than this machine's memory")


def _memory() -> float:
    """Returns the memory of this machine in bytes, or infinity if it is unknown."""
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def _check(file: BinaryIO, path: Path) -> None:
    size = os.fstat(file.fileno()).st_size
    check_memory(size, path)
    known = manifest(path.parent)
    if known:
        digest = checksum(file)
        names = [name_of(Path(name)) for name, checksums in known.items() if digest in checksums]
        if not names:
            raise UserError(f"the checkpoint {path} is damaged: its checksum is not in {MANIFEST}")
        _check_name(path, *names)
    try:
        state, taken = skim(file, size, untested=bool(known))
    except Corrupt as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}") from None
    saved_format = state.get("format") if isinstance(state, dict) else None
    if saved_format != FORMAT:
        raise UserError(f"the checkpoint {path} has format {saved_format}; this version of mtl reads format {FORMAT}")
    for _ in leaves(state, f"the checkpoint {path}", most=size):  # each value takes at least one byte
        pass
    if taken > room(size):
        raise UserError(f"the checkpoint {path} has tensors with far more elements than the file has bytes")
    if isinstance(name := state.get(SAVED_AS), str):
        _check_name(path, name)
    if shards.KEY in state:
        shards.check(shards.parse(state[shards.KEY], path), f"the checkpoint {path}")


class Corrupt(ValueError):
    """Raised if a checksum in an archive is wrong."""


def skim(file: BinaryIO, size: int, *, untested: bool = False) -> tuple[Any, int]:
    """Checks an archive of PyTorch.

    Args:
        file: The archive.
        size: The number of its bytes.
        untested: Whether to skip the checksums of the archive's members.

    Returns:
        The content of its pickle, with substitutes for tensors, and the number of bytes that all tensors would take.

    Raises:
        Corrupt: If a checksum is wrong.
        ValueError: If the file isn't an archive, or contains something else than plain types and tensors.
    """
    try:
        with ZipFile(file) as archive:
            members = _members(archive, size)
            _check_layout(archive, file, size)
            if not untested and (name := archive.testzip()) is not None:  # checks the checksums of the members
                raise Corrupt(f"the checksum of its member {name} is wrong")
            root = archive.namelist()[0].split("/")[0]
            if members[f"{root}/data.pkl"] > PLAIN:
                raise ValueError(f"it holds more than {PLAIN:,} bytes besides the elements of its tensors")
            skimmed = Skimmed(archive.read(f"{root}/data.pkl"), root, members)
            return skimmed.load(), skimmed.taken
    except KeyError as error:  # for a member of the archive, or an instruction of the pickle
        raise ValueError(f"there is no member or pickle instruction {error.args[0]}") from error


def _check_name(path: Path, *names: str) -> None:
    if name_of(path) not in names:
        raise UserError(
            f"the checkpoint {path} was saved as {names[0]}.pt: files were exchanged, or one was renamed or copied; "
            f"give it that name, in another folder if this one has a {names[0]}.pt"
        )


def _members(archive: ZipFile, size: int) -> dict[str, int]:
    """Returns the sizes of the archive's members, which PyTorch never compresses."""
    sizes: dict[str, int] = {}
    for member in archive.infolist():
        if member.compress_type != ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename} is compressed, which mtl never does")
        if member.filename in sizes:
            raise ValueError(f"the archive contains {member.filename} twice")
        sizes[member.filename] = member.file_size
    if not sizes:
        raise ValueError("the archive is empty")
    if archive.comment or sum(sizes.values()) > size:
        raise ValueError("the members of the archive take more bytes than the file has")
    return sizes


def _check_layout(archive: ZipFile, file: BinaryIO, size: int) -> None:
    """Raises a ValueError if PyTorch's reader might see other members than Python's reader.

    Python ignores bytes before the archive, and expects the list of members right before the end record. PyTorch
    determines the kind of file from its first bytes, reads the list at the offset in the end record, and treats names
    as equal that differ only in case.
    """
    names = [member.orig_filename for member in archive.infolist()]
    if not all(name.isascii() and name.isprintable() for name in names) or len({n.lower() for n in names}) < len(names):
        raise ValueError("the names of the archive's members are ambiguous")
    file.seek(0)
    begin = file.read(4)
    file.seek(max(0, size - _END - _LOCATOR - _END_OF_64))
    tail = file.read()
    end, locator, end_of_64 = tail[-_END:], tail[-_END - _LOCATOR : -_END], tail[: -_END - _LOCATOR]
    list_at, list_end = int.from_bytes(end[16:20], "little"), size - _END
    if locator[:4] == b"PK\6\7":
        list_end -= _LOCATOR + _END_OF_64
        list_at = int.from_bytes(end_of_64[48:56], "little")
        is_consistent = end_of_64[:4] == b"PK\6\6" and int.from_bytes(locator[8:16], "little") == list_end
    else:
        is_consistent = True
    first = min(member.header_offset for member in archive.infolist())
    is_whole = begin == b"PK\3\4" and end[:4] == b"PK\5\6" and is_consistent and first == 0
    if not is_whole or list_at != archive.start_dir:
        raise ValueError("the file contains more than an archive")
