"""Losses of a whole batch that is divided into micro-batches, such as an RMSE, which isn't a mean over samples.

Forward passes without gradients give the predictions for all micro-batches. The loss and its gradient at the
predictions are computed for all of them together. Then each micro-batch runs forward again, and backward from the slice
of that gradient that belongs to the micro-batch.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mtl.batch import Batch, joined, num_samples
from mtl.distributed.collectives import sum_scalars
from mtl.errors import UserError
from mtl.labels import label_fields
from mtl.model import MultiTaskModel
from mtl.process.seeding import common_generators
from mtl.step.alignment import STAND_IN, StandIn
from mtl.step.forward import loss_of, without_gradients
from mtl.step.micro_batches import MicroBatches
from mtl.step.over_processes import gather
from mtl.step.precision import Autocast
from mtl.task import Task


class Preview:
    """Computes the losses of a step without gradients, before the training passes.

    Random state and buffers are restored.

    Args:
        model: The model.
        micro_batches: The micro-batches of the step.
        autocast: Makes the context manager that forward passes run in.

    Attributes:
        losses: The loss of each task over all micro-batches of all processes, as 0-dim float64 tensors.
    """

    def __init__(self, model: MultiTaskModel, micro_batches: MicroBatches, autocast: Autocast) -> None:
        self._micro_batches = micro_batches
        self._replays: list[dict[int, Replay]] = [{} for _ in micro_batches.batches]
        self._whole_losses: dict[int, Tensor] = {}
        tasks, members = micro_batches.tasks, micro_batches.members
        pairs = [
            ([micro_batches.task(number, i) for i in m], batch)
            for number, (m, batch) in enumerate(zip(members, micro_batches.batches, strict=True))
        ]
        taken = without_gradients(model, pairs, autocast, take=_prediction_or_loss)
        for index, task in enumerate(tasks):
            if _is_whole(task):
                labelled = [row[index] > 0 for row in micro_batches.shares]
                numbers = [n for n, member in enumerate(members) if index in member and labelled[n]]
                predictions = [taken[number][members[number].index(index)] for number in numbers]
                self._take_whole(index, numbers, predictions, autocast, next(model.parameters()).device)
        device = next(model.parameters()).device
        totals = [torch.zeros((), dtype=torch.float64, device=device) for _ in tasks]
        for number, member in enumerate(members):
            for index, loss in zip(member, taken[number], strict=True):
                if not _is_whole(tasks[index]):
                    totals[index] = totals[index] + micro_batches.shares[number][index] * loss
        totals = totals if micro_batches.processes == 1 else sum_scalars(totals)
        self.losses = self.corrected(totals)

    def tasks_of(self, number: int) -> list[Task]:
        """Returns the tasks of a micro-batch; losses of the whole batch are replaced by stand-ins, see `Replay`."""
        replays = self._replays[number]
        tasks = {index: self._micro_batches.task(number, index) for index in self._micro_batches.members[number]}
        return [replace(t, **STAND_IN, loss=replays[i]) if i in replays else t for i, t in tasks.items()]

    def corrected(self, losses: list[Tensor]) -> list[Tensor]:
        """Returns the losses by task, with the values of stand-ins replaced by the losses of the whole batch."""
        return [self._whole_losses.get(index, loss) for index, loss in enumerate(losses)]

    def _take_whole(
        self, index: int, numbers: list[int], predictions: list[Any], autocast: Autocast, device: torch.device
    ) -> None:
        task = self._micro_batches.tasks[index]
        batches = [label_fields(task, self._micro_batches.batches[number]) for number in numbers]
        sizes = [num_samples(batch, [task.target]) for batch in batches]
        if any(_is_floating(leaf) and not leaf.ndim for leaf in tree_leaves(predictions)):
            raise UserError(
                f"task '{task.name}': with whole_batch its prediction is joined from micro-batches, and it has a 0-dim "
                "tensor, which has no samples; let the head give one value a sample"
            )
        prediction = joined(predictions, sizes) if predictions else None
        labels = joined(batches, sizes, "batch") if batches else {}
        whole = None
        if self._micro_batches.processes > 1:
            whole = gather(prediction, labels, self._places(task, numbers, sizes), device)
            prediction, labels = whole.prediction, whole.batch
        leaves, structure = tree_flatten(prediction)
        lengths = [[len(leaf) for leaf in tree_leaves(each) if _is_floating(leaf)] for each in predictions]
        leaves = [_precise(leaf.detach()).requires_grad_() if _is_floating(leaf) else leaf for leaf in leaves]
        cuts = [leaf for leaf in leaves if _is_floating(leaf)]
        parameters = [p for p in task.loss.parameters() if p.requires_grad] if isinstance(task.loss, nn.Module) else []
        # Each process takes its slices of the gradient, so that the loss has to draw the same numbers in all of them.
        with nullcontext() if whole is None else common_generators(whole.seed):
            with torch.enable_grad(), autocast():
                loss = loss_of(task, tree_unflatten(leaves, structure), labels)
            gradients = torch.autograd.grad(loss, [*cuts, *parameters], allow_unused=True)
        self._whole_losses[index] = loss.detach().double()
        at_cuts = [g if g is None or whole is None else g[whole.ours] for g in gradients[: len(cuts)]]
        slices = [
            [None] * len(numbers) if gradient is None else torch.split(gradient, [each[place] for each in lengths])
            for place, gradient in enumerate(at_cuts)
        ]
        for place, number in enumerate(numbers):
            counts = place == 0 and (whole is None or whole.is_first)  # the parameters of the loss, once in the step
            first = list(zip(parameters, gradients[len(cuts) :], strict=True)) if counts else []
            self._replays[number][index] = Replay([each[place] for each in slices], first)

    def _places(self, task: Task, numbers: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Returns the places of the samples of some micro-batches in the batch of this process."""
        micro_batches, places = self._micro_batches, list[int]()
        for number, size in zip(numbers, sizes, strict=True):
            source = micro_batches.sources[number]
            before = [
                b for b, s in zip(micro_batches.batches[:number], micro_batches.sources, strict=False) if s == source
            ]
            start = sum(num_samples(label_fields(task, batch), [task.target]) for batch in before)
            places += range(start, start + size)
        return places


