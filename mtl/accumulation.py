"""A step made in several parts, micro-batches or batches of some tasks' own: what is known of the whole beforehand.

A task's loss is a mean over what it counts, samples or elements or the weights of classes. With D counted on each
part, Σ L_part · D_part / Σ D_part is the loss of the whole, whatever the sizes of the parts; a plain mean of means
isn't. A loss that is no mean at all, such as an RMSE, is taken of all parts' predictions together: a look without
gradients gives these, and then each part is taken forward again, with its slice of the loss's gradient at them.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from mtl.batch import Batch, chosen, describe, joined, num_samples, part_of
from mtl.buffers import kept_buffers
from mtl.errors import UserError
from mtl.labels import denominator
from mtl.model import MultiTaskModel
from mtl.parts import Parts
from mtl.passes import generators_of, look, loss_of, objective_of, set_states
from mtl.precision import Autocast
from mtl.task import Task


def summed(parts: Parts, take: Callable[[int, list[int]], Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """Each task's loss over all parts: what `take` gives for a part's number and the tasks in it, by their shares."""
    losses = [torch.zeros((), dtype=torch.float64, device=device) for _ in parts.tasks]
    for number, row in enumerate(parts.shares):
        here = parts.in_part(number)
        for index, loss in zip(here, take(number, here) if here else (), strict=True):
            losses[index] = losses[index] + row[index] * loss
    return losses


class Look:
    """All parts' losses, taken without moving anything: random state and buffers are afterwards what they were.

    Args:
        model, parts, autocast: what is looked at.

    Attributes:
        losses: of all parts together, by task, 0-dim float64.
    """

    def __init__(self, model: MultiTaskModel, parts: Parts, autocast: Autocast) -> None:
        self._parts = parts
        self._replays: list[dict[int, Replay]] = [{} for _ in parts.batches]
        self._wholes: dict[int, Tensor] = {}
        here = [parts.in_part(number) for number in range(len(parts))]
        together = [([parts.tasks[i] for i in its], batch) for its, batch in zip(here, parts.batches, strict=True)]
        taken = look(model, together, autocast, take=_prediction_or_loss)
        for index, task in enumerate(parts.tasks):
            if task.whole_batch:
                numbers = [number for number, its in enumerate(here) if index in its]
                predictions = [taken[number][here[number].index(index)] for number in numbers]
                self._take_whole(index, numbers, predictions, autocast)
        device = next(model.parameters()).device
        zero = torch.zeros((), device=device)

        def losses_of(number: int, its: list[int]) -> list[Tensor]:
            return [zero if parts.tasks[i].whole_batch else x for i, x in zip(its, taken[number], strict=True)]

        self.losses = self.corrected(summed(parts, losses_of, device))

    def tasks_of(self, number: int) -> list[Task]:
        """The tasks in a part, with stand-ins for losses that can't be taken of it alone."""
        tasks, replays = self._parts.tasks, self._replays[number]
        its = self._parts.in_part(number)
        return [replace(tasks[i], **_STAND_IN, loss=replays[i]) if i in replays else tasks[i] for i in its]

    def corrected(self, losses: list[Tensor]) -> list[Tensor]:
        """Losses by task, those of the stand-ins replaced by what they stand for."""
        return [self._wholes.get(index, loss) for index, loss in enumerate(losses)]

    def _take_whole(self, index: int, numbers: list[int], predictions: list[Any], autocast: Autocast) -> None:
        task = self._parts.tasks[index]
        parts = [self._parts.batches[number] for number in numbers]
        sizes = [num_samples(part) for part in parts]
        leaves, structure = tree_flatten(joined(predictions, sizes))
        leaves = [_precise(leaf.detach()).requires_grad_() if _differs(leaf) else leaf for leaf in leaves]
        cuts = [leaf for leaf in leaves if _differs(leaf)]
        own = [p for p in task.loss.parameters() if p.requires_grad] if isinstance(task.loss, nn.Module) else []
        with torch.enable_grad(), autocast():
            loss = loss_of(task, tree_unflatten(leaves, structure), joined(parts, sizes))
        found = torch.autograd.grad(loss, [*cuts, *own], allow_unused=True)
        self._wholes[index] = loss.detach().double()
        start = 0
        for number, size in zip(numbers, sizes, strict=True):
            gradients = [None if g is None else part_of(g, sum(sizes), start, start + size) for g in found[: len(cuts)]]
            first = list(zip(own, found[len(cuts) :], strict=True)) if number == numbers[0] else []
            self._replays[number][index] = Replay(gradients, first)
            start += size


