"""Writing on a disk that may be full, into a folder that may be gone."""

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
    """Why a file could not be written, without its name, which may be that of a temporary one."""
    if isinstance(error, OSError) and error.strerror:
        return f"[Errno {error.errno}] {error.strerror}"
    return first_line(error)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name for what is to take the place of another file. What still has that name afterwards is removed."""
    path.unlink(missing_ok=True)  # a process that was killed may have left one
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def fill(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Makes a new file, and returns when what `write` writes into it is on the disk.

    Raises:
        OSError: where the file can't be written, also where the library that writes makes another error of that.
    """
    with path.open("xb") as file:
        noted = _Noted(file)
        try:
            write(noted)  # type: ignore[arg-type]  # torch and text need no more of a file than its `write`
        except Exception as error:
            if noted.error is None or noted.error is error:
                raise
            raise noted.error from error
        file.flush()
        os.fsync(file.fileno())


class _Noted:
    """A file that remembers why it could not be written; torch's own writer says something else instead."""

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
    """Writes the file so that it is there whole or as it was before, also where several processes write it at once.

    Where the disk is full, a text that isn't longer than the file takes its place in the file itself.

    Args:
        path: of the file.
        text: that is to be its content.
        room: spaces at the end, for a longer text that may have to take its place.

    Raises:
        OSError: where the file can't be written.
        UserError: where the path is that of a link or a device.
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
    """A file that is only added to. What can't be written waits in memory for the next time.

    Args:
        path: of the file, which may be there; or `os.devnull`, for a log that is to be written nowhere.
    """

    def __init__(self, path: Path) -> None:
        opener = None if str(path) == os.devnull else regular
        self._file = open(path, "ab", buffering=0, opener=opener)  # noqa: SIM115  # until `close`
        self._waiting = bytearray()

    def write(self, data: bytes) -> None:
        """Adds the data.

        Raises:
            OSError: where they, or earlier ones, can't be written; they are kept.
        """
        self._waiting += data
        self.flush()

    def hold(self, data: bytes) -> None:
        """Keeps the data for the next `write` or `flush`."""
        self._waiting += data

    def flush(self) -> None:
        """Writes what waits.

        Raises:
            OSError: where it can't be written; it is kept.
        """
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def __len__(self) -> int:
        return os.fstat(self._file.fileno()).st_size + len(self._waiting)

    def shorten(self, length: int) -> None:
        """Takes away what is beyond this length."""
        self._file.truncate(min(length, os.fstat(self._file.fileno()).st_size))

    def close(self) -> None:
        """Writes what waits, and closes the file.

        Raises:
            OSError: where something is left that can't be written.
        """
        try:
            self.flush()
        finally:
            self._waiting.clear()
            self._file.close()


class LogFile(logging.FileHandler):
    """A run's log. Where a line can't be written, one sentence says so, and the line waits for the next one."""

    def __init__(self, filename: str) -> None:
        self._lines = Appended(Path(filename))  # first: where it can't be opened, logging must know of no handler
        super().__init__(filename, encoding="utf-8", delay=True)  # its own stream is never opened
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record's line."""
        try:
            text = self.format(record)
        except Exception:  # arguments that don't fit
            self.handleError(record)
        else:
            self.add(f"{text}\n")

    def add(self, text: str) -> None:
        """Writes the text as it is."""
        try:
            self._lines.write(text.encode(errors="backslashreplace"))
            self._failed = False
        except OSError as error:
            if not self._failed:
                with suppress(OSError):
                    sys.stderr.write(f"error    {self.baseFilename} can't be written: {why(error)}\n")
            self._failed = True

    def close(self) -> None:
        """Closes the file; what can't be written has been complained of."""
        with suppress(OSError, ValueError):
            self._lines.close()
        super().close()


class Screen:
    """Standard output, so that a full disk below it, or a pipe that is closed, ends no training.

    Args:
        stream: what was standard output before.

    Attributes:
        error: why something could not be written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes the text, as far as it can be."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self.error = error
            return len(text)

    def flush(self) -> None:
        """Writes what was held back, as far as it can be; the rest is held back further."""
        with suppress(OSError):
            self._stream.flush()

    def complete(self) -> bool:
        """Whether all could be written; says so where it couldn't."""
        try:
            self._stream.flush()
        except OSError as error:
            self.error = error
            with suppress(OSError, ValueError):  # or Python would try once more when it ends, and fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if self.error is not None:
            with suppress(OSError):
                sys.stderr.write(f"error: not all that was to be printed could be: {why(self.error)}\n")
        return self.error is None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_screen() -> Iterator[Screen]:
    """Within, standard output is a `Screen`."""
    screen = Screen(sys.stdout)
    with redirect_stdout(screen):
        yield screen


class Folder:
    """A folder that is known again, whatever is in its place by then.

    Args:
        path: of the folder, which must be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        # While it is open no other folder gets its number. Elsewhere than on a Unix a folder can't be opened.
        self._handle = os.open(self.path, os.O_RDONLY) if os.name == "posix" else None

    def check(self) -> None:
        """Raises a UserError where the folder was deleted, moved, or replaced by another."""
        try:
            now = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path} is gone: it {_LOST}") from None
        except OSError:  # a disk that can't be asked; whoever writes there is told why
            return
        if self._handle is not None and not os.path.samestat(os.fstat(self._handle), now):
            raise UserError(f"{self.path} isn't the run's folder any more: that one {_LOST}")

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)  # type: ignore[arg-type]


_LOST = "was deleted or moved while the run trained, so nothing more can be saved in it"
