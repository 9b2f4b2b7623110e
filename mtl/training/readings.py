"""What steps leave on the device, read in one go when it is wanted, and kept."""

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
    """Losses of all steps, weights, and what was measured of gradients.

    Args:
        parameters: their names.
        faults: is told of a loss that isn't finite.

    Attributes:
        measured: the gradients' figures by tag, for each step in which they were measured.
        measured_in: the epochs of these steps.
        reach: from each parameter's name to the tasks that reached it in a measured step.
        without_gradient: the names of the parameters that had no gradient in any step.
        weights: the last steps' weights by tag, as far as they have been read.
    """

    def __init__(self, parameters: Iterable[str], faults: Faults) -> None:
        self.measured: list[dict[str, float]] = []
        self.measured_in: list[int] = []
        self.reach: dict[str, set[str]] = {name: set() for name in parameters}
        self.without_gradient = set(self.reach)
        self.weights: dict[str, float] = {}
        self._faults = faults
        self._waiting: list[tuple[Place, StepResult]] = []  # steps that haven't been read yet
        self._pending: list[dict[str, float]] = []  # losses that have been read, and not yet taken
        self._of_epoch: list[dict[str, float]] = []  # losses of the epoch's steps that were taken, by task

    def add(self, place: Place, result: StepResult) -> None:
        """A step to be read."""
        if result.losses:
            self._waiting.append((place, result))

    def note_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Notes which of the parameters, by name, have a gradient after the step; it reads nothing from the device."""
        self.without_gradient -= {name for name in self.without_gradient if parameters[name].grad is not None}

    def begin_epoch(self) -> None:
        """The losses from here on are another epoch's."""
        self._of_epoch.clear()

    @property
    def epoch_losses(self) -> dict[str, float]:
        """By task, the mean loss over the epoch's steps that were taken."""
        return _means(self._of_epoch)

    def take(self, result: StepResult | None, epoch: int) -> dict[str, float]:
        """What has gathered since the last time, by tag: losses as means over the steps, the rest as it is now.

        Args:
            result: of the last step, if gradients were measured in it.
            epoch: the one under way.

        Raises:
            NotFinite: for a loss that isn't finite.
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
        """Reads the losses that wait, the last weights, and these tensors, from the device in one go.

        Raises:
            NotFinite: for a loss that isn't finite.
        """
        tensors = tensors or {}
        for _, step in self._waiting:
            tensors = {**tensors, **{tags.weight(task): weight for task, weight in step.weights.items()}}
        losses = [loss for _, step in self._waiting for loss in step.losses.values()]
        at_hand = [tensor.double() for tensor in (*losses, *tensors.values())]
        values = iter(torch.stack(at_hand).tolist() if at_hand else ())
        rows = [{task: next(values) for task in step.losses} for _, step in self._waiting]
        for (place, _), row in zip(self._waiting, rows, strict=True):
            found = {task: f"its loss is {loss}" for task, loss in row.items() if not math.isfinite(loss)}
            if found:
                raise self._faults.note(place, found, "ended the run", all_at_once=len(found) == len(row))
        self._pending += rows
        figures = dict(zip(tensors, values, strict=True))
        self.weights |= {tag: value for tag, value in figures.items() if tags.is_of(tags.WEIGHT, tag)}
        self._waiting.clear()
        return self.weights | figures

    def cosines(self, since: int = 0) -> dict[tuple[str, str], list[float]]:
        """By pair of tasks, their cosines where these were measured and defined, in the epochs after that one."""
        found: dict[tuple[str, str], list[float]] = {}
        for figures, epoch in zip(self.measured, self.measured_in, strict=True):
            for tag, value in figures.items() if epoch > since else ():
                if tags.is_of(tags.COSINE, tag) and math.isfinite(value):
                    first, second = tags.tasks_of(tag)
                    found.setdefault((first, second), []).append(value)
        return found

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
        """All that has been read, as plain data."""
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
        """The counterpart of `state`."""
        self.measured, self.measured_in, self.weights = state["measured"], state["measured_in"], state["weights"]
        self.reach = {name: set(tasks) for name, tasks in state["reach"].items()}
        unreached = [name for name, tasks in self.reach.items() if not tasks]  # a checkpoint of an earlier version
        self.without_gradient = set(state.get("without_gradient", unreached))
        self._pending, self._of_epoch = state["pending"], state["of_epoch"]


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By task, the mean over the steps that it took part in."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for task, loss in row.items():
            columns.setdefault(task, []).append(loss)
    return {task: fmean(column) for task, column in columns.items()}
