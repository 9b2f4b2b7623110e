"""Options of a training: checkpoints and logs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtl.loggers import Loggers
from mtl.training.writer import Writer


@dataclass(frozen=True)
class Checkpoints:
    """Options of the checkpoints of a training.

    Attributes:
        folder: The folder of last.pt and best.pt, which a thread writes after each epoch.
        every_steps, every_minutes: Additional intervals at which last.pt is saved; None for no such interval.
        keep: The number of newest states to keep: last.pt, last-1.pt, and so on; None for all.
        best: The number of best states to keep, by the monitored value: best.pt, best-1.pt, and so on.
        more: Additional plain data to save in each checkpoint.
        timeout: The number of seconds that processes wait for one another while they write sharded tensors.
    """

    folder: Path
    every_steps: int | None = None
    every_minutes: float | None = None
    keep: int | None = 2
    best: int = 1
    more: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None

    def writer(self, report: Callable[[str], None]) -> Writer:
        """Returns the object that writes the checkpoints, which calls `report` with a message for each problem."""
        return Writer(self.folder, keep=self.keep, best=self.best, report=report, timeout=self.timeout)

    def are_due(self, steps: int, seconds: float) -> bool:
        """Returns whether last.pt should be saved now, within an epoch.

        Args:
            steps: The number of optimizer steps since the training began.
            seconds: The time since the last state was saved.
        """
        by_steps = self.every_steps is not None and steps % self.every_steps == 0
        return by_steps or (self.every_minutes is not None and seconds / 60 >= self.every_minutes)


@dataclass(frozen=True)
class Logs:
    """Options of the logs of a training.

    Attributes:
        loggers: The loggers, which get all figures.
        every: The number of steps from one line of the log to the next. Gradients are measured in these steps, and in
            the first step.
        report: Called with a message for each problem that doesn't end the training.
        nonfinite: The file that gets a line of JSON for each step in which a loss or a gradient wasn't finite, with the
            tasks and the numbers of the samples in the batch. None for no file.
    """

    loggers: Loggers = field(default_factory=Loggers)
    every: int = 100
    report: Callable[[str], None] = print
    nonfinite: Path | None = None
