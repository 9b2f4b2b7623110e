"""Tests on data whether a loss or an objective is a mean over what it counts; mean_comparison.py explains how."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mtl.batch import Batch, describe, joined, num_samples, take, take_field
from mtl.errors import UserError
from mtl.labels import denominator, label_fields
from mtl.losses import BinaryCrossEntropy
from mtl.model import MultiTaskModel
from mtl.snapshots import generators_of, preserved_buffers, set_states
from mtl.step.forward import loss_of, objective_of
from mtl.step.mean_comparison import judge
from mtl.task import BY_CLASS, BY_ELEMENT, Task

SAMPLES = 64  # the largest number of samples in a test
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # the largest accepted error of a subset's share
_KNOWN = {each.forward for each in (*BY_CLASS, *BY_ELEMENT, BinaryCrossEntropy)}


def is_known(task: Task) -> bool:
    """Returns whether the loss is of a class whose denominator is known, as for torch's losses."""
    return task.objective is None and getattr(type(task.loss), "forward", None) in _KNOWN


def check_loss(task: Task, predictions: list[Any], batches: list[Batch]) -> bool:
    """Tests whether a loss is a mean over what it counts.

    Args:
        task: The task whose loss is tested.
        predictions: The detached predictions for each batch.
        batches: The batches.

    Returns:
        Whether there were enough labels for the test.

    Raises:
        UserError: If the loss isn't a mean, or if that can't be established.
    """
    sizes = [num_samples(batch, [task.target]) for batch in batches]
    wanted = [label_fields(task, batch) for batch in batches]
    try:
        groups = [(joined(predictions, sizes), joined(wanted, sizes, "batch"), sum(sizes))]
    except UserError:  # the micro-batches have different widths, so each is tested by itself
        if task.count is None and task.mean_over is None and not is_known(task):
            shapes = ", ".join(dict.fromkeys(describe(each) for each in wanted))
            raise UserError(
                f"task '{task.name}': its loss can't be taken in micro-batches: their targets '{task.target}' are "
                f"{shapes}, and it isn't known how much the loss counts of each. {advice(task)}"
            ) from None
        groups = list(zip(predictions, wanted, sizes, strict=True))
    tested = [_is_mean(task, *group) for group in groups]
    return any(tested)


def advice(task: Task) -> str:
    """Returns advice for a loss or an objective that can't be computed in micro-batches."""
    count = f"Give tasks.{task.name}.count, a function of the"
    if task.objective is not None:
        return (
            f"{count} batch that says what the objective's mean divides by; or set tasks.{task.name}.whole_batch=true: "
            "then the objective takes the whole batch in one graph"
        )
    return (
        f"{count} target that says what the loss's mean divides by; or set tasks.{task.name}.whole_batch=true: then "
        "the loss is computed on the whole batch's predictions, and each micro-batch has two forward passes"
    )


def _is_mean(task: Task, prediction: Any, batch: Batch, total: int) -> bool:
    """Tests on one batch of `total` samples whether a loss is the mean over the items it counts.

    The loss is compared with the mean of the losses of two subsets of the samples, first of two halves. The samples are
    sorted by their losses, so that these halves have clearly different losses.

    Returns:
        Whether there were enough labels for the test.

    Raises:
        UserError: If the loss isn't a mean, or if that can't be established.
    """
    precise, prediction, batch, dtype = in_float64(task, prediction, batch)

    def counted(which: list[int], prediction: Any = prediction) -> tuple[float, float]:
        part = take(batch, total, which)
        with warnings.catch_warnings():  # a loss may warn of so few samples
            warnings.simplefilter("ignore")
            number = float(denominator(precise, part))
            if not number:
                return 0.0, 0.0
            return number, float(loss_of(precise, take_field(prediction, total, which, "prediction"), part))

    labelled: list[tuple[float, int]] = []
    for index in range(total):
        if len(labelled) == SAMPLES:
            break
        number, loss = counted([index])
        if number:
            labelled.append((loss if math.isfinite(loss) else math.inf, index))
    samples = [index for _, index in sorted(labelled)]
    if len(samples) < 2:
        return False
    tolerance, precision = TOLERANCE[dtype], 64 * torch.finfo(dtype).eps
    verdict = judge(counted, samples, tolerance, precision)
    if verdict.finite and not (verdict.differs or verdict.decided):  # samples have equal losses: vary the predictions
        other = _spread(prediction, total)
        verdict = judge(lambda which: counted(which, other), samples, tolerance, precision)
        verdict.decided |= dtype == torch.float64  # losses that are still equal are constant
    shapes = f"prediction {describe(prediction)}, target {describe(batch[task.target])}"
    if verdict.differs:
        raise UserError(
            f"task '{task.name}': its loss can't be taken in micro-batches: on {len(samples)} samples ({shapes}) it is "
            f"{verdict.whole:.6g}, and {verdict.mean:.6g} as the weighted mean over two subsets. Let it be a mean "
            f"over its samples, or one of these. {advice(task)}"
        )
    if verdict.finite and not verdict.decided and task.count is None and not is_known(task):
        raise UserError(
            f"task '{task.name}': its loss can't be taken in micro-batches: on {len(samples)} samples ({shapes}) "
            "the losses of the subsets are too similar for a test of whether it is a mean over samples. "
            f"{advice(task)}"
        )
    return verdict.finite


