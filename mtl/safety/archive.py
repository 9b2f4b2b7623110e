"""The file of a checkpoint, judged before PyTorch reads it: it may come from anybody."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_STORED, ZipFile

from mtl.errors import UserError, first_line
from mtl.safety.bounded import LARGEST, leaves, read_json
from mtl.safety.regular import regular
from mtl.safety.skimming import Skimmed

FORMAT = 7
MANIFEST = "manifest.json"
_END, _LOCATOR, _END_OF_64 = 22, 20, 56  # bytes of what ends an archive
PLAIN = 8 * LARGEST  # bytes of what isn't numbers of tensors; in memory it may take sixty times as many
ROOM, LEAST_ROOM = 16, 2**28  # bytes of all tensors, for each byte of the file and besides; they may share storages
SAVED_AS = "saved_as"  # the key of the state for the name under which it was saved


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The checkpoint's file, known to be whole, to have its own name, and to take no more memory than it has bytes.

    Raises:
        UserError: where there is no such file, or it isn't like that; also for whatever reading it raises.
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
    """Looks whether there is a state in the folder from which training can go on, where there is any.

    Raises:
        UserError: for the newest, where none can be read.
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
    """What tells the file's content from any other."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def manifest(folder: Path) -> dict[str, list[str]]:
    """The checksums of the newest files under each name; none where there is no manifest, or it can't be read."""
    try:
        return {name: list(values) for name, values in read_json(folder / MANIFEST)["sha256"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a file is then judged by itself


def name_of(path: Path) -> str:
    """The name under which a file was saved: `last` of last.pt and of last-1.pt, which has been last.pt before."""
    stem, _, number = path.stem.rpartition("-")
    return stem if stem and number.isdecimal() else path.stem


def room(size: int) -> int:
    """The bytes that the tensors may take of a file of that size."""
    return ROOM * size + LEAST_ROOM


def _check(file: BinaryIO, path: Path) -> None:
    size = os.fstat(file.fileno()).st_size
    if size > _memory():
        raise UserError(f"the checkpoint {path} is of {size:,} bytes, more than this machine's memory")
    known = manifest(path.parent)
    if known:
        found = checksum(file)
        names = [name_of(Path(name)) for name, checksums in known.items() if found in checksums]
        if not names:
            raise UserError(f"the checkpoint {path} is damaged: its checksum is not in {MANIFEST}")
        _check_name(path, *names)
    try:
        with ZipFile(file) as archive:
            members = _members(archive, size)
            _check_layout(archive, file, size)
            if not known and (name := archive.testzip()) is not None:  # the file's own checksums, of its members
                raise UserError(f"the checkpoint {path} is damaged: the checksum of {name} in it is wrong")
            root = archive.namelist()[0].split("/")[0]
            if members[f"{root}/data.pkl"] > PLAIN:
                raise ValueError(f"it holds more than {PLAIN:,} bytes beside the numbers of its tensors")
            skimmed = Skimmed(archive.read(f"{root}/data.pkl"), root, members)
            state = skimmed.load()
    except KeyError as error:  # a part of the archive, or an instruction of the pickle
        raise ValueError(f"there is no {error.args[0]} in it, or none is known") from error
    found_format = state.get("format") if isinstance(state, dict) else None
    if found_format != FORMAT:
        raise UserError(f"the checkpoint {path} has format {found_format}; this version of mtl reads format {FORMAT}")
    for _ in leaves(state, f"the checkpoint {path}", most=size):  # each takes a byte at least
        pass
    if skimmed.taken > room(size):
        raise UserError(f"the checkpoint {path} holds tensors of far more numbers than it has bytes")
    if isinstance(name := state.get(SAVED_AS), str):
        _check_name(path, name)


def _check_name(path: Path, *names: str) -> None:
    if name_of(path) not in names:
        raise UserError(
            f"the checkpoint {path} was saved as {names[0]}.pt: files were exchanged, or one was renamed or copied; "
            f"give it that name, in another folder if this one has a {names[0]}.pt"
        )


def _memory() -> float:
    """Of this machine, in bytes, where that is known."""
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def _members(archive: ZipFile, size: int) -> dict[str, int]:
    """The sizes of what is in the archive, which PyTorch never compresses."""
    sizes: dict[str, int] = {}
    for member in archive.infolist():
        if member.compress_type != ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename} in it is compressed, which mtl never does")
        if member.filename in sizes:
            raise ValueError(f"{member.filename} is in it twice")
        sizes[member.filename] = member.file_size
    if not sizes:
        raise ValueError("there is nothing in it")
    if archive.comment or sum(sizes.values()) > size:
        raise ValueError("its parts take more bytes than it has")
    return sizes


def _check_layout(archive: ZipFile, file: BinaryIO, size: int) -> None:
    """Raises a ValueError for an archive in which PyTorch's reader might see other parts than Python's.

    Python's takes what lies before an archive for no part of it, and looks for the list of parts right before the end;
    PyTorch's looks at the file's beginning for what kind of file it is, looks for the list where the end says that it
    is, and takes names for the same that differ in case.
    """
    names = [member.orig_filename for member in archive.infolist()]
    if not all(name.isascii() and name.isprintable() for name in names) or len({n.lower() for n in names}) < len(names):
        raise ValueError("names of its parts could be taken for each other")
    file.seek(0)
    begin = file.read(4)
    file.seek(max(0, size - _END - _LOCATOR - _END_OF_64))
    tail = file.read()
    end, locator, end_of_64 = tail[-_END:], tail[-_END - _LOCATOR : -_END], tail[: -_END - _LOCATOR]
    list_at, list_end = int.from_bytes(end[16:20], "little"), size - _END
    if locator[:4] == b"PK\6\7":
        list_end -= _LOCATOR + _END_OF_64
        list_at = int.from_bytes(end_of_64[48:56], "little")
        is_there = end_of_64[:4] == b"PK\6\6" and int.from_bytes(locator[8:16], "little") == list_end
    else:
        is_there = True
    first = min(member.header_offset for member in archive.infolist())
    is_whole = begin == b"PK\3\4" and end[:4] == b"PK\5\6" and is_there and first == 0
    if not is_whole or list_at != archive.start_dir:
        raise ValueError("there is more in it than an archive")
