"""Writes files on a disk that may be full, into a folder that may have been deleted."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from mtl.errors import UserError, first_line
from mtl.safety.regular import check_kind, regular


def why(error: BaseException) -> str:
    """Returns the reason why a file couldn't be written, without the file's name, which may be a temporary one."""
    if isinstance(error, OSError) and error.strerror:
        return f"[Errno {error.errno}] {error.strerror}"
    return first_line(error)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yields the path, at which a file can be written before it replaces another; a remaining file is removed."""
    path.unlink(missing_ok=True)  # a killed process may have left a file
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def fill(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Creates a file, calls `write` with it, and returns when the content is on the disk.

    Raises:
        OSError: If the file can't be written, even if `write` turns this error into another one.
    """
    with path.open("xb") as file:
        recorder = _Recorder(file)
        try:
            write(recorder)  # type: ignore[arg-type]  # torch and text only need `write` of a file
        except Exception as error:
            if recorder.error is None or recorder.error is error:
                raise
            raise recorder.error from error
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Returns when the names of the folder's files are on the disk."""
    if os.name == "posix":  # other systems can't open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Recorder:
    """A file that records the error if it can't be written; torch's own writer raises another error instead."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_whole(path: Path, text: str, *, room: int = 0) -> None:
    """Writes the file completely or not at all, even if several processes write it at the same time.

    If the disk is full, a text that isn't longer than the existing file overwrites it in place.

    Args:
        path: The path of the file.
        text: The new content.
        room: The number of spaces at the end, which reserve space for a longer text.

    Raises:
        OSError: If the file can't be written.
        UserError: If the path is a link or a device.
    """
    check_kind(path)
    data = text.encode() + b" " * room
    try:
        with temporary(path.with_name(f".{path.name}.{os.getpid()}.tmp")) as new:
            fill(new, lambda file: file.write(data))
            new.replace(path)
    except OSError:
        if not path.is_file() or path.is_symlink() or path.stat().st_size < len(data):
            raise
        with open(path, "r+b", buffering=0, opener=regular) as file:
            file.write(data.ljust(path.stat().st_size))
            os.fsync(file.fileno())


class Appended:
    """A file to which data is appended. Data that can't be written stays in memory until the next attempt.

    Args:
        path: The path of the file, which may exist; or `os.devnull` for a log that isn't written.
    """

    def __init__(self, path: Path) -> None:
        opener = None if str(path) == os.devnull else regular
        self._file = open(path, "ab", buffering=0, opener=opener)  # noqa: SIM115  # until `close`
        self._waiting = bytearray()

    def write(self, data: bytes) -> None:
        """Appends the data.

        Raises:
            OSError: If this or earlier data can't be written; it stays in memory.
        """
        self._waiting += data
        self.flush()

    def hold(self, data: bytes) -> None:
        """Keeps the data in memory until the next `write` or `flush`."""
        self._waiting += data

    def flush(self) -> None:
        """Writes the waiting data.

        Raises:
            OSError: If the data can't be written; it stays in memory.
        """
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def __len__(self) -> int:
        return os.fstat(self._file.fileno()).st_size + len(self._waiting)

    def shorten(self, length: int) -> None:
        """Truncates the file to at most this length in bytes."""
        self._file.truncate(min(length, os.fstat(self._file.fileno()).st_size))

    def close(self) -> None:
        """Writes the waiting data, and closes the file.

        Raises:
            OSError: If some data can't be written; it is lost.
        """
        try:
            self.flush()
        finally:
            self._waiting.clear()
            self._file.close()


class LogFile(logging.FileHandler):
    """A run's log. If lines can't be written, one message is printed, and the lines are written with a later line."""

    def __init__(self, filename: str) -> None:
        self._lines = Appended(Path(filename))  # first: logging must not know a handler without a file
        super().__init__(filename, encoding="utf-8", delay=True)  # the handler's own stream is never opened
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record's line."""
        try:
            text = self.format(record)
        except Exception:  # the arguments don't fit the message
            self.handleError(record)
        else:
            self.add(f"{text}\n")

    def add(self, text: str) -> None:
        """Writes the text without formatting."""
        try:
            self._lines.write(text.encode(errors="backslashreplace"))
            self._failed = False
        except OSError as error:
            if not self._failed:
                with suppress(OSError):
                    sys.stderr.write(f"error    {self.baseFilename} can't be written: {why(error)}\n")
            self._failed = True

    def close(self) -> None:
        """Closes the file; lines that can't be written have already been reported."""
        with suppress(OSError, ValueError):
            self._lines.close()
        super().close()


class Screen:
    """A standard output that records errors instead of raising them; a full disk or closed pipe ends no training.

    Args:
        stream: The original standard output.

    Attributes:
        error: The last error of writing, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes the text; an error is recorded."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self.error = error
            return len(text)

    def flush(self) -> None:
        """Flushes the stream; data that can't be written stays in its buffer."""
        with suppress(OSError):
            self._stream.flush()

    def complete(self) -> bool:
        """Returns whether all output was written; prints an error otherwise."""
        try:
            self._stream.flush()
        except OSError as error:
            self.error = error
            with suppress(OSError, ValueError):  # otherwise Python would flush again at exit, and fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if self.error is not None:
            with suppress(OSError):
                sys.stderr.write(f"error: some output could not be printed: {why(self.error)}\n")
        return self.error is None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_screen() -> Iterator[Screen]:
    """Replaces standard output by a `Screen` within the block."""
    screen = Screen(sys.stdout)
    with redirect_stdout(screen):
        yield screen


class Folder:
    """A folder, with a check whether another folder has taken its place.

    Args:
        path: The path of the folder, which must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        # No other folder gets the same inode number while the folder is open. Only on Unix can folders be opened.
        self._handle = os.open(self.path, os.O_RDONLY) if os.name == "posix" else None

    def check(self) -> None:
        """Raises a UserError if the folder was deleted, moved, or replaced by another one."""
        try:
            current = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path} no longer exists: it {_LOST}") from None
        except OSError:  # an inaccessible disk; the next write reports the error
            return
        if self._handle is not None and not os.path.samestat(os.fstat(self._handle), current):
            raise UserError(f"{self.path} is no longer the run's folder, which {_LOST}")

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)  # type: ignore[arg-type]


_LOST = "was deleted or moved while the run trained, so nothing more can be saved in it"
