"""Missing labels of a task, and the denominator of a mean over the labels that are present.

A label is missing if a floating-point target is NaN, if a class number is the loss's `ignore_index`, if the target of a
binary loss (YES_OR_NO) is -100, or if the field `task.mask` is false. Missing labels are removed before the loss is
computed, since masking with `torch.where` would let NaN into the gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mtl.batch import Batch, describe, field, num_samples
from mtl.errors import UserError
from mtl.task import BY_CLASS, BY_ELEMENT, Task

MISSING_CLASS = -100  # torch's losses ignore it by default, and data sets use it for an unknown class
YES_OR_NO = (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MultiLabelSoftMarginLoss, nn.SoftMarginLoss)
CLASS_NUMBERS = (*BY_CLASS, nn.MultiMarginLoss, nn.MultiLabelMarginLoss)


def target_of(task: Task, batch: Batch) -> Any:
    """Returns the target of a task, with integers converted to int64.

    The conversion is needed because uint8 can't hold -100, overflows, and would be used as a mask when indexing.

    Raises:
        UserError: If the target isn't in the batch.
    """
    target = batch[task.target] if task.target in batch else field(batch, task.target, f"task '{task.name}': target")
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        return target
    return target if target.dtype == torch.bool and not isinstance(task.loss, CLASS_NUMBERS) else target.long()


def label_fields(task: Task, batch: Batch) -> dict[str, Any]:
    """Returns the fields of a batch that hold the task's labels: the target, and the mask if the task has one."""
    return {name: batch[name] for name in (task.target, task.mask) if name}


def may_miss(task: Task, target: Any) -> bool:
    """Returns whether labels may be missing, see `Task.missing`; finding them forces a GPU synchronisation."""
    if task.missing is not None or not isinstance(target, Tensor):
        return bool(task.missing)
    return task.objective is None and (target.is_floating_point() or _is_yes_or_no(task, target))


def _is_yes_or_no(task: Task, target: Any) -> bool:
    """Returns whether the target consists of 0, 1, and -100 for missing labels."""
    return isinstance(task.loss, YES_OR_NO) and isinstance(target, Tensor) and target.dtype != torch.bool


def label_mask(task: Task, batch: Batch) -> Tensor | None:
    """Returns a boolean tensor that is true where a label is present.

    Returns:
        A tensor of the target's shape, or (N,) if the target consists of nested tensors; None if no label can be
        missing in a target of this kind.

    Raises:
        UserError: If the mask isn't in the batch or doesn't fit the target.
    """
    target = target_of(task, batch)
    present: Tensor | None = None
    if _is_yes_or_no(task, target):
        present = (target != MISSING_CLASS) & ~target.isnan()
    elif isinstance(target, Tensor) and target.is_floating_point():
        present = ~target.isnan()
    elif isinstance(target, Tensor) and isinstance(task.loss, BY_CLASS):
        present = target != task.loss.ignore_index
    if task.mask is None:
        return present
    mask = _mask(task, target, batch)
    return mask if present is None else present & mask


def _mask(task: Task, target: Any, batch: Batch) -> Tensor:
    """Returns the mask of a task, expanded to the target's shape, or (N,) if the target consists of nested tensors."""
    assert task.mask is not None
    mask = field(batch, task.mask, f"task '{task.name}': mask")
    if not isinstance(mask, Tensor):
        kind = type(mask).__name__
        raise UserError(f"task '{task.name}': its mask '{task.mask}' is a {kind}; it must be a tensor of booleans")
    if mask.is_floating_point() and not ((mask == 0) | (mask == 1)).all():
        raise UserError(
            f"task '{task.name}': its mask '{task.mask}' has numbers other than 0 and 1; a mask can't weight labels"
        )
    mask = mask.bool()
    wrong = f"task '{task.name}': its mask '{task.mask}' is of shape {tuple(mask.shape)} and its target "
    if not isinstance(target, Tensor):
        lengths = [len(leaf) for leaf in tree_leaves(target) if isinstance(leaf, Tensor) and leaf.ndim]
        lengths += [len(target)] if isinstance(target, list) else []
        if mask.ndim != 1 or len(mask) not in lengths:
            raise UserError(f"{wrong}'{task.target}' {describe(target)}; its mask must have one value for each sample")
        return mask
    shape = target.shape
    if mask.shape in (shape, shape[:1]):
        return mask.view(*mask.shape, *[1] * (target.ndim - mask.ndim)).expand(shape)
    by_position = _by_position(task) and target.is_floating_point() and target.ndim > 1
    one = (shape[0], 1, *shape[2:])  # one value for all channels
    if (mask.shape == one and (target.ndim > 2 or by_position)) or (by_position and mask.shape == (one[0], *one[2:])):
        return mask.view(one).expand(shape)
    if mask.shape == (shape[0], 1, *shape[1:]) and target.ndim > 1:
        return mask.squeeze(1)  # the target has no dimension of channels
    raise UserError(
        f"{wrong}'{task.target}' of shape {tuple(shape)}; a mask has the target's shape, one channel for all of the "
        "target's, or one value for each sample. For one value for each position of a loss that is a mean over these, "
        f"set tasks.{task.name}.mean_over=positions"
    )


