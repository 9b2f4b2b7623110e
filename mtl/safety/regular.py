"""Opens only regular files in a run's folder, whose origin may be unknown.

Reading and writing never follow a symbolic link, and never wait for a device, a pipe or a socket.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from mtl.errors import UserError
from mtl.text import plain

_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_KINDS: list[tuple[Callable[[int], bool], str]] = [
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
]


def regular(path: str, flags: int) -> int:
    """Opens a file in a run's folder; use it as the `opener` of Python's `open`.

    Raises:
        UserError: If the path isn't a regular file, or if a file opened for writing has another hard link.
        OSError: If the file can't be opened.
    """
    changing = bool(flags & (os.O_WRONLY | os.O_RDWR))
    if os.path.lexists(path):  # checked first, because opening a device can hang, or move a tape
        _check(path, os.lstat(path), changing=changing)
    handle = os.open(path, flags | _SAFE, 0o666)
    try:
        _check(path, os.fstat(handle), changing=changing)
    except BaseException:
        os.close(handle)
        raise
    return handle


def make_folder(path: Path) -> None:
    """Creates the folder and its parents, unless they exist.

    Raises:
        UserError: If the folder is a symbolic link; its parents may be links.
        OSError: If the folder can't be created.
    """
    check_kind(path)
    path.mkdir(parents=True, exist_ok=True)


def check_kind(path: Path) -> None:
    """Raises a UserError if the path exists and is neither a regular file nor a folder."""
    if os.path.lexists(path):
        _check(path, os.lstat(path))


def check_folder(folder: Path) -> None:
    """Checks the folder of a run or a multirun before any file in it is opened for writing.

    Of the inner folders only that of the checkpoints is checked; the folder of Weights & Biases contains links, for
    instance.

    Raises:
        UserError: If an entry is neither a regular file nor a folder, or if a file other than a checkpoint has another
            hard link, because writing to it would change both.
        OSError: If the folder can't be read.
    """
    for inner in (folder, folder / "checkpoints"):
        if inner == folder or os.path.lexists(inner):
            with os.scandir(inner) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    _check(entry.path, entry.stat(follow_symlinks=False), changing=inner == folder)


def _check(path: str | Path, status: os.stat_result, *, changing: bool = False) -> None:
    shown = plain(str(path))
    for is_of_kind, name in _KINDS:
        if is_of_kind(status.st_mode):
            raise UserError(f"{shown} is {name}; in a run's folder only regular files and folders are read and written")
    if changing and stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise UserError(f"{shown} has another hard link, and writing would change the file there too; copy the run")
