"""Penalties of an architecture, see `MultiTaskModel.penalty`, as parts of the tasks' training losses."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl.batch import Batch
from mtl.labels import label_mask, may_miss, target_of
from mtl.model import MultiTaskModel
from mtl.task import BY_CLASS, Task


class Penalised(NamedTuple):
    """A prediction and a penalty (N,), which is part of the training loss.

    The penalty is cut, joined and gathered from processes as the prediction is, and so counts for the same samples.
    """

    prediction: Any
    penalty: Tensor


def predicted(model: MultiTaskModel, task: Task, features: Any) -> Any:
    """Returns the prediction of a task, with its penalty if the model is in training mode and has one."""
    prediction = model.predict(task.name, features)
    penalty = model.penalty(task.name, features) if model.training else None
    return prediction if penalty is None else Penalised(prediction, penalty)


def mean(task: Task, penalty: Tensor, batch: Batch) -> Tensor:
    """Returns the mean of a penalty (N,) over the samples, each weighted by its part of the loss's denominator.

    Then micro-batches add up to the whole batch, whatever the loss counts.
    """
    parts = _parts(task, batch)
    if parts is None:
        return penalty.mean()
    return (penalty * (parts / parts.sum()).to(penalty.dtype)).sum()


def _parts(task: Task, batch: Batch) -> Tensor | None:
    """Returns what each sample adds to the loss's denominator, up to a factor; None if it is the same for all.

    With `task.count`, the function is called for each sample.
    """
    target = target_of(task, batch)
    if not isinstance(target, Tensor):
        return None
    by_class = isinstance(task.loss, BY_CLASS) and not target.is_floating_point()
    present = label_mask(task, batch) if may_miss(task, target) or by_class else None
    if task.count is not None:
        counts = [torch.as_tensor(task.count(target[i : i + 1]), device=target.device) for i in range(len(target))]
        parts = torch.stack(counts).double()
        if present is None:
            return parts
        return parts * (present.flatten(1).any(1) if present.ndim > 1 else present)
    if present is None:
        return None
    parts = present.double()
    weight: Any = getattr(task.loss, "weight", None)
    if by_class and isinstance(weight, Tensor):
        parts = parts * weight[target.where(present, 0).clamp(0, len(weight) - 1)]
    return parts.flatten(1).sum(1) if parts.ndim > 1 else parts
