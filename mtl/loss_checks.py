"""Whether losses that are taken in micro-batches are means over what is counted: tested on data, before it matters.

Of a batch in two halves with losses L_a and L_b, and the numbers D_a and D_b that are counted on them, a mean has
L · (D_a + D_b) = L_a · D_a + L_b · D_b. The difference of the two sides is judged in units of |L_a - L_b|, since that
ratio is the error of the halves' shares: at initialisation halves are alike, and any shares give nearly the same loss.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves_with_path, tree_map

from mtl.batch import Batch, describe, joined, num_samples, take, take_field
from mtl.buffers import kept_buffers
from mtl.errors import UserError
from mtl.labels import denominator
from mtl.losses import BinaryCrossEntropy
from mtl.model import MultiTaskModel
from mtl.parts import Parts
from mtl.passes import generators_of, look, loss_of, objective_of, set_states
from mtl.precision import Autocast
from mtl.task import BY_CLASS, BY_ELEMENT, Task

SAMPLES = 64  # that serve for a test
VALUES = 64  # different integers in a field, up to which each of them is watched
_KNOWN = {each.forward for each in (*BY_CLASS, *BY_ELEMENT, BinaryCrossEntropy)}
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the error of a half's share

Counted = Callable[[list[int]], tuple[float, float]]  # from samples to what is counted on them, and their loss


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
        self._uneven: dict[str, set[str]] = {}  # by the names of tested tasks, what was uneven in the tests

    def __call__(self, parts: Parts, autocast: Autocast) -> None:
        """Tests what is due. Random state and buffers are afterwards what they were before.

        Raises:
            UserError: for a loss or an objective that isn't a mean over what is counted, and for one of which that
                can't be proven.
        """
        due: dict[int, set[str]] = {}
        again = []
        for index, task in enumerate(parts.tasks):
            if not task.whole_batch and any(0 < row[index] < 1 for row in parts.shares):
                uneven = self._due(task, _batches(parts, index))
                if uneven is not None:
                    due[index] = uneven
                elif task.objective is not None and task.count is None:
                    again.append(index)
        if not due and not again:
            return
        generators = generators_of(self.model)
        draws = [generator.get_state() for generator in generators]
        for index in again:  # what it counts may depend on predictions, as with a threshold
            _check_objective(self.model, parts.tasks[index], _batches(parts, index), again=True)
            set_states(generators, draws)
        tested = check_losses(self.model, parts.of_tasks(list(due)), autocast) if due else []
        set_states(generators, draws)
        for index, uneven in due.items():
            if parts.tasks[index].name in tested:
                self._uneven.setdefault(parts.tasks[index].name, set()).update(uneven)

    def watches(self, parts: Parts) -> dict[str, "Watch"]:
        """By name, what goes on testing the losses of one's own while the parts are gone over."""
        own = [t for t in parts.tasks if not (_is_known(t) or t.whole_batch or t.objective is not None)]
        return {task.name: Watch(self.model, task) for task in own}

    def depends_on_batch(self, task: Task, prediction: Any, batch: Batch) -> bool:
        """Whether samples' mean loss depends on which of them are in one batch; the model has to be in eval mode.

        It does so by declaration where the task has `whole_batch`; else the loss is tested when that is due.
        """
        if task.whole_batch:
            return True
        if _is_known(task) and getattr(task.loss, "reduction", None) == "mean":
            return False
        uneven = self._due(task, [batch])
        if uneven is None:
            return False
        generators = generators_of(self.model)
        draws = [generator.get_state() for generator in generators]
        try:
            if task.objective is not None:
                tested = _check_objective(self.model, task, [batch])
            else:
                tested = _check_loss(task, [prediction], [batch])
        except UserError:
            return True
        finally:
            set_states(generators, draws)
        if tested:
            self._uneven.setdefault(task.name, set()).update(uneven)
        return False

    def _due(self, task: Task, batches: Sequence[Batch]) -> set[str] | None:
        """What is uneven in the batches, if a test is due for it; else None."""
        uneven = set() if _is_known(task) else uneven_values(task, batches)
        return uneven if task.name not in self._uneven or uneven - self._uneven[task.name] else None

    def state_dict(self) -> dict[str, list[str]]:
        """By task, what was uneven in its tests."""
        return {name: sorted(uneven) for name, uneven in self._uneven.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[str]] | Sequence[str]) -> None:
        """The counterpart of `state_dict`; older checkpoints have the names of the tested tasks alone."""
        named = state if isinstance(state, Mapping) else dict.fromkeys(state, ())
        self._uneven = {name: set(uneven) for name, uneven in named.items()}