def select(task: Task, prediction: Any, batch: Batch) -> tuple[Any, Any]:
    """Returns the task's prediction and target without missing labels. May force a GPU synchronisation.

    Class numbers that the mask excludes become the loss's `ignore_index`. Otherwise, samples without a label are left
    out; for losses that average over elements or positions, single elements or positions are left out.

    Raises:
        UserError: If the mask is invalid, see `label_mask`, or if the loss averages over samples and only a part of a
            sample's label is missing.
    """
    target = target_of(task, batch)
    present = label_mask(task, batch) if may_miss(task, target) else None
    if _by_position(task):
        return _positions(task, prediction, target, present)
    if present is None or (task.mask is None and _ignores(task, target)) or present.all():
        return prediction, target
    if _ignores(task, target):
        return prediction, target.masked_fill(~present, task.loss.ignore_index)  # type: ignore[attr-defined]
    return _taken(task, prediction, target, present, by_element=_by_element(task))


def select_for_metric(task: Task, prediction: Any, batch: Batch, *, ignored: int | None = None) -> tuple[Any, Any]:
    """Returns the prediction and the target without missing labels, for a metric.

    A metric that has an ignored value gets the whole target, with that value for missing labels.
    """
    target, present = target_of(task, batch), None if task.missing is False else label_mask(task, batch)
    if isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex():
        target = target.long()
    if _by_position(task):
        return _positions(task, prediction, target, present)
    if present is None or present.all():
        return prediction, target
    if ignored is not None and isinstance(target, Tensor):
        return prediction, target.masked_fill(~present, ignored)
    if isinstance(prediction, Tensor) and _ignores(task, target) and target.ndim > 1:
        return prediction.movedim(1, -1)[present], target[present]  # classes are the second dimension
    by_element = isinstance(prediction, Tensor) and prediction.shape == target.shape
    return _taken(task, prediction, target, present, by_element=by_element)


def denominator(task: Task, batch: Batch) -> Tensor | int:
    """Returns the denominator of the mean that the task's loss is on this batch.

    Depending on the loss, this is the sum of the class weights of the labels, or the number of labels, elements or
    samples. For other losses than torch's, it is `task.count(target)` if given, else the number of samples.

    Raises:
        UserError: If the mask is invalid, see `label_mask`.
    """
    if task.objective is not None:
        number: Tensor | int = task.count(batch) if task.count else num_samples(batch, [task.target])
        return number
    target = target_of(task, batch)
    present = label_mask(task, batch) if may_miss(task, target) or _ignores(task, target) else None
    if task.count is not None:
        if present is not None and not present.all():
            target = _picked(target, _rows(task, present))
        counted: Tensor | int = task.count(target)
        return counted
    if present is not None and _ignores(task, target):
        weight: Tensor | None = task.loss.weight  # type: ignore[attr-defined]
        if weight is None or weight.ndim != 1 or not len(weight):  # the loss itself refuses wrong ones
            return present.sum()
        return (weight[target.where(present, 0).clamp(0, len(weight) - 1)] * present).sum()
    if present is not None:
        by_element = _by_element(task) or _by_position(task)
        return present.sum() if by_element else _rows(task, present).sum() * _positions_each(task, target)
    return _whole_denominator(task, target, batch)


def whole_denominator(task: Task, batch: Batch) -> int | None:
    """Returns the denominator that the task's loss has on this batch if no label is missing.

    Returns:
        None if the denominator depends on the values of the labels as well.
    """
    if task.objective is not None or task.count is not None:
        return None
    target = target_of(task, batch)
    if _ignores(task, target):
        return target.numel() if task.loss.weight is None else None  # type: ignore[attr-defined]
    return _whole_denominator(task, target, batch)


def _whole_denominator(task: Task, target: Any, batch: Batch) -> int:
    if not isinstance(target, Tensor):
        return num_samples(batch, [task.target])
    # Elements stand for positions, since all positions of a floating-point target have the same number of elements.
    by_element = _by_element(task) or _by_position(task)
    return target.numel() if by_element else len(target) * _positions_each(task, target)