def in_float64(task: Task, prediction: Any, batch: Batch) -> tuple[Task, Any, Batch, torch.dtype]:
    """Converts a loss, a prediction and a batch to float64, so that rounding hides no difference, or else to float32.

    Returns:
        The task, the prediction, the batch, and the data type that they have.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss = copy.deepcopy(task.loss).double() if isinstance(task.loss, nn.Module) else task.loss
            precise, values, fields = replace(task, loss=loss), as_dtype(prediction), as_dtype(batch)
            loss_of(precise, values, fields)
        except Exception:  # the loss contains float32 tensors, or the device doesn't support float64
            return task, as_dtype(prediction, torch.float32), batch, torch.float32
    return precise, values, fields, torch.float64


def as_dtype(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Returns nested tensors with those of floating-point type converted to `dtype`."""
    return tree_map(lambda leaf: leaf.to(dtype) if _is_float(leaf) else leaf, value)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _spread(prediction: Any, total: int) -> Any:
    """Multiplies the prediction for each sample by a random number from 0.5 to 1, so that probabilities stay valid."""
    factors = 0.5 + 0.5 * torch.rand(total, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def times(leaf: Any) -> Any:
        if not _is_float(leaf) or not leaf.ndim or len(leaf) != total:
            return leaf
        return leaf * factors.to(leaf).view(-1, *[1] * (leaf.ndim - 1))

    return tree_map(times, prediction)


def check_objective(model: MultiTaskModel, task: Task, batches: list[Batch], *, again: bool = False) -> bool:
    """Tests whether an objective is a mean over samples, or over what the task's `count` counts.

    Args:
        model: The model.
        task: The task whose objective is tested. An inconclusive test is accepted if the task has a `count`.
        batches: The batches.
        again: Whether the objective has passed a test before. If true, only one comparison is made, of the loss
            of all samples with the mean of two halves, with the model itself instead of a float64 copy; an inconclusive
            test is accepted.

    Returns:
        Whether there were enough samples and a finite loss, so that the test could be made.

    Raises:
        UserError: If the objective isn't a mean, or if that can't be established.
    """
    trusted = task.count is not None
    refused = f"task '{task.name}': its objective can't be taken in micro-batches"
    try:
        sizes = [num_samples(batch, [task.target]) for batch in batches]
        for batch, size in zip(batches, sizes, strict=True):
            take(batch, size, slice(0, size))
        batch, total = joined(batches, sizes, "batch"), sum(sizes)
    except UserError as error:
        if trusted:
            return True
        raise UserError(f"{refused}: {error}. {advice(task)}") from error
    samples = torch.linspace(0, total - 1, min(total, SAMPLES)).long().tolist()
    if len(samples) < 2:
        return False
    with torch.enable_grad(), _evaluated(model, task, batch, copied=not again) as (precise, copied, fields, dtype):
        generators = generators_of(model)
        draws = [generator.get_state() for generator in generators]

        def counted(which: list[int]) -> tuple[float, float]:
            part = take(fields, total, which)
            number = float(denominator(task, part))
            return number, float(objective_of(precise, copied, part).detach()) if number else 0.0

        def drawn_alike(which: list[int]) -> tuple[float, float]:
            set_states(generators, draws)
            return counted(which)

        if trusted and drawn_alike(samples) != counted(samples):
            return True  # the objective draws random numbers, so that its values can't be compared
        verdict = judge(drawn_alike, samples, TOLERANCE[dtype], 64 * torch.finfo(dtype).eps, cuts=1 if again else 4)
    if verdict.differs:
        raise UserError(
            f"{refused}: on {len(samples)} samples it is {verdict.whole:.6g}, and {verdict.mean:.6g} as the weighted "
            f"mean over two subsets. Let it be a mean over samples, or one of these. {advice(task)}; or train "
            "without trainer.micro_batch_size"
        )
    if verdict.finite and not (verdict.decided or trusted or again):
        raise UserError(
            f"{refused}: on {len(samples)} samples the losses of the subsets are too similar for a test of whether it "
            f"is a mean over samples. {advice(task)}"
        )
    return verdict.finite


@contextmanager
def _evaluated(
    model: MultiTaskModel, task: Task, batch: Batch, *, copied: bool
) -> Iterator[tuple[MultiTaskModel, Task, Batch, torch.dtype]]:
    """Gives a float64 copy of the model in eval mode, with the task's objective and the batch, within the context.

    If the model can't be copied, or isn't to be, the context gives the model itself, in eval mode. In eval mode, the
    loss of a sample doesn't depend on other samples, as it does in training mode through batch norm.
    """
    if copied:
        try:
            other = copy.deepcopy(model).double().eval()
            precise = replace(task, objective=dict(other.losses.items()).get(task.name, task.objective))
            fields = as_dtype(batch)
            objective_of(other, precise, fields)
        except Exception:
            copied = False
    if copied:
        yield other, precise, fields, torch.float64
        return
    modes = {module: module.training for module in model.modules()}
    dtype = next(model.parameters()).dtype
    with preserved_buffers(model):
        model.eval()
        try:
            yield model, task, batch, dtype if dtype in TOLERANCE else torch.float32
        finally:
            for module, mode in modes.items():
                module.training = mode