class Replay:
    """A stand-in for a loss, with a gradient that is known: Σ prediction · gradient.

    Args:
        gradients: one for each floating tensor in the prediction, None where it has none.
        own: pairs of a parameter of the loss and its gradient.
    """

    def __init__(self, gradients: Sequence[Tensor | None], own: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        self._gradients = gradients
        self._own = own

    def __call__(self, prediction: Any, target: Any) -> Tensor:
        """A 0-dim tensor; its value means nothing."""
        values = [leaf for leaf in tree_leaves(prediction) if _differs(leaf)]
        pairs = [*zip(values, self._gradients, strict=True), *self._own]
        total: Tensor = sum((v.to(g.dtype) * g).sum() for v, g in pairs if g is not None)
        return total


_STAND_IN: dict[str, Any] = {"whole_batch": False, "missing": False, "mask": None, "mean_over": None}


def check_losses(model: MultiTaskModel, parts: Parts, autocast: Autocast) -> list[str]:
    """Puts each loss to the test: on predictions for the step's samples, cut in two, it must be the mean of the halves.

    Up to 64 samples that have labels serve; those with the smaller losses are one half, so that a loss that is no mean
    differs by much. Random state and buffers are afterwards what they were before.

    Returns:
        The tasks that were put to it; others had no two labels.

    Raises:
        UserError: for a loss that isn't a mean over what `mtl.labels.denominator` counts.
    """
    here = [[i for i in parts.in_part(n) if not parts.tasks[i].whole_batch] for n in range(len(parts))]
    together = [([parts.tasks[i] for i in its], batch) for its, batch in zip(here, parts.batches, strict=True)]
    generators = generators_of(model)
    draws = [generator.get_state() for generator in generators]
    taken = look(model, together, autocast, take=lambda task, prediction, batch: prediction)
    tested = []
    for index, task in enumerate(parts.tasks):
        numbers = [number for number, its in enumerate(here) if index in its]
        sizes = [num_samples(parts.batches[number]) for number in numbers]
        if sum(sizes) < 2:
            continue
        if task.objective is not None:
            _check_objective(model, task, joined([parts.batches[number] for number in numbers], sizes), sum(sizes))
            tested.append(task.name)
            continue
        prediction = joined([taken[number][here[number].index(index)] for number in numbers], sizes)
        batch = joined([parts.batches[number] for number in numbers], sizes)
        prediction = tree_map(lambda leaf: _precise(leaf) if _differs(leaf) else leaf, prediction)
        if _is_mean(task, prediction, batch, sum(sizes)):
            tested.append(task.name)
    set_states(generators, draws)
    return tested


def _check_objective(model: MultiTaskModel, task: Task, batch: Batch, total: int) -> None:
    """Raises a UserError for an objective that is no mean over samples, or over what its `count` says.

    One that draws says another thing each time, so it is asked with the same random state.
    """
    generators = generators_of(model)
    draws = [generator.get_state() for generator in generators]

    def counted(start: int, end: int) -> tuple[float, float]:
        part = part_of(batch, total, start, end)
        set_states(generators, draws)
        with kept_buffers(model), torch.enable_grad():
            return float(denominator(task, part)), float(objective_of(model, task, part).detach())

    _, whole = counted(0, total)
    halves = [counted(0, total // 2), counted(total // 2, total)]
    mean = sum(count * loss for count, loss in halves if count) / sum(count for count, _ in halves)
    if math.isfinite(whole) and not math.isclose(mean, whole, rel_tol=1e-3, abs_tol=1e-7):
        raise UserError(
            f"task '{task.name}': its objective can't be taken in micro-batches: on {total} samples it is {whole:.6g}, "
            f"and {mean:.6g} from two halves by their number of samples. Let it be a mean over samples, or give "
            f"tasks.{task.name}.count, a function of the batch that says what the mean divides by; or train without "
            "trainer.micro_batch_size"
        )


def _is_mean(task: Task, prediction: Any, batch: Batch, total: int) -> bool:
    """Raises a UserError if the loss is no mean; whether there were labels enough to say."""

    def counted(indices: list[int]) -> tuple[float, float]:
        with warnings.catch_warnings():  # of a loss that isn't made for a sample or two
            warnings.simplefilter("ignore")
            return of(indices)

    def of(indices: list[int]) -> tuple[float, float]:
        part = {name: chosen(value, total, indices) for name, value in batch.items()}
        count = float(denominator(task, part))
        return count, float(loss_of(task, chosen(prediction, total, indices), part)) if count else 0.0

    labelled: list[tuple[float, int]] = []
    for index in range(total):
        if len(labelled) == 64:
            break
        count, loss = counted([index])
        if count:
            labelled.append((loss if math.isfinite(loss) else math.inf, index))
    order = [index for _, index in sorted(labelled)]
    if len(order) < 2:
        return False
    middle = len(order) // 2
    weight, whole = counted(order)
    halves = [counted(order[:middle]), counted(order[middle:])]
    mean = sum(count * loss for count, loss in halves) / sum(count for count, _ in halves)
    if math.isfinite(whole) and not math.isclose(mean, whole, rel_tol=1e-4, abs_tol=1e-7):
        shapes = f"prediction {describe(prediction)}, target {describe(batch[task.target])}"
        raise UserError(
            f"task '{task.name}': its loss can't be taken in micro-batches: on {len(order)} samples ({shapes}) it is "
            f"{whole:.6g}, and {mean:.6g} from two halves by what they count. Either let it be a mean over its "
            f"samples, or give tasks.{task.name}.count, a function of the target that says what the mean divides by; "
            f"or set tasks.{task.name}.whole_batch=true: then the loss is taken of the whole batch's predictions, and "
            "each micro-batch goes forward twice"
        )
    return weight > 0


def _prediction_or_loss(task: Task, prediction: Any, batch: Batch) -> Any:
    return prediction if task.whole_batch else loss_of(task, prediction, batch)


def _precise(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype in (torch.float16, torch.bfloat16) else leaf


def _differs(leaf: Any) -> bool:
    """Whether a part of a prediction can have a gradient."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
