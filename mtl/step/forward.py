"""Forward passes: the loss of a task on a batch, from the features or from the task's objective."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.batch import Batch, describe
from mtl.errors import FOREIGN, UserError, describe_error, is_unrelated, text_of
from mtl.labels import select
from mtl.model import MultiTaskModel
from mtl.snapshots import preserved_buffers, preserved_random_state
from mtl.step.alignment import StandIn
from mtl.step.penalties import Penalised, mean, predicted
from mtl.step.precision import Autocast
from mtl.task import BY_CLASS, BY_ELEMENT, WEIGHTED, Task


def loss_of(task: Task, prediction: Any, batch: Batch) -> Tensor:
    """Computes the loss of a task from the prediction of the task's head.

    Args:
        task: The task.
        prediction: The prediction of the task's head, or a `Penalised` one.
        batch: The batch, which holds the target.

    Returns:
        A 0-dim tensor.

    Raises:
        UserError: If the target isn't in the batch, or if the loss function fails or doesn't return a scalar.
    """
    if isinstance(prediction, Penalised) and not isinstance(task.loss, StandIn):
        loss = loss_of(task, prediction.prediction, batch)
        return loss + mean(task, prediction.penalty, batch).to(loss.dtype)
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
            f"shape. Check tasks.{task.name}.head; mtl.heads.Linear with squeeze: true makes a single output (N,)"
        )
    if isinstance(task.loss, WEIGHTED) and isinstance(prediction, Tensor):
        _check_weights(task, prediction)
    try:
        loss = task.loss(*_of_one_type(task, prediction, target))
    except FOREIGN as error:
        if is_unrelated(error):
            raise
        raise UserError(
            f"task '{task.name}': its loss failed on a prediction {describe(prediction)} and the target "
            f"'{task.target}' {describe(target)}: {describe_error(error)}. Check tasks.{task.name}"
            + (
                f" and its num_outputs, {prediction.shape[1]} here"
                if "out of bounds" in text_of(error) and both
                else ""
            )
            + (f"; its head gives a {type(prediction).__name__}" if not isinstance(prediction, Tensor) else "")
        ) from error
    return _scalar(task, loss)


def objective_of(model: MultiTaskModel, task: Task, batch: Batch) -> Tensor:
    """Computes the loss of a task whose objective is a function of model and batch.

    Returns:
        A 0-dim tensor.

    Raises:
        UserError: If the objective fails or doesn't return a scalar.
    """
    assert task.objective is not None
    try:
        loss = task.objective(model, batch)
    except FOREIGN as error:
        if is_unrelated(error) or isinstance(error, UserError):
            raise
        raise UserError(
            f"task '{task.name}': its objective failed on a batch with {', '.join(map(str, batch))}: "
            f"{describe_error(error)}. "
            f"Check tasks.{task.name}.objective"
        ) from error
    return _scalar(task, loss)


def loss_from(model: MultiTaskModel, task: Task, batch: Batch, features: Any) -> Tensor:
    """Computes the loss of a task from its objective if it has one, else from the features."""
    if task.objective is not None:
        return objective_of(model, task, batch)
    return loss_of(task, predicted(model, task, features), batch)


def without_gradients(
    model: MultiTaskModel,
    micro_batches: Sequence[tuple[Sequence[Task], Batch]],
    autocast: Autocast,
    *,
    take: Callable[[Task, Any, Batch], Any] = loss_of,
) -> list[list[Any]]:
    """Runs forward passes without gradients and computes the losses, or any other function of the predictions.

    The micro-batches draw random numbers one after the other, as their training passes would. Random state and buffers
    are restored at the end.

    Args:
        model: The model.
        micro_batches: Pairs of the tasks that take part and the batch.
        autocast: Makes the context manager that forward passes run in.
        take: Function of task, prediction and batch whose value is returned; by default the loss. For a task with an
            objective, the loss is returned in any case.

    Returns:
        One list for each micro-batch, with one value for each task in it.
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
                of_tasks.append(take(task, predicted(model, task, features), batch))
            results.append(of_tasks)
    return results


def _of_one_type(task: Task, prediction: Any, target: Any) -> tuple[Any, Any]:
    """Returns prediction and target in the wider of the two data types, at least float32.

    Applies to torch's losses that compare numbers. Some of these losses fail on integers or on two different
    floating-point types, a few of them only in the backward pass, and the binary cross-entropy computes in the narrower
    of two types.
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
    """Returns the loss, at least in float32, after a check that it is a 0-dim tensor."""
    if not isinstance(loss, Tensor) or loss.ndim:
        shown = describe(loss) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise UserError(f"task '{task.name}': its loss must be a 0-dim tensor, a mean over the samples; it is {shown}")
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss  # room for the scaler's factor


def _check_weights(task: Task, prediction: Tensor) -> None:
    """Checks that the loss has as many weights as the prediction has classes or outputs.

    If there happen to be as many weights as samples, torch would weight the samples instead.

    Raises:
        UserError: If the numbers differ.
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
                f"prediction has {needed}. Check tasks.{task.name}.loss.{name}"
            )
