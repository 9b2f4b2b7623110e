"""Logs all metrics to a CSV file with one row per value."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mtl.files import Appended
from mtl.loggers.logger import Logger


class CsvLogger(Logger):
    """Writes metrics.csv with the columns step, epoch, tag, value; rows that can't be written are retried later.

    Args:
        folder: The folder of the run.
        tasks: The names of the tasks.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        self._path = folder / "metrics.csv"
        self._file = Appended(self._path)
        if not len(self._file):
            self._file.hold(_lines([["step", "epoch", "tag", "value"]]))

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Writes one row per scalar, with all digits of the value."""
        self._file.write(_lines([step, epoch, tag, repr(value)] for tag, value in scalars.items()))

    def flush(self) -> None:
        """Writes the rows that couldn't be written before."""
        self._file.flush()

    def state_dict(self) -> int:
        """Returns the current length of the file in bytes."""
        return len(self._file)

    def load_state_dict(self, state: int) -> None:
        """Truncates the file to the length in the state, which also removes an incomplete last row."""
        self._file.shorten(min(state, self._path.read_bytes().rfind(b"\n") + 1))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
