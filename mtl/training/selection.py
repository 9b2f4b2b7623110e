"""Selection of the best parameters of a training, and early stopping."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mtl import tags
from mtl.data import Loader, Mix
from mtl.errors import UserError
from mtl.step import Step

if TYPE_CHECKING:
    from mtl.training.monitor import Monitor
    from mtl.training.validation import Figures, Matrices, Validation


@dataclass(frozen=True)
class Criterion:
    """The criterion for the best parameters and for early stopping.

    Attributes:
        monitor: The monitored figures, see `mtl.training.monitor.Monitor`; None for the first figure of each task.
        patience: The number of successive validations without a better value after which the training stops; None for
            no early stopping.
        last_epochs: The number of last epochs over which the figures of the validation are averaged; None for no mean.
    """

    monitor: Mapping[str, Any] | None = None
    patience: int | None = None
    last_epochs: int | None = None


class Selection:
    """Validates after each epoch, and records which epoch's parameters are the best.

    Args:
        val: The validation data. Without them, the last parameters are the best.
        test: The test data, of which one batch is tried before the training.
        criterion: The criterion for the best parameters and for early stopping.

    Attributes:
        monitor: Computes the monitored value; None before `prepare`, and without validation data.
        best, best_epoch, figures: The best monitored value, and the epoch and the validation's figures of that value.
        value: The monitored value of the last validation.
        matrices: The matrices of the last validation, such as confusion matrices.
        best_matrices: Those of the best value.
        recent: The figures of the last `criterion.last_epochs` validations.

    Raises:
        UserError: If the criterion needs validation data and there are none.
    """

    def __init__(self, val: Loader | Mix | None, test: Loader | Mix | None, criterion: Criterion) -> None:
        if val is None and criterion != Criterion():
            raise UserError(
                "trainer.monitor, trainer.patience and trainer.last_epochs need validation data, and data.val is null"
            )
        self.val = val
        self.test = test
        self.criterion = criterion
        self.monitor: Monitor | None = None
        self.best: float | None = None
        self.best_epoch = 0
        self.figures: Figures = {}
        self.value: float | None = None
        self.recent: list[Figures] = []
        self.matrices: Matrices = {}
        self.best_matrices: Matrices = {}
        self._validation: Validation | None = None

    def prepare(self, step: Step) -> None:
        """Creates the metrics and the monitor.

        The metrics are created without validation data as well, to check that they suit their tasks.

        Raises:
            UserError: If a metric or the monitor can't be used.
        """
        from mtl.training.monitor import Monitor
        from mtl.training.validation import Validation

        if self._validation is not None:
            return
        named = [names for _, names in self.val.by_source()] if self.val is not None else [None]
        tasks = [task for task in step.tasks if any(names is None or task.name in names for names in named)]
        self._validation = Validation(step.model, tasks, step.passes.autocast)
        if self.val is not None:
            self.monitor = Monitor(self.criterion.monitor, self._validation.kinds())
            _check_plateau(step, self.monitor)

    def rehearse(self, step: Step, train: Loader | Mix) -> None:
        """Tries a batch of each split and, if batches of one occur, one sample, before the first step.

        Otherwise an error would appear only after an epoch, or at the end of the training.

        Raises:
            UserError: If a trial fails.
        """
        from mtl.training.rehearsal import check_shares, try_one_sample, try_split
        from mtl.training.validation import Validation

        assert self._validation is not None
        check_shares(step, train)
        try_one_sample(step, train)
        if self.val is not None:
            try_split(self._validation, self.val, "validation", self.monitor)
        if self.test is not None:
            same = len(self._validation.tasks) == len(step.tasks)
            of_all = self._validation if same else Validation(step.model, step.tasks, step.passes.autocast)
            try_split(of_all, self.test, "the test split")

    def validate(self, step: Step, epoch: int, report: Callable[[str], None]) -> dict[str, float]:
        """Validates after an epoch, and records the epoch if it is the best so far.

        Args:
            step: The step, whose scheduler gets the monitored value if it needs it.
            epoch: The number of the epoch.
            report: Called with each warning.

        Returns:
            The figures by tag; empty without validation data.
        """
        self.prepare(step)
        if self.val is None or self._validation is None or self.monitor is None:
            self.best_epoch = epoch
            return {}
        figures = self._validation(self.val)
        self.matrices = self._validation.matrices
        if epoch == 1 and (line := self._validation.caveat()):
            report(line)
        value = self.value = self.monitor(figures)
        step.validated(value)
        if self.monitor.better(value, self.best) or not self.best_epoch:
            self.best, self.best_epoch, self.figures = value, epoch, figures
            self.best_matrices = self.matrices
        if count := self.criterion.last_epochs:
            self.recent = [*self.recent, figures][-count:]
        nans = [f"{task}/{name}" for task, named in figures.items() for name, v in named.items() if math.isnan(v)]
        if nans:
            report(f"warning  on validation {', '.join(nans)} is nan: a prediction is nan, or there are no labels")
        return tags.by_tag(figures, "val") | {tags.MONITOR: value}

    def is_better(self, value: float, other: float) -> bool:
        """Returns whether one value is better than another; always true without validation data."""
        return self.monitor is None or self.monitor.better(value, other)

    def waits_after(self, epoch: int) -> bool:
        """Returns whether the training goes on after this epoch, as far as the patience is concerned."""
        patience = self.criterion.patience
        return patience is None or not epoch or epoch - self.best_epoch < patience

    def mean(self) -> "Figures":
        """Returns the mean of each figure over `recent`; empty without any. NaN if the figure is NaN in an epoch."""
        return {
            task: {name: fmean(each.get(task, {}).get(name, math.nan) for each in self.recent) for name in named}
            for task, named in (self.recent[-1] if self.recent else {}).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value, its epoch, figures and matrices, and the figures of the last epochs."""
        state = {"best": self.best, "best_epoch": self.best_epoch, "figures": self.figures}
        return {**state, "recent": self.recent, "matrices": self.best_matrices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`; other keys are ignored."""
        self.best, self.best_epoch, self.figures = state["best"], state["best_epoch"], state["figures"]
        self.recent, self.best_matrices = state.get("recent", []), state.get("matrices", {})


def _check_plateau(step: Step, monitor: "Monitor") -> None:
    """Raises a UserError if the mode of a ReduceLROnPlateau is not that of the monitor."""
    mode = getattr(step.descent.scheduler, "mode", None)
    if step.descent.waits_for_validation and mode != monitor.mode:
        raise UserError(
            f"scheduler.mode is '{mode}', but ReduceLROnPlateau follows the monitored value, {monitor}; "
            f"set scheduler.mode={monitor.mode}"
        )
