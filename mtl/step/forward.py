"""A task's loss on a batch, from the features or by its objective, with errors that name the place to correct."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.batch import Batch, describe
from mtl.errors import FOREIGN, UserError, is_elsewhere, text_of, told
from mtl.labels import select
from mtl.model import MultiTaskModel
from mtl.snapshots import preserved_buffers, preserved_random_state
from mtl.step.precision import Autocast
from mtl.task import BY_CLASS, BY_ELEMENT, WEIGHTED, Task


def loss_of(task: Task, prediction: Any, batch: Batch) -> Tensor:
    """The task's loss, a 0-dim tensor.

    Raises:
        UserError: for a target that isn't in the batch, and for a loss that fails or isn't a scalar.
    """
    if task.seen is not None:
        task.seen(prediction, batch)
    prediction, target = select(task, prediction, batch)
    both = isinstance(prediction, Tensor) and isinstance(target, Tensor)
    by_element = isinstance(task.loss, BY_ELEMENT) or task.mean_over == "elements"
    if both and by_element and prediction.shape != target.shape:  # torch would broadcast them
        name = getattr(task.loss, "__name__", type(task.loss).__name__)
        raise UserError(
            f"task '{task.name}': its prediction is {describe(prediction)} and its target '{task.target}' "
            f"{describe(target)}; {name} compares them element by element, so they must be of one "
            f"shape. Look at tasks.{task.name}.head; mtl.heads.Linear with squeeze: true makes a single output (N,)"
        )
    if isinstance(task.loss, WEIGHTED) and isinstance(prediction, Tensor):
        _check_weights(task, prediction)
    try:
        loss = task.loss(*_of_one_type(task, prediction, target))
    except FOREIGN as error:
        if is_elsewhere(error):
            raise
        raise UserError(
            f"task '{task.name}': its loss failed on a prediction {describe(prediction)} and the target "
            f"'{task.target}' {describe(target)}: {told(error)}. Look at tasks.{task.name}"
            + (
                f" and its num_outputs, {prediction.shape[1]} here"
                if "out of bounds" in text_of(error) and both
                else ""
            )
            + (f"; its head gives a {type(prediction).__name__}" if not isinstance(prediction, Tensor) else "")
        ) from error
    return _scalar(task, loss)


def objective_of(model: MultiTaskModel, task: Task, batch: Batch) -> Tensor:
    """The task's objective, a 0-dim tensor.

    Raises:
        UserError: for one that fails or isn't a scalar.
    """
    assert task.objective is not None
    try:
        loss = task.objective(model, batch)
    except FOREIGN as error:
        if is_elsewhere(error) or isinstance(error, UserError):
            raise
        raise UserError(
            f"task '{task.name}': its objective failed on a batch with {', '.join(map(str, batch))}: {told(error)}. "
            f"Look at tasks.{task.name}.objective"
        ) from error
    return _scalar(task, loss)


def loss_from(model: MultiTaskModel, task: Task, batch: Batch, features: Any) -> Tensor:
    """The task's objective, or its loss from the features."""
    if task.objective is not None:
        return objective_of(model, task, batch)
    return loss_of(task, model.predict(task.name, features), batch)


def without_gradients(
    model: MultiTaskModel,
    micro_batches: Sequence[tuple[Sequence[Task], Batch]],
    autocast: Autocast,
    *,
    take: Callable[[Task, Any, Batch], Any] = loss_of,
) -> list[list[Any]]:
    """By micro-batch and task, the loss, or what else `take` makes of the prediction, without gradients.

    The micro-batches draw random numbers one after the other, as their passes would. Random state and buffers are
    restored at the end.

    Args:
        model: trunk and heads.
        micro_batches: pairs of the tasks that take part, and the batch.
        autocast: makes the context that forward passes run in.
        take: from a task, its prediction and the batch to what is wanted; an objective gives its loss.
    """
    results = []
    with preserved_random_state(model), preserved_buffers(model), torch.no_grad(), autocast():
        for tasks, batch in micro_batches:
            features = None
            of_tasks = []
            for task in tasks:
                if task.objective is not None:
                    with torch.enable_grad():  # it may differentiate by itself
                        of_tasks.append(objective_of(model, task, batch).detach())
                    continue
                if features is None:
                    features = model.features(batch)
                of_tasks.append(take(task, model.predict(task.name, features), batch))
            results.append(of_tasks)
    return results


def _of_one_type(task: Task, prediction: Any, target: Any) -> tuple[Any, Any]:
    """Both in the wider one's type, float32 at least, for losses of torch's that compare numbers.

    Some of these fail on integers or on two types of floats, a few in the backward pass alone, and a binary
    cross-entropy takes the narrower of two types of floats.
    """
    if not isinstance(prediction, Tensor) or not isinstance(target, Tensor) or prediction.dtype == target.dtype:
        return prediction, target
    of_shares = isinstance(task.loss, BY_CLASS) and target.is_floating_point()
    of_numbers = of_shares or isinstance(task.loss, (*BY_ELEMENT, nn.MultiLabelSoftMarginLoss))
    if not of_numbers or not prediction.is_floating_point() or target.is_complex():
        return prediction, target
    wider = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(wider), target.to(wider)


def _scalar(task: Task, loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim:
        shown = describe(loss) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise UserError(f"task '{task.name}': its loss must be a 0-dim tensor, a mean over the samples; it is {shown}")
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss  # room for the scaler's factor


def _check_weights(task: Task, prediction: Tensor) -> None:
    """Raises a UserError for a loss with another number of weights than the prediction has classes or outputs.

    Torch would take weights of as many numbers as a batch has samples for weights of these.
    """
    by_class = isinstance(task.loss, (*BY_CLASS, nn.MultiMarginLoss))
    for name in ("weight", "pos_weight"):
        weight = getattr(task.loss, name, None)
        if not isinstance(weight, Tensor):
            continue
        if by_class:
            right = prediction.ndim < 2 or weight.shape == prediction.shape[1:2]
            needed = f"{prediction.shape[1] if prediction.ndim > 1 else ''} classes"
        else:
            shape = prediction.shape[1:]
            fits = zip(reversed(weight.shape), reversed(shape), strict=False)
            right = weight.numel() == 1 or (weight.ndim <= len(shape) and all(w in (1, p) for w, p in fits))
            needed = f"outputs of shape {tuple(shape)} a sample" if shape else "one output a sample"
        if not right:
            raise UserError(
                f"task '{task.name}': its loss has {weight.numel()} weights, of shape {tuple(weight.shape)}, and its "
                f"prediction has {needed}. Look at tasks.{task.name}.loss.{name}"
            )
