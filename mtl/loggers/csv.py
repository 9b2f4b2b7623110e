"""All figures in one CSV file, a line each."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mtl.files import Appended
from mtl.loggers.logger import Logger


class CsvLogger(Logger):
    """Writes metrics.csv with the columns step, epoch, tag, value; what can't be written waits until it can.

    Args:
        folder: the run's.
        tasks: the tasks' names.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        self._path = folder / "metrics.csv"
        self._file = Appended(self._path)
        if not len(self._file):
            self._file.hold(_lines([["step", "epoch", "tag", "value"]]))

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Writes a line for each scalar, in as many digits as it has."""
        self._file.write(_lines([step, epoch, tag, repr(value)] for tag, value in scalars.items()))

    def flush(self) -> None:
        """Writes what could not be written before."""
        self._file.flush()

    def state_dict(self) -> int:
        """The length of the file so far, in bytes."""
        return len(self._file)

    def load_state_dict(self, state: int) -> None:
        """Forgets what was written after that state, and a line that the end of a process cut off."""
        self._file.shorten(min(state, self._path.read_bytes().rfind(b"\n") + 1))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