def uneven_values(task: Task, batches: Sequence[Batch]) -> set[str]:
    """What is spread unevenly over a step's samples in the fields that the task's loss may look at.

    An integer or a boolean, if a field has few different ones, else values below 0, 0, 255 and the length of the
    padding at either end; NaN and 0 among floats; and whether micro-batches have different widths.
    """
    names = [name for name in (task.target, task.mask) if name] if task.objective is None else list(batches[0])
    fields: dict[str, list[Tensor]] = {}
    found = set()
    for batch in batches:
        try:
            total = num_samples(batch, [task.target])
        except UserError:  # then a `count` has to say, see `_check_objective`
            return {"fields of different lengths"}
        for path, leaf in tree_leaves_with_path({name: batch[name] for name in names}):
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == total:
                fields.setdefault(".".join(str(getattr(key, "key", key)) for key in path), []).append(leaf)
            elif isinstance(leaf, Tensor) and leaf.ndim:
                found.add("fields of different lengths")
    counts: dict[str, Tensor] = {}
    for name, leaves in fields.items():
        if len({leaf.shape[1:] for leaf in leaves}) > 1:
            found.add(f"the width of {name}")
        kinds = None if leaves[0].is_floating_point() else torch.unique(torch.cat([leaf.flatten() for leaf in leaves]))
        for leaf in leaves:
            for value, number in _numbers_of(leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1), kinds).items():
                key = f"{value} in {name}"
                counts[key] = torch.cat([counts[key], number]) if key in counts else number
    if counts:
        is_uneven = torch.stack([(number != number[0]).any() for number in counts.values()]).tolist()
        found |= {key for key, uneven in zip(counts, is_uneven, strict=True) if uneven}
    return found


def _numbers_of(leaf: Tensor, kinds: Tensor | None) -> dict[str, Tensor]:
    """By value, how often each sample (N, M) has it, (N,)."""
    if kinds is None:
        return {"nan": leaf.isnan().sum(1), "0": (leaf == 0).sum(1)}
    if len(kinds) <= VALUES:
        return {str(value): (leaf == value).sum(1) for value in kinds.tolist()}
    numbers = {"a value below 0": (leaf < 0).sum(1), "0": (leaf == 0).sum(1), "255": (leaf == 255).sum(1)}
    last = leaf.flip(1)
    for end, each in (("first", leaf), ("last", last)):
        numbers[f"repetition of the {end}"] = (each == each[:, :1]).long().cumprod(1).sum(1)
    return numbers


def check_losses(model: MultiTaskModel, parts: Parts, autocast: Autocast) -> list[str]:
    """Tests the loss or the objective of each task on samples of the step.

    Returns:
        The tasks that were tested; others had no two labels, or no finite loss.

    Raises:
        UserError: see `LossChecks`.
    """
    here = [[i for i in parts.in_part(n) if parts.tasks[i].objective is None] for n in range(len(parts))]
    together = [([parts.tasks[i] for i in its], batch) for its, batch in zip(here, parts.batches, strict=True)]
    taken = look(model, together, autocast, take=lambda task, prediction, batch: prediction) if any(here) else []
    tested = []
    for index, task in enumerate(parts.tasks):
        batches = _batches(parts, index)
        if task.objective is not None:
            found = _check_objective(model, task, batches)
        else:
            predictions = [taken[n][its.index(index)] for n, its in enumerate(here) if index in its]
            found = _check_loss(task, predictions, batches)
        if found:
            tested.append(task.name)
    return tested


def _batches(parts: Parts, index: int) -> list[Batch]:
    return [batch for number, batch in enumerate(parts.batches) if index in parts.in_part(number)]


def _is_known(task: Task) -> bool:
    """Whether the loss is of a kind of which it is known what it counts."""
    return task.objective is None and getattr(type(task.loss), "forward", None) in _KNOWN


