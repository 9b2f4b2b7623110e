"""Regular files and folders, and nothing else, of a run's folder, which may come from anybody.

Neither reading nor writing follows a symbolic link, or waits for a device, a pipe or a socket.
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
    """The `opener` of Python's `open` for files in a run's folder.

    Raises:
        UserError: for what isn't a regular file, and for a file to be changed that has another name too.
        OSError: where it can't be opened.
    """
    changing = bool(flags & (os.O_WRONLY | os.O_RDWR))
    if os.path.lexists(path):  # looked at before it is opened, since opening is enough to hang, or to move a tape
        _check(path, os.lstat(path), changing=changing)
    handle = os.open(path, flags | _SAFE, 0o666)
    try:
        _check(path, os.fstat(handle), changing=changing)
    except BaseException:
        os.close(handle)
        raise
    return handle


def make_folder(path: Path) -> None:
    """Makes the folder, and those above it, where they aren't there.

    Raises:
        UserError: where it is a link; those above it may be.
        OSError: where it can't be made.
    """
    check_kind(path)
    path.mkdir(parents=True, exist_ok=True)


def check_kind(path: Path) -> None:
    """Looks what has this name, if anything has.

    Raises:
        UserError: where that is neither a regular file nor a folder.
    """
    if os.path.lexists(path):
        _check(path, os.lstat(path))


def check_folder(folder: Path) -> None:
    """Looks over a run's folder, or a multirun's, before anything in it is opened to be written.

    Folders in it aren't looked into, but for that of the checkpoints: Weights & Biases' own holds links, for instance.

    Raises:
        UserError: for the first thing that is neither a regular file nor a folder, and for a file other than a
            checkpoint that has another name too, since what is written to it would change both.
        OSError: where the folder can't be read.
    """
    for inner in (folder, folder / "checkpoints"):
        if inner == folder or os.path.lexists(inner):
            with os.scandir(inner) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    _check(entry.path, entry.stat(follow_symlinks=False), changing=inner == folder)


def _check(path: str | Path, found: os.stat_result, *, changing: bool = False) -> None:
    shown = plain(str(path))
    for is_of_kind, name in _KINDS:
        if is_of_kind(found.st_mode):
            raise UserError(f"{shown} is {name}; in a run's folder only regular files and folders are read and written")
    if changing and stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        raise UserError(f"{shown} has another name elsewhere (a hard link) and would change there too; copy the run")
