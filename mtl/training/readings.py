"""Results of steps, which stay on the device until they are needed and are then read in a single transfer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mtl import tags
from mtl.step import StepResult
from mtl.training.faults import Faults, Place


class Readings:
    """Collects the losses, the weights and the gradient measurements of the steps.

    Args:
        parameters: The names of the parameters.
        faults: Records losses that aren't finite.

    Attributes:
        measured: The gradient measurements by tag, for each measured step.
        measured_in: The epochs of the measured steps.
        reach: By parameter name, the tasks that reached the parameter in a measured step.
        without_gradient: The names of the parameters that had no gradient in any step.
        weights: The weights of the last steps by tag, as far as they have been read.
    """

    def __init__(self, parameters: Iterable[str], faults: Faults) -> None:
        self.measured: list[dict[str, float]] = []
        self.measured_in: list[int] = []
        self.reach: dict[str, set[str]] = {name: set() for name in parameters}
        self.without_gradient = set(self.reach)
        self.weights: dict[str, float] = {}
        self._faults = faults
        self._waiting: list[tuple[Place, StepResult]] = []  # steps that haven't been read yet
        self._pending: list[dict[str, float]] = []  # losses that have been read, but not returned by `take`
        self._of_epoch: list[dict[str, float]] = []  # losses of the epoch's steps that `take` has returned, by task

    def add(self, place: Place, result: StepResult) -> None:
        """Adds the result of a step, to be read later."""
        if result.losses:
            self._waiting.append((place, result))

    def note_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Records which parameters have a gradient after the step, without a transfer from the device."""
        self.without_gradient -= {name for name in self.without_gradient if parameters[name].grad is not None}

    def begin_epoch(self) -> None:
        """Begins an epoch: discards the losses of the previous one."""
        self._of_epoch.clear()

    @property
    def epoch_losses(self) -> dict[str, float]:
        """The mean loss of each task over the steps of the epoch for which `take` was called."""
        return _means(self._of_epoch)

    def take(self, result: StepResult | None, epoch: int) -> dict[str, float]:
        """Returns the scalars since the last call: mean losses over the steps, current weights and measurements.

        Args:
            result: The result of the last step, if gradients were measured in it.
            epoch: The number of the current epoch.

        Returns:
            The scalars by tag.

        Raises:
            NotFinite: If a loss isn't finite.
        """
        if not self._waiting and not self._pending:
            return {}
        scalars = self.read({} if result is None else self._measured(result))
        scalars = {tag: v for tag, v in scalars.items() if not (tags.is_of(tags.WEIGHT, tag) and math.isnan(v))}
        if result is not None:
            self.measured.append(scalars.copy())
            self.measured_in.append(epoch)
        taken, self._pending = self._pending, []
        self._of_epoch += taken
        return scalars | {tags.loss(task, "train"): mean for task, mean in _means(taken).items()}

    def read(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Reads the losses of the waiting steps, the last weights and the given tensors in a single transfer.

        Returns:
            The weights and the values of the tensors, by tag.

        Raises:
            NotFinite: If a loss isn't finite.
        """
        tensors = tensors or {}
        for _, step in self._waiting:
            tensors = {**tensors, **{tags.weight(task): weight for task, weight in step.weights.items()}}
        losses = [loss for _, step in self._waiting for loss in step.losses.values()]
        on_device = [tensor.double() for tensor in (*losses, *tensors.values())]
        values = iter(torch.stack(on_device).tolist() if on_device else ())
        rows = [{task: next(values) for task in step.losses} for _, step in self._waiting]
        for (place, _), row in zip(self._waiting, rows, strict=True):
            nonfinite = {task: f"its loss is {loss}" for task, loss in row.items() if not math.isfinite(loss)}
            if nonfinite:
                raise self._faults.note(place, nonfinite, "ended the run", all_at_once=len(nonfinite) == len(row))
        self._pending += rows
        figures = dict(zip(tensors, values, strict=True))
        self.weights |= {tag: value for tag, value in figures.items() if tags.is_of(tags.WEIGHT, tag)}
        self._waiting.clear()
        return self.weights | figures

    def cosines(self, since: int = 0) -> dict[tuple[str, str], list[float]]:
        """Returns, by pair of tasks, the measured cosines in the epochs after `since`, without NaN."""
        cosines: dict[tuple[str, str], list[float]] = {}
        for figures, epoch in zip(self.measured, self.measured_in, strict=True):
            for tag, value in figures.items() if epoch > since else ():
                if tags.is_of(tags.COSINE, tag) and math.isfinite(value):
                    first, second = tags.tasks_of(tag)
                    cosines.setdefault((first, second), []).append(value)
        return cosines

    def _measured(self, result: StepResult) -> dict[str, Tensor]:
        assert result.grad_norms is not None
        assert result.cosines is not None
        assert result.total_norm is not None
        for name, tasks in (result.reach or {}).items():
            self.reach[name].update(tasks)
        tensors = {tags.grad_norm(task): norm for task, norm in result.grad_norms.items()}
        tensors[tags.TOTAL_GRAD_NORM] = result.total_norm
        return tensors | {tags.cosine(a, b): cosine for (a, b), cosine in result.cosines.items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns all values that have been read, as plain data."""
        return {
            "measured": self.measured,
            "measured_in": self.measured_in,
            "weights": self.weights,
            "reach": {name: sorted(tasks) for name, tasks in self.reach.items()},
            "without_gradient": sorted(self.without_gradient),
            "pending": self._pending,
            "of_epoch": self._of_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.measured, self.measured_in, self.weights = state["measured"], state["measured_in"], state["weights"]
        self.reach = {name: set(tasks) for name, tasks in state["reach"].items()}
        unreached = [name for name, tasks in self.reach.items() if not tasks]  # a checkpoint of an earlier version
        self.without_gradient = set(state.get("without_gradient", unreached))
        self._pending, self._of_epoch = state["pending"], state["of_epoch"]


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns, by task, the mean over the steps in which the task took part."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for task, loss in row.items():
            columns.setdefault(task, []).append(loss)
    return {task: fmean(column) for task, column in columns.items()}