class Replay(StandIn):
    """A stand-in for a loss of the whole batch that has the same gradient: Σ prediction · gradient.

    Args:
        gradients: The gradient at each floating-point tensor of the prediction; None if there is no gradient.
        of_parameters: Pairs of a parameter of the loss and its gradient.
    """

    def __init__(
        self, gradients: Sequence[Tensor | None], of_parameters: Sequence[tuple[Tensor, Tensor | None]]
    ) -> None:
        self._gradients = gradients
        self._of_parameters = of_parameters

    def __call__(self, prediction: Any, target: Any) -> Tensor:
        """Returns a 0-dim tensor with the gradient of the loss; its value is meaningless."""
        values = [leaf for leaf in tree_leaves(prediction) if _is_floating(leaf)]
        pairs = [*zip(values, self._gradients, strict=True), *self._of_parameters]
        total: Tensor = sum((v.to(g.dtype) * g).sum() for v, g in pairs if g is not None)
        return total


def _prediction_or_loss(task: Task, prediction: Any, batch: Batch) -> Any:
    return prediction if _is_whole(task) else loss_of(task, prediction, batch)


def _is_whole(task: Task) -> bool:
    """Returns whether the loss is one of the whole batch; an objective isn't, since it has the batch undivided."""
    return task.whole_batch and task.objective is None


def _precise(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype in (torch.float16, torch.bfloat16) else leaf


def _is_floating(leaf: Any) -> bool:
    """Returns whether a part of a prediction can have a gradient."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