def num_labelled(task: Task, batch: Batch) -> Tensor | int:
    """Returns the number of samples in the batch that have a label of the task, or a part of one.

    Raises:
        UserError: If the mask is invalid, see `label_mask`.
    """
    present = None if task.missing is False or task.objective is not None else label_mask(task, batch)
    if present is None:
        return num_samples(batch, [task.target])
    return present.flatten(1).any(1).sum() if present.ndim > 1 else present.sum()


def _ignores(task: Task, target: Any) -> bool:
    """Returns whether the loss itself ignores missing labels, as torch's losses of class numbers do."""
    return isinstance(task.loss, BY_CLASS) and isinstance(target, Tensor) and not target.is_floating_point()


def _by_element(task: Task) -> bool:
    return task.mean_over == "elements" or (isinstance(task.loss, BY_ELEMENT) and task.loss.reduction == "mean")


def _positions_each(task: Task, target: Any) -> int:
    """Returns the number of class distributions in a sample, which is what the sample adds to the denominator."""
    by_class = isinstance(task.loss, BY_CLASS) and isinstance(target, Tensor) and target.ndim > 1
    return math.prod(target.shape[2:]) if by_class else 1


def _by_position(task: Task) -> bool:
    return task.mean_over == "positions"


def _positions(task: Task, prediction: Any, target: Any, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the predictions (M, C) and the targets (M, C) or (M,) at the positions that have a label."""
    both = isinstance(prediction, Tensor) and isinstance(target, Tensor) and prediction.ndim > 1
    numbers = both and target.is_floating_point()
    shape = prediction.shape if not both or numbers else (prediction.shape[0], *prediction.shape[2:])
    if not both or target.shape != shape:
        raise UserError(
            f"task '{task.name}': its loss is a mean over positions; its prediction {describe(prediction)} must have "
            f"the channels as dimension 1, and its target '{task.target}' {describe(target)} the same shape, or that "
            "shape without the channels if it consists of class numbers"
        )
    prediction, target = prediction.movedim(1, -1), target.movedim(1, -1) if numbers else target
    if present is None:
        return prediction.flatten(0, -2), target.flatten(0, -2) if numbers else target.flatten()
    labelled = present.all(1) if numbers else present
    if numbers and not torch.equal(labelled, present.any(1)):
        raise UserError(
            f"task '{task.name}': some positions have only a part of their target '{task.target}', but according to "
            f"tasks.{task.name}.mean_over its loss is a mean over whole positions"
        )
    return prediction[labelled], target[labelled]


def _taken(task: Task, prediction: Any, target: Any, present: Tensor, *, by_element: bool) -> tuple[Any, Any]:
    if by_element and present.ndim > 1:
        if not isinstance(prediction, Tensor) or prediction.shape != target.shape:
            shown = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
            raise UserError(
                f"task '{task.name}': single elements of its target '{task.target}' {tuple(target.shape)} are missing, "
                f"but its prediction, {shown}, doesn't have the same shape"
            )
        weights = (getattr(task.loss, name, None) for name in ("weight", "pos_weight"))
        if isinstance(task.loss, BY_ELEMENT) and any(w is not None and w.numel() > 1 for w in weights):
            raise UserError(
                f"task '{task.name}': single elements of its target '{task.target}' are missing, and its loss has "
                "weights for each, which don't fit the elements that are left. Use one weight for all, or a mask with "
                "one value for each sample"
            )
        return prediction[present], target[present]
    rows = _rows(task, present)
    return _picked(prediction, rows), _picked(target, rows)


def _rows(task: Task, present: Tensor) -> Tensor:
    """Returns a boolean tensor (N,) that is true for samples whose label is present."""
    if present.ndim == 1:
        return present
    whole, some = present.flatten(1).all(1), present.flatten(1).any(1)
    if not torch.equal(whole, some):
        raise UserError(
            f"task '{task.name}': some samples have only a part of their target '{task.target}', and its loss isn't "
            "known to be a mean over elements. Use a loss that is, such as torch.nn.MSELoss, or a mask with one value "
            f"for each sample, or set tasks.{task.name}.mean_over=elements, or positions"
        )
    return whole


def _picked(value: Any, rows: Tensor) -> Any:
    if isinstance(value, list) and len(value) == len(rows):
        return [each for each, wanted in zip(value, rows.tolist(), strict=True) if wanted]
    return tree_map(
        lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(rows) else leaf, value
    )
