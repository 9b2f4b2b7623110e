"""Tests of losses that are computed in micro-batches: each has to be a mean over samples or elements.

A test is repeated whenever a batch may reveal that a loss is no such mean.
"""

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
    advice,
    as_dtype,
    check_loss,
    check_objective,
    in_float64,
    is_known,
)
from mtl.step.micro_batches import MicroBatches
from mtl.step.precision import Autocast
from mtl.step.uneven import uneven_values
from mtl.task import Task


class LossChecks:
    """Tests each loss before the first step that computes it in micro-batches.

    One of torch's losses is tested once, since the denominator of its mean is known. Any other loss may leave out
    samples or elements, for instance padding, of which the first batch may have none. Such a loss is tested again when
    an integer, NaN, zero or padding is spread unevenly over the samples of a batch and was not so in earlier tests. A
    loss may also leave out samples that depend on predictions. Losses other than torch's are therefore tested in each
    step, see `Watch`, and so are objectives without a `count`, which takes two additional forward passes of up to 64
    samples.

    Args:
        model: The model that makes the predictions.
    """

    def __init__(self, model: MultiTaskModel) -> None:
        self.model = model
        self._known: dict[tuple[type, bool], bool] = {}
        self._uneven: dict[str, set[str]] = {}  # the uneven values in earlier tests, by the name of the tested task

    def __call__(self, micro_batches: MicroBatches, autocast: Autocast) -> None:
        """Runs the tests that are due for a step. Random state and buffers are restored.

        Args:
            micro_batches: The micro-batches of the step.
            autocast: Makes the context manager that forward passes run in.

        Raises:
            UserError: If a loss or an objective isn't a mean over what it counts, or if that can't be established.
        """
        if micro_batches.is_aligned:  # the tests run passes of the model, on values that differ between the processes
            return
        due: dict[int, set[str]] = {}
        again = []
        for index, task in enumerate(micro_batches.tasks):
            if task.whole_batch or (self._is_known(task) and task.name in self._uneven):
                continue
            if any(0 < row[index] < 1 for row in micro_batches.shares):
                uneven = self._due(task, _batches(micro_batches, index))
                if uneven is not None:
                    due[index] = uneven
                elif task.objective is not None and task.count is None:
                    again.append(index)
        if not due and not again:
            return
        for index in again:  # the samples that an objective counts may depend on predictions, as with a threshold
            with preserved_random_state(self.model):
                check_objective(self.model, micro_batches.tasks[index], _batches(micro_batches, index), again=True)
        with preserved_random_state(self.model):
            tested = check_losses(self.model, micro_batches.of_tasks(list(due)), autocast) if due else []
        for index, uneven in due.items():
            if micro_batches.tasks[index].name in tested:
                self._uneven.setdefault(micro_batches.tasks[index].name, set()).update(uneven)

    def watches(self, micro_batches: MicroBatches) -> dict[str, "Watch"]:
        """Returns, by task name, the tests of losses other than torch's that run during the passes."""
        tasks = [t for t in micro_batches.tasks if not (self._is_known(t) or t.whole_batch or t.objective is not None)]
        return {task.name: Watch(self.model, task) for task in tasks}

    def depends_on_batch(self, task: Task, prediction: Any, batch: Batch) -> bool:
        """Returns whether the mean loss over all samples depends on how they are divided into batches.

        That is the case if the task has `whole_batch`, or if the loss fails the test. The model has to be in eval mode.
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
        """Returns the values that are spread unevenly in the batches if a test is due, else None."""
        uneven = set() if self._is_known(task) else uneven_values(task, batches)
        return uneven if task.name not in self._uneven or uneven - self._uneven[task.name] else None

    def _is_known(self, task: Task) -> bool:
        key = type(task.loss), task.objective is None
        if key not in self._known:
            self._known[key] = is_known(task)
        return self._known[key]

    def state_dict(self) -> dict[str, list[str]]:
        """Returns, by task name, the values that were spread unevenly in earlier tests."""
        return {name: sorted(uneven) for name, uneven in self._uneven.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[str]] | Sequence[str]) -> None:
        """Restores a state from `state_dict`; older checkpoints have only the names of the tested tasks."""
        named = state if isinstance(state, Mapping) else dict.fromkeys(state, ())
        self._uneven = {name: set(uneven) for name, uneven in named.items()}


def check_losses(model: MultiTaskModel, micro_batches: MicroBatches, autocast: Autocast) -> list[str]:
    """Tests the loss or the objective of each task on samples of the step.

    Returns:
        The names of the tasks that were tested. A task with fewer than two labels, or without a finite loss, can't be.

    Raises:
        UserError: If a loss fails the test, see `LossChecks`.
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
            is_tested = check_objective(model, task, batches)
        else:
            of_task = [predictions[n][member.index(index)] for n, member in enumerate(members) if index in member]
            is_tested = check_loss(task, of_task, batches)
        if is_tested:
            tested.append(task.name)
    return tested


