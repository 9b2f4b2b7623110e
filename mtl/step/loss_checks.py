"""Tests losses that are taken in micro-batches, whenever one may show that it isn't a mean over what is counted."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mtl.batch import Batch, joined, num_samples
from mtl.errors import UserError
from mtl.labels import denominator, label_fields
from mtl.model import MultiTaskModel
from mtl.snapshots import preserved_buffers, preserved_random_state
from mtl.step.forward import loss_of, without_gradients
from mtl.step.mean_comparison import compare
from mtl.step.mean_tests import (
    TOLERANCE,
    as_dtype,
    check_loss,
    check_objective,
    in_float64,
    is_known,
    ways_out,
)
from mtl.step.micro_batches import MicroBatches
from mtl.step.precision import Autocast
from mtl.step.uneven import uneven_values
from mtl.task import Task


class LossChecks:
    """Tests each loss before the first step in which it is taken in micro-batches.

    A loss of torch's own kinds is tested once, since it is known what it counts. Any other may leave out samples or
    elements by a rule of its own, such as padding, of which the first batch may have none. So it is tested again when
    an integer, NaN, zero or padding is spread unevenly over the samples as it was not in earlier tests. The rule may
    also look at predictions: losses are tested in each step besides, see `Watch`, and so is, by one cut, an objective
    without a `count`, which takes two more forward passes of up to 64 samples.

    Args:
        model: gives the predictions.
    """

    def __init__(self, model: MultiTaskModel) -> None:
        self.model = model
        self._known: dict[tuple[type, bool], bool] = {}
        self._uneven: dict[str, set[str]] = {}  # by the names of tested tasks, what was uneven in the tests

    def __call__(self, micro_batches: MicroBatches, autocast: Autocast) -> None:
        """Tests what is due. Random state and buffers are afterwards what they were before.

        Raises:
            UserError: for a loss or an objective that isn't a mean over what is counted, and for one of which that
                can't be proven.
        """
        due: dict[int, set[str]] = {}
        again = []
        for index, task in enumerate(micro_batches.tasks):
            if not task.whole_batch and any(0 < row[index] < 1 for row in micro_batches.shares):
                uneven = self._due(task, _batches(micro_batches, index))
                if uneven is not None:
                    due[index] = uneven
                elif task.objective is not None and task.count is None:
                    again.append(index)
        if not due and not again:
            return
        for index in again:  # what it counts may depend on predictions, as with a threshold
            with preserved_random_state(self.model):
                check_objective(self.model, micro_batches.tasks[index], _batches(micro_batches, index), again=True)
        with preserved_random_state(self.model):
            tested = check_losses(self.model, micro_batches.of_tasks(list(due)), autocast) if due else []
        for index, uneven in due.items():
            if micro_batches.tasks[index].name in tested:
                self._uneven.setdefault(micro_batches.tasks[index].name, set()).update(uneven)

    def watches(self, micro_batches: MicroBatches) -> dict[str, "Watch"]:
        """By name, what tests the losses that aren't torch's during the passes over the micro-batches."""
        own = [t for t in micro_batches.tasks if not (self._is_known(t) or t.whole_batch or t.objective is not None)]
        return {task.name: Watch(self.model, task) for task in own}

    def depends_on_batch(self, task: Task, prediction: Any, batch: Batch) -> bool:
        """Whether samples' mean loss depends on which of them are in one batch; the model has to be in eval mode.

        It does so by declaration where the task has `whole_batch`; else the loss is tested when that is due.
        """
        if task.whole_batch:
            return True
        if is_known(task) and getattr(task.loss, "reduction", None) == "mean":
            return False
        uneven = self._due(task, [batch])
        if uneven is None:
            return False
        try:
            with preserved_random_state(self.model):
                if task.objective is not None:
                    tested = check_objective(self.model, task, [batch])
                else:
                    tested = check_loss(task, [prediction], [batch])
        except UserError:
            return True
        if tested:
            self._uneven.setdefault(task.name, set()).update(uneven)
        return False

    def _due(self, task: Task, batches: Sequence[Batch]) -> set[str] | None:
        """What is uneven in the batches, if a test is due for it; else None."""
        uneven = set() if self._is_known(task) else uneven_values(task, batches)
        return uneven if task.name not in self._uneven or uneven - self._uneven[task.name] else None

    def _is_known(self, task: Task) -> bool:
        key = type(task.loss), task.objective is None
        if key not in self._known:
            self._known[key] = is_known(task)
        return self._known[key]

    def state_dict(self) -> dict[str, list[str]]:
        """By task, what was uneven in its tests."""
        return {name: sorted(uneven) for name, uneven in self._uneven.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[str]] | Sequence[str]) -> None:
        """The counterpart of `state_dict`; older checkpoints have the names of the tested tasks alone."""
        named = state if isinstance(state, Mapping) else dict.fromkeys(state, ())
        self._uneven = {name: set(uneven) for name, uneven in named.items()}


def check_losses(model: MultiTaskModel, micro_batches: MicroBatches, autocast: Autocast) -> list[str]:
    """Tests the loss or the objective of each task on samples of the step.

    Returns:
        The tasks that were tested; others had no two labels, or no finite loss.

    Raises:
        UserError: see `LossChecks`.
    """
    tasks = micro_batches.tasks
    members = [[i for i in member if tasks[i].objective is None] for member in micro_batches.members]
    pairs = [([tasks[i] for i in m], batch) for m, batch in zip(members, micro_batches.batches, strict=True)]
    predictions: list[list[Any]] = []
    if any(members):
        predictions = without_gradients(model, pairs, autocast, take=lambda task, prediction, batch: prediction)
    tested = []
    for index, task in enumerate(tasks):
        batches = _batches(micro_batches, index)
        if task.objective is not None:
            found = check_objective(model, task, batches)
        else:
            own = [predictions[n][member.index(index)] for n, member in enumerate(members) if index in member]
            found = check_loss(task, own, batches)
        if found:
            tested.append(task.name)
    return tested


def _batches(micro_batches: MicroBatches, index: int) -> list[Batch]:
    return [b for b, member in zip(micro_batches.batches, micro_batches.members, strict=True) if index in member]


class Watch:
    """Tests a loss that isn't torch's in each step: what it counts may depend on predictions, as with a threshold.

    Of each two micro-batches that follow one another the loss is taken together, without gradients.

    Args:
        model: whose buffers and random state are kept; the loss may be one of its modules.
        task: whose loss it is.

    Attributes:
        task: what is to go through the passes.
    """

    def __init__(self, model: MultiTaskModel, task: Task) -> None:
        self.task = copy.copy(task)
        self.task.seen = self._see
        self._model = model
        self._own = task
        self._before: tuple[Any, Batch, int] | None = None
        self._found: list[tuple[Tensor, torch.dtype]] = []  # of each pair: what both count, and three losses

    def _see(self, prediction: Any, batch: Batch) -> None:
        prediction = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, prediction)
        batch = label_fields(self._own, batch)
        now = prediction, batch, num_samples(batch, [self._own.target])
        before, self._before = self._before, now
        if before is None:
            return
        try:
            both, targets = (joined([before[n], now[n]], [before[2], now[2]], name) for n, name in enumerate(_NAMES))
        except UserError:  # of different widths: a `count` or `mean_over` is believed
            return
        full = torch.autocast(next(self._model.parameters()).device.type, enabled=False)
        with preserved_random_state(self._model), preserved_buffers(self._model), torch.no_grad(), full:
            self._compare(before, now, both, targets)

    def _compare(self, before: tuple[Any, Batch, int], now: tuple[Any, Batch, int], both: Any, targets: Batch) -> None:
        precise, both, targets, dtype = in_float64(self._own, both, targets)
        numbers: list[Tensor | int] = []
        losses = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for prediction, batch, _ in (before, now):
                prediction, batch = as_dtype(prediction, dtype), as_dtype(batch, dtype)
                numbers.append(denominator(precise, batch))
                losses.append(loss_of(precise, prediction, batch).double())
            losses.append(loss_of(precise, both, targets).double())
        counts = [torch.as_tensor(number, device=losses[0].device).double() for number in numbers]
        self._found.append((torch.stack([*counts, *losses]), dtype))

    def check(self) -> None:
        """Judges all pairs of micro-batches.

        Raises:
            UserError: where two micro-batches' loss isn't the mean of their losses by what they count.
        """
        if not self._found:
            return
        rows = torch.stack([row for row, _ in self._found]).tolist()
        for (count_a, count_b, loss_a, loss_b, whole), (_, dtype) in zip(rows, self._found, strict=True):
            if not count_a or not count_b or not math.isfinite(whole):
                continue
            precision = 64 * torch.finfo(dtype).eps
            found = compare((count_a, count_b), (loss_a, loss_b), whole, TOLERANCE[dtype], precision)
            if found.differs:
                raise UserError(
                    f"task '{self._own.name}': its loss can't be taken in micro-batches: of two of these it is "
                    f"{whole:.6g}, and {found.mean:.6g} from each by what it counts, so that it isn't the mean that it "
                    "was in earlier tests: what it leaves out or how it weighs may depend on predictions or values, "
                    f"such as those above a threshold. {ways_out(self._own)}"
                )


_NAMES = ("prediction", "batch")
