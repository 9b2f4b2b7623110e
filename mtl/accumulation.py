"""A step's batch in several micro-batches: how it is cut, and how much each part counts for each task.

A task's loss is a mean over what it counts, samples or elements or the weights of classes. With D counted on each
micro-batch, Σ L_mb · D_mb / Σ D_mb is the loss of the whole batch, whatever the sizes of the parts; a plain mean of
means isn't.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mtl.errors import UserError
from mtl.model import Batch, MultiTaskModel, size_of
from mtl.passes import Autocast, look, loss_of
from mtl.task import Task

BY_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss)
BY_ELEMENT = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss),
    *(nn.PoissonNLLLoss, nn.GaussianNLLLoss, nn.KLDivLoss),
)


def cut(batch: Batch, *, size: int | None = None, count: int | None = None) -> list[Batch]:
    """The batch in micro-batches of `size` samples, the last one maybe smaller, or in `count` of nearly equal sizes.

    Tensors and lists whose length is the number of samples are cut; anything else goes into each part as it is.
    """
    total = max((size_of(value) for value in batch.values()), default=1)
    if size is None:
        assert count is not None
        bounds = [total * part // min(count, total) for part in range(min(count, total) + 1)]
    else:
        bounds = [*range(0, total, size), total]
    return [_part(batch, total, start, end) for start, end in pairwise(bounds)]


def _part(value: Any, total: int, start: int, end: int) -> Any:
    def sliced(leaf: Any) -> Any:
        return leaf[start:end] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == total else leaf

    if isinstance(value, list) and len(value) == total:
        return value[start:end]
    if isinstance(value, dict):
        return {key: _part(each, total, start, end) for key, each in value.items()}
    return tree_map(sliced, value)


def denominator(task: Task, batch: Batch) -> Tensor | int:
    """What the task's mean divides by on this batch: valid targets' class weights, or their number; elements; samples.

    Cross-entropy and negative log-likelihood of classes leave out `ignore_index`. Losses of other kinds count samples,
    or what the task's own `count(target)` says.
    """
    target = batch[task.target]
    if task.count is not None:
        counted: Tensor | int = task.count(target)
        return counted
    loss = task.loss
    if not isinstance(target, Tensor):
        return size_of(target)
    if isinstance(loss, BY_CLASS) and not target.is_floating_point():
        valid = target != loss.ignore_index
        return valid.sum() if loss.weight is None else (loss.weight[target.where(valid, 0)] * valid).sum()
    if isinstance(loss, BY_ELEMENT) and loss.reduction == "mean":
        return target.numel()
    return target.numel() // target.shape[1] if isinstance(loss, BY_CLASS) and target.ndim > 1 else len(target)


def shares(tasks: Sequence[Task], batches: Sequence[Batch]) -> list[list[float]]:
    """By micro-batch and task, D of the part over D of the whole; 0 where the task has nothing there."""
    counted = [[denominator(task, batch) for task in tasks] for batch in batches]
    flat = [value for row in counted for value in row]
    on_device = [value.double() for value in flat if isinstance(value, Tensor)]
    read = iter(torch.stack(on_device).tolist() if on_device else ())  # one wait for the device
    numbers = [next(read) if isinstance(value, Tensor) else float(value) for value in flat]
    rows = [numbers[start : start + len(tasks)] for start in range(0, len(numbers), len(tasks))]
    totals = [sum(column) for column in zip(*rows, strict=True)]
    return [[value / total if total else 0.0 for value, total in zip(row, totals, strict=True)] for row in rows]


def check_losses(model: MultiTaskModel, tasks: Sequence[Task], batch: Batch, autocast: Autocast) -> None:
    """Puts each loss to the test: on the predictions for this batch, cut in two, it must be the mean of the halves.

    Random state and buffers are afterwards what they were before.

    Raises:
        UserError: for a loss that isn't a mean over what `denominator` counts.
    """
    total = size_of(batch[tasks[0].target])
    if total < 2:
        return
    halves = ((0, total // 2), (total // 2, total))
    for task, prediction in zip(tasks, look(model, tasks, batch, autocast, take=_prediction), strict=True):
        whole = loss_of(task, prediction, batch).double()
        summed, weight = torch.zeros_like(whole), 0.0
        for start, end in halves:
            part = _part(batch, total, start, end)
            count = float(denominator(task, part))
            if count:
                summed += loss_of(task, _part(prediction, total, start, end), part).double() * count
                weight += count
        if weight and not torch.isclose(summed / weight, whole, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise UserError(
                f"task '{task.name}': its loss can't be taken in micro-batches: on {total} samples it is "
                f"{whole.item():.6g}, and {(summed / weight).item():.6g} from two halves by what they count. Let it be "
                f"a mean over its samples, or give tasks.{task.name}.count, a function of the target that says what "
                "the mean divides by; or train without trainer.micro_batch_size"
            )


def _prediction(task: Task, prediction: Any, batch: Batch) -> Any:
    return prediction