def _batches(micro_batches: MicroBatches, index: int) -> list[Batch]:
    return [b for b, member in zip(micro_batches.batches, micro_batches.members, strict=True) if index in member]


class Watch:
    """Tests, in each step, a loss that isn't one of torch's.

    The samples that such a loss counts may depend on predictions, as with a threshold. The test computes the loss of
    each two successive micro-batches together, without gradients, and compares it with the mean of their losses.

    Args:
        model: The model, whose buffers and random state are restored after the test.
        task: The task whose loss is tested.

    Attributes:
        task: A copy of the task that has to be used in the passes, so that the test sees the predictions.
    """

    def __init__(self, model: MultiTaskModel, task: Task) -> None:
        self.task = copy.copy(task)
        self.task.seen = self._see
        self._model = model
        self._original = task
        self._before: tuple[Any, Batch, int] | None = None
        self._pairs: list[tuple[Tensor, torch.dtype]] = []  # for each pair: two denominators and three losses

    def _see(self, prediction: Any, batch: Batch) -> None:
        prediction = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, prediction)
        batch = label_fields(self._original, batch)
        now = prediction, batch, num_samples(batch, [self._original.target])
        before, self._before = self._before, now
        if before is None:
            return
        try:
            both, targets = (joined([before[n], now[n]], [before[2], now[2]], name) for n, name in enumerate(_NAMES))
        except UserError:  # they have different widths, and `count` or `mean_over` can't be tested
            return
        full = torch.autocast(next(self._model.parameters()).device.type, enabled=False)
        with preserved_random_state(self._model), preserved_buffers(self._model), torch.no_grad(), full:
            self._compare(before, now, both, targets)

    def _compare(self, before: tuple[Any, Batch, int], now: tuple[Any, Batch, int], both: Any, targets: Batch) -> None:
        precise, both, targets, dtype = in_float64(self._original, both, targets)
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
        self._pairs.append((torch.stack([*counts, *losses]), dtype))

    def check(self) -> None:
        """Checks all pairs of successive micro-batches in the step.

        Raises:
            UserError: If the loss of a pair isn't the mean of the two losses, weighted by what each counts.
        """
        if not self._pairs:
            return
        rows = torch.stack([row for row, _ in self._pairs]).tolist()
        for (count_a, count_b, loss_a, loss_b, whole), (_, dtype) in zip(rows, self._pairs, strict=True):
            if not count_a or not count_b or not math.isfinite(whole):
                continue
            precision = 64 * torch.finfo(dtype).eps
            comparison = compare((count_a, count_b), (loss_a, loss_b), whole, TOLERANCE[dtype], precision)
            if comparison.differs:
                raise UserError(
                    f"task '{self._original.name}': its loss can't be taken in micro-batches: on two micro-batches "
                    f"together it is {whole:.6g}, but their weighted mean is {comparison.mean:.6g}, so that it isn't "
                    "the mean that it was in earlier tests: what it leaves out or how it weighs may depend on "
                    f"predictions or values, such as those above a threshold. {advice(self._original)}"
                )


_NAMES = ("prediction", "batch")
