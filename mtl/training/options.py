"""How a training saves its state, and where it reports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtl.loggers import Loggers


@dataclass(frozen=True)
class Checkpoints:
    """Where and when the state of a training is saved, and how much of it is kept.

    Attributes:
        folder: of last.pt and best.pt. Both are saved after each epoch; a thread writes them.
        every_steps, every_minutes: last.pt is saved at these intervals as well; None for not.
        keep: how many of the newest states are kept: last.pt, last-1.pt, and so on; None for all.
        best: how many of the best by the monitored value are kept: best.pt, best-1.pt, and so on.
        more: further plain data for each checkpoint.
    """

    folder: Path
    every_steps: int | None = None
    every_minutes: float | None = None
    keep: int | None = 2
    best: int = 1
    more: Mapping[str, Any] = field(default_factory=dict)

    def are_due(self, steps: int, seconds: float) -> bool:
        """Whether last.pt is to be saved within an epoch.

        Args:
            steps: optimizer steps since the training began.
            seconds: since the last state was saved.
        """
        by_steps = self.every_steps is not None and steps % self.every_steps == 0
        return by_steps or (self.every_minutes is not None and seconds / 60 >= self.every_minutes)


@dataclass(frozen=True)
class Logs:
    """Where a training reports what happens in it.

    Attributes:
        loggers: get all figures.
        every: the number of steps from one line of the log to the next. Gradients are measured in these steps, and in
            the first.
        report: is given a line for what went wrong without ending the training.
        nonfinite: the file that has a line of JSON for each step in which a loss or a gradient wasn't finite: the
            tasks, and the numbers of the batch's samples. None for no file.
    """

    loggers: Loggers = field(default_factory=Loggers)
    every: int = 100
    report: Callable[[str], None] = print
    nonfinite: Path | None = None