class Watch:
    """Tests a loss of one's own in each step: what it counts may depend on predictions, as with a threshold.

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
        batch = {name: batch[name] for name in (self._own.target, self._own.mask) if name}
        now = prediction, batch, num_samples(batch, [self._own.target])
        before, self._before = self._before, now
        if before is None:
            return
        try:
            both, targets = (joined([before[n], now[n]], [before[2], now[2]], name) for n, name in enumerate(_NAMES))
        except UserError:  # of different widths: a `count` or `mean_over` is believed
            return
        generators = generators_of(self._model)
        draws = [generator.get_state() for generator in generators]
        device = next(self._model.parameters()).device
        with kept_buffers(self._model), torch.no_grad(), torch.autocast(device.type, enabled=False):
            self._compare(before, now, both, targets)
        set_states(generators, draws)

    def _compare(self, before: tuple[Any, Batch, int], now: tuple[Any, Batch, int], both: Any, targets: Batch) -> None:
        precise, both, targets, dtype = _in_float64(self._own, both, targets)
        numbers: list[Tensor | int] = []
        losses = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for prediction, batch, _ in (before, now):
                prediction, batch = _as_dtype(prediction, dtype), _as_dtype(batch, dtype)
                numbers.append(denominator(precise, batch))
                losses.append(loss_of(precise, prediction, batch).double())
            losses.append(loss_of(precise, both, targets).double())
        counts = [torch.as_tensor(number, device=losses[0].device).double() for number in numbers]
        self._found.append((torch.stack([*counts, *losses]), dtype))

    def check(self) -> None:
        """Called when all parts have gone by.

        Raises:
            UserError: where two micro-batches' loss isn't the mean of their losses by what they count.
        """
        if not self._found:
            return
        rows = torch.stack([row for row, _ in self._found]).tolist()
        for (count_a, count_b, loss_a, loss_b, whole), (_, dtype) in zip(rows, self._found, strict=True):
            if not count_a or not count_b or not math.isfinite(whole):
                continue
            mean = (count_a * loss_a + count_b * loss_b) / (count_a + count_b)
            noise = 64 * torch.finfo(dtype).eps * max(abs(whole), abs(loss_a), abs(loss_b))
            if not abs(mean - whole) <= _TOLERANCE[dtype] * abs(loss_a - loss_b) + noise:
                raise UserError(
                    f"task '{self._own.name}': its loss can't be taken in micro-batches: of two of these it is "
                    f"{whole:.6g}, and {mean:.6g} from each by what it counts, so that it isn't the mean that it was "
                    "in earlier tests: what it leaves out or how it weighs may depend on predictions or values, such "
                    f"as those above a threshold. {_ways_out(self._own)}"
                )


_NAMES = ("prediction", "batch")


@dataclass
class Verdict:
    """What a test of a loss says.

    Attributes:
        whole, mean: the loss of all samples, and the mean of two parts' by what they count, where these differ.
        decided: whether the losses of parts differ by enough to tell.
        finite: whether the loss of all samples is.
    """

    whole: float = 0.0
    mean: float = 0.0
    differs: bool = False
    decided: bool = False
    finite: bool = True


def judge(counted: Counted, samples: list[int], tolerance: float, precision: float, *, cuts: int = 4) -> Verdict:
    """Compares the loss of samples with the mean of two parts' losses, for several cuts.

    Args:
        counted: gives what is counted on some samples, and their loss.
        samples: the first half and the second half of which are one cut; three more, of other sizes, are drawn.
        tolerance: of the error of a part's share.
        precision: the relative rounding error of a loss.
        cuts: how many are made.
    """
    _, whole = counted(samples)
    if not math.isfinite(whole):
        return Verdict(finite=False)
    generator = torch.Generator().manual_seed(0)
    orders = [samples] + [[samples[i] for i in torch.randperm(len(samples), generator=generator)] for _ in range(3)]
    decided = False
    for order, share in list(zip(orders, (0.5, 0.5, 0.25, 0.7), strict=True))[:cuts]:
        middle = min(max(round(share * len(order)), 1), len(order) - 1)
        (count_a, loss_a), (count_b, loss_b) = counted(sorted(order[:middle])), counted(sorted(order[middle:]))
        if not count_a or not count_b:
            continue
        mean = (count_a * loss_a + count_b * loss_b) / (count_a + count_b)
        gap, noise = abs(loss_a - loss_b), precision * max(abs(whole), abs(loss_a), abs(loss_b))
        if not abs(mean - whole) <= tolerance * gap + noise:
            return Verdict(whole, mean, differs=True)
        decided |= tolerance * gap > noise
    return Verdict(decided=decided)


def _check_loss(task: Task, predictions: list[Any], batches: list[Batch]) -> bool:
    """Tests a loss on detached predictions; whether there were labels enough to say."""
    sizes = [num_samples(batch, [task.target]) for batch in batches]
    wanted = [{name: batch[name] for name in (task.target, task.mask) if name} for batch in batches]
    try:
        groups = [(joined(predictions, sizes), joined(wanted, sizes, "batch"), sum(sizes))]
    except UserError:  # micro-batches of different widths: each by itself
        if task.count is None and task.mean_over is None and not _is_known(task):
            shapes = ", ".join(dict.fromkeys(describe(each) for each in wanted))
            raise UserError(
                f"task '{task.name}': its loss can't be taken in micro-batches: their targets '{task.target}' are "
                f"{shapes}, and it isn't known how much the loss counts of each. {_ways_out(task)}"
            ) from None
        groups = list(zip(predictions, wanted, sizes, strict=True))
    tested = [_is_mean(task, *group) for group in groups]
    return any(tested)


def _ways_out(task: Task) -> str:
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
    precise, prediction, batch, dtype = _in_float64(task, prediction, batch)

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
    tolerance, precision = _TOLERANCE[dtype], 64 * torch.finfo(dtype).eps
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
            f"over its samples, or one of these. {_ways_out(task)}"
        )
    if verdict.finite and not verdict.decided and task.count is None and not _is_known(task):
        raise UserError(
            f"task '{task.name}': its loss can't be taken in micro-batches: on {len(samples)} samples ({shapes}) it is "
            f"too even to tell whether it is a mean over samples. {_ways_out(task)}"
        )
    return verdict.finite


def _in_float64(task: Task, prediction: Any, batch: Batch) -> tuple[Task, Any, Batch, torch.dtype]:
    """All that the loss is taken of in float64, where rounding hides nothing, or, where it can't be, in float32."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss = copy.deepcopy(task.loss).double() if isinstance(task.loss, nn.Module) else task.loss
            precise, values, given = replace(task, loss=loss), _as_dtype(prediction), _as_dtype(batch)
            loss_of(precise, values, given)
        except Exception:  # a loss that has float32 tensors of its own, or a device without float64
            return task, _as_dtype(prediction, torch.float32), batch, torch.float32
    return precise, values, given, torch.float64


