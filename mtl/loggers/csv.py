"""All figures in one CSV file, a line each."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl.regular import regular


class CsvLogger:
    """Writes metrics.csv with the columns step, epoch, tag, value.

    Args:
        folder: the run's.
        tasks: the tasks' names.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]) -> None:
        path = folder / "metrics.csv"
        self._file = open(path, "a", newline="", encoding="utf-8", opener=regular)  # noqa: SIM115  # until `close`
        self._writer = csv.writer(self._file)
        if not self._file.tell():
            self._writer.writerow(["step", "epoch", "tag", "value"])

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Writes a line for each scalar, in as many digits as it has."""
        self._writer.writerows([step, epoch, tag, repr(value)] for tag, value in scalars.items())
        self._file.flush()

    def state(self) -> int:
        """The length of the file so far, in bytes."""
        self._file.flush()
        return self._file.tell()

    def resume(self, state: int) -> None:
        """Forgets what was written after that state."""
        self._file.truncate(min(state, self._file.tell()))
        self._file.seek(0, 2)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
