"""Whether a loss is a mean over what is counted on a batch: tested on data, as mean_comparison.py explains."""

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

SAMPLES = 64  # that serve for a test
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the error of a half's share
_KNOWN = {each.forward for each in (*BY_CLASS, *BY_ELEMENT, BinaryCrossEntropy)}


def is_known(task: Task) -> bool:
    """Whether the loss is of a kind of which it is known what it counts."""
    return task.objective is None and getattr(type(task.loss), "forward", None) in _KNOWN


def check_loss(task: Task, predictions: list[Any], batches: list[Batch]) -> bool:
    """Tests a loss on detached predictions; whether there were labels enough to say."""
    sizes = [num_samples(batch, [task.target]) for batch in batches]
    wanted = [label_fields(task, batch) for batch in batches]
    try:
        groups = [(joined(predictions, sizes), joined(wanted, sizes, "batch"), sum(sizes))]
    except UserError:  # micro-batches of different widths: each by itself
        if task.count is None and task.mean_over is None and not is_known(task):
            shapes = ", ".join(dict.fromkeys(describe(each) for each in wanted))
            raise UserError(
                f"task '{task.name}': its loss can't be taken in micro-batches: their targets '{task.target}' are "
                f"{shapes}, and it isn't known how much the loss counts of each. {ways_out(task)}"
            ) from None
        groups = list(zip(predictions, wanted, sizes, strict=True))
    tested = [_is_mean(task, *group) for group in groups]
    return any(tested)


def ways_out(task: Task) -> str:
    """What a user can do about a loss, or an objective, that isn't taken in micro-batches."""
    count = f"Give tasks.{task.name}.count, a function of the"
    if task.objective is not None:
        return (
            f"{count} batch that says what the objective's mean divides by; or set tasks.{task.name}.whole_batch=true: "
            "then the objective takes the whole batch in one graph"
        )
    return (
        f"{count} target that says what the loss's mean divides by; or set tasks.{task.name}.whole_batch=true: then "
        "the loss is taken of the whole batch's predictions, and each micro-batch goes forward twice"
    )


def _is_mean(task: Task, prediction: Any, batch: Batch, total: int) -> bool:
    """Raises a UserError if the loss is no mean; whether there were labels enough to say.

    Samples with the smaller losses come first, so that the halves of a loss that is no mean differ by much.
    """
    precise, prediction, batch, dtype = in_float64(task, prediction, batch)

    def counted(which: list[int], prediction: Any = prediction) -> tuple[float, float]:
        part = take(batch, total, which)
        with warnings.catch_warnings():  # of a loss that isn't made for a sample or two
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
    if verdict.finite and not (verdict.differs or verdict.decided):  # all samples have one loss: other predictions tell
        other = _spread(prediction, total)
        verdict = judge(lambda which: counted(which, other), samples, tolerance, precision)
        verdict.decided |= dtype == torch.float64  # then the loss is a constant
    shapes = f"prediction {describe(prediction)}, target {describe(batch[task.target])}"
    if verdict.differs:
        raise UserError(
            f"task '{task.name}': its loss can't be taken in micro-batches: on {len(samples)} samples ({shapes}) it is "
            f"{verdict.whole:.6g}, and {verdict.mean:.6g} from two parts of these by what they count. Let it be a mean "
            f"over its samples, or one of these. {ways_out(task)}"
        )
    if verdict.finite and not verdict.decided and task.count is None and not is_known(task):
        raise UserError(
            f"task '{task.name}': its loss can't be taken in micro-batches: on {len(samples)} samples ({shapes}) it is "
            f"too even to tell whether it is a mean over samples. {ways_out(task)}"
        )
    return verdict.finite


def in_float64(task: Task, prediction: Any, batch: Batch) -> tuple[Task, Any, Batch, torch.dtype]:
    """All that the loss is taken of in float64, where rounding hides nothing, or, where it can't be, in float32."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss = copy.deepcopy(task.loss).double() if isinstance(task.loss, nn.Module) else task.loss
            precise, values, given = replace(task, loss=loss), as_dtype(prediction), as_dtype(batch)
            loss_of(precise, values, given)
        except Exception:  # a loss that has float32 tensors of its own, or a device without float64
            return task, as_dtype(prediction, torch.float32), batch, torch.float32
    return precise, values, given, torch.float64


def as_dtype(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A nest with its floating tensors in this precision."""
    return tree_map(lambda leaf: leaf.to(dtype) if _is_float(leaf) else leaf, value)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _spread(prediction: Any, total: int) -> Any:
    """Predictions times a number of each sample between a half and one, which keeps probabilities what they are."""
    factors = 0.5 + 0.5 * torch.rand(total, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def times(leaf: Any) -> Any:
        if not _is_float(leaf) or not leaf.ndim or len(leaf) != total:
            return leaf
        return leaf * factors.to(leaf).view(-1, *[1] * (leaf.ndim - 1))

    return tree_map(times, prediction)


def check_objective(model: MultiTaskModel, task: Task, batches: list[Batch], *, again: bool = False) -> bool:
    """Raises a UserError for an objective that is no mean over samples, or over what its `count` says; else whether it
    had a finite loss.

    What can't be proven is believed where there is a `count`, and where it was proven before: `again` makes one cut,
    with the model as it is.
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
        raise UserError(f"{refused}: {error}. {ways_out(task)}") from error
    samples = torch.linspace(0, total - 1, min(total, SAMPLES)).long().tolist()
    if len(samples) < 2:
        return False
    with torch.enable_grad(), _evaluated(model, task, batch, copied=not again) as (precise, own, given, dtype):
        generators = generators_of(model)
        draws = [generator.get_state() for generator in generators]

        def counted(which: list[int]) -> tuple[float, float]:
            part = take(given, total, which)
            number = float(denominator(task, part))
            return number, float(objective_of(precise, own, part).detach()) if number else 0.0

        def drawn_alike(which: list[int]) -> tuple[float, float]:
            set_states(generators, draws)
            return counted(which)

        if trusted and drawn_alike(samples) != counted(samples):
            return True  # it draws random numbers, other ones for other samples
        verdict = judge(drawn_alike, samples, TOLERANCE[dtype], 64 * torch.finfo(dtype).eps, cuts=1 if again else 4)
    if verdict.differs:
        raise UserError(
            f"{refused}: on {len(samples)} samples it is {verdict.whole:.6g}, and {verdict.mean:.6g} from two parts of "
            f"these by what they count. Let it be a mean over samples, or one of these. {ways_out(task)}; or train "
            "without trainer.micro_batch_size"
        )
    if verdict.finite and not (verdict.decided or trusted or again):
        raise UserError(
            f"{refused}: on {len(samples)} samples it is too even to tell whether it is a mean over samples. "
            f"{ways_out(task)}"
        )
    return verdict.finite


@contextmanager
def _evaluated(
    model: MultiTaskModel, task: Task, batch: Batch, *, copied: bool
) -> Iterator[tuple[MultiTaskModel, Task, Batch, torch.dtype]]:
    """A copy of the model in float64 and eval mode, with its objective and batch; where it fails, or isn't to be
    copied, the model itself.

    In eval mode a sample's loss doesn't depend on the others, as it does by batch norm and dropout in training.
    """
    if copied:
        try:
            other = copy.deepcopy(model).double().eval()
            own = replace(task, objective=dict(other.losses.items()).get(task.name, task.objective))
            given = as_dtype(batch)
            objective_of(other, own, given)
        except Exception:
            copied = False
    if copied:
        yield other, own, given, torch.float64
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