def _as_dtype(value: Any, dtype: torch.dtype = torch.float64) -> Any:
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


def _check_objective(model: MultiTaskModel, task: Task, batches: list[Batch], *, again: bool = False) -> bool:
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
        raise UserError(f"{refused}: {error}. {_ways_out(task)}") from error
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
        verdict = judge(drawn_alike, samples, _TOLERANCE[dtype], 64 * torch.finfo(dtype).eps, cuts=1 if again else 4)
    if verdict.differs:
        raise UserError(
            f"{refused}: on {len(samples)} samples it is {verdict.whole:.6g}, and {verdict.mean:.6g} from two parts of "
            f"these by what they count. Let it be a mean over samples, or one of these. {_ways_out(task)}; or train "
            "without trainer.micro_batch_size"
        )
    if verdict.finite and not (verdict.decided or trusted or again):
        raise UserError(
            f"{refused}: on {len(samples)} samples it is too even to tell whether it is a mean over samples. "
            f"{_ways_out(task)}"
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
            given = _as_dtype(batch)
            objective_of(other, own, given)
        except Exception:
            copied = False
    if copied:
        yield other, own, given, torch.float64
        return
    modes = {module: module.training for module in model.modules()}
    dtype = next(model.parameters()).dtype
    with kept_buffers(model):
        model.eval()
        try:
            yield model, task, batch, dtype if dtype in _TOLERANCE else torch.float32
        finally:
            for module, mode in modes.items():
                module.training = mode
