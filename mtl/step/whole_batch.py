"""A step made in several parts, micro-batches or batches of some tasks' own: what is known of the whole beforehand.

A task's loss is a mean over what it counts, samples or elements or the weights of classes. With D counted on each
part, Σ L_part · D_part / Σ D_part is the loss of the whole, whatever the sizes of the parts; a plain mean of means
isn't. A loss that is no mean at all, such as an RMSE, is taken of all parts' predictions together: a look without
gradients gives these, and then each part is taken forward again, with its slice of the loss's gradient at them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mtl.batch import Batch, joined, num_samples
from mtl.errors import UserError
from mtl.labels import label_fields
from mtl.model import MultiTaskModel
from mtl.step.micro_batches import Parts
from mtl.step.passes import look, loss_of
from mtl.step.precision import Autocast
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
            if _is_whole(task):
                numbers = [number for number, its in enumerate(here) if index in its]
                predictions = [taken[number][here[number].index(index)] for number in numbers]
                self._take_whole(index, numbers, predictions, autocast)
        device = next(model.parameters()).device
        zero = torch.zeros((), device=device)

        def losses_of(number: int, its: list[int]) -> list[Tensor]:
            return [zero if _is_whole(parts.tasks[i]) else x for i, x in zip(its, taken[number], strict=True)]

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
        batches = [label_fields(task, self._parts.batches[number]) for number in numbers]
        sizes = [num_samples(batch, [task.target]) for batch in batches]
        if any(_differs(leaf) and not leaf.ndim for leaf in tree_leaves(predictions)):
            raise UserError(
                f"task '{task.name}': with whole_batch its prediction is joined from micro-batches, and it has a 0-dim "
                "tensor, which has no samples; let the head give one value a sample"
            )
        leaves, structure = tree_flatten(joined(predictions, sizes))
        lengths = [[len(leaf) for leaf in tree_leaves(each) if _differs(leaf)] for each in predictions]
        leaves = [_precise(leaf.detach()).requires_grad_() if _differs(leaf) else leaf for leaf in leaves]
        cuts = [leaf for leaf in leaves if _differs(leaf)]
        own = [p for p in task.loss.parameters() if p.requires_grad] if isinstance(task.loss, nn.Module) else []
        with torch.enable_grad(), autocast():
            loss = loss_of(task, tree_unflatten(leaves, structure), joined(batches, sizes, "batch"))
        found = torch.autograd.grad(loss, [*cuts, *own], allow_unused=True)
        self._wholes[index] = loss.detach().double()
        slices = [
            [None] * len(numbers) if gradient is None else torch.split(gradient, [each[place] for each in lengths])
            for place, gradient in enumerate(found[: len(cuts)])
        ]
        for place, number in enumerate(numbers):
            first = list(zip(own, found[len(cuts) :], strict=True)) if place == 0 else []
            self._replays[number][index] = Replay([each[place] for each in slices], first)


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


def _prediction_or_loss(task: Task, prediction: Any, batch: Batch) -> Any:
    return prediction if _is_whole(task) else loss_of(task, prediction, batch)


def _is_whole(task: Task) -> bool:
    """Whether the loss is taken of all predictions together; an objective that is has one part alone."""
    return task.whole_batch and task.objective is None


def _precise(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype in (torch.float16, torch.bfloat16) else leaf


def _differs(leaf: Any) -> bool:
    """Whether a part of a prediction can have a gradient."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
