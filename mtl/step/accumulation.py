"""Accumulation of gradients and losses over the micro-batches of a step.

A task's loss is a mean over samples, over elements, or over the class weights of the targets. If D is the denominator
of that mean on a micro-batch and L the loss there, then Σ L · D / Σ D is the loss of the whole batch, whatever the
sizes of the micro-batches; the plain mean of the losses L is not. The loss of each micro-batch is therefore weighted by
the share D / Σ D, so that the gradients and losses add up to those of the whole batch. With several processes, the sum
is over the micro-batches of all of them, and each process accumulates the gradients of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mtl.distributed.collectives import sum_scalars
from mtl.model import MultiTaskModel
from mtl.snapshots import preserved_buffers, preserved_random_state
from mtl.step.loss_checks import LossChecks
from mtl.step.micro_batches import MicroBatches
from mtl.step.passes import Passes, Recorders, Weigh, Weights
from mtl.step.whole_batch import Preview


def accumulate(
    passes: Passes,
    checks: LossChecks,
    micro_batches: MicroBatches,
    weights: Weights | Weigh,
    recorders: Recorders,
    over_processes: Callable[[Sequence[Tensor]], list[Tensor]] = sum_scalars,
) -> list[Tensor]:
    """Runs the forward and backward passes of this process's micro-batches, and accumulates the gradients in `.grad`.

    If the recorders collect the gradients, these are there instead.

    Args:
        passes: Runs the forward and backward passes of one micro-batch.
        checks: Tests whether the losses are means, so that they can be computed in micro-batches.
        micro_batches: The micro-batches of this process.
        weights: The factor of each task's loss, or a function from the losses to these factors.
        recorders: Record the gradients of the tasks.
        over_processes: Sums the losses of this process over all processes.

    Returns:
        The loss of each task over all micro-batches of all processes, as 0-dim tensors.

    Raises:
        UserError: If a loss cannot be computed in micro-batches.
    """
    tasks, autocast = micro_batches.tasks, passes.autocast
    device = next(passes.model.parameters()).device
    checks(micro_batches, autocast)
    totals = [torch.zeros((), dtype=torch.float64, device=device) for _ in tasks]
    preview = None
    weigh: Callable[..., Weights] | None = None
    has_whole = any(task.whole_batch and task.objective is None for task in tasks)
    if callable(weights) and len(micro_batches.batches) <= 1 and not has_whole:  # all losses come before any gradient
        weigh = partial(_weigh, weights, totals)
    if (callable(weights) and weigh is None) or has_whole:
        preview = Preview(passes.model, micro_batches, autocast)
    watches = checks.watches(micro_batches)
    all_weights = weights(preview.losses) if callable(weights) and preview else cast(Weights, weights)
    if weigh is not None and not any(micro_batches.members):  # other processes wait for this one's losses
        weigh(micro_batches, None, [])
    for number, (batch, members) in enumerate(zip(micro_batches.batches, micro_batches.members, strict=True)):
        if not members:
            continue
        if recorders.measure is not None:
            recorders.measure.shares = {tasks[i].name: micro_batches.shares[number][i] for i in members}
        present = preview.tasks_of(number) if preview else [micro_batches.task(number, i) for i in members]
        labelled = {tasks[i].name for i in micro_batches.labelled[number]}
        present = [watches[t.name].task if t.name in watches and t.name in labelled else t for t in present]
        factors: Weights | Weigh
        factors = partial(weigh, micro_batches, number) if weigh else Factors(all_weights, micro_batches, number)
        with nullcontext() if labelled else _without_traces(passes.model):
            losses = passes(present, batch, factors, recorders)
        for index, loss in zip(members, losses, strict=True):
            totals[index] = totals[index] + micro_batches.shares[number][index] * loss
    for watch in watches.values():
        watch.check()
    totals = totals if micro_batches.processes == 1 else over_processes(totals)
    return preview.corrected(totals) if preview else totals


class Factors(Sequence[float | Tensor]):
    """The factors of the losses in a micro-batch, which are computed when the first backward pass needs them.

    Args:
        weights: The weight of each task.
        micro_batches: The micro-batches of this process.
        number: The number of the micro-batch.
    """

    def __init__(self, weights: Weights, micro_batches: MicroBatches, number: int) -> None:
        self._weights = weights
        self._micro_batches = micro_batches
        self._number = number

    def __len__(self) -> int:
        return len(self._micro_batches.members[self._number])

    def __getitem__(self, place: Any) -> Any:
        index = self._micro_batches.members[self._number][place]
        return self._weights[index] * self._micro_batches.shares[self._number][index]


@contextmanager
def _without_traces(model: MultiTaskModel) -> Iterator[None]:
    """Restores random state and buffers after passes that run because those of other processes do."""
    with preserved_random_state(model), preserved_buffers(model):
        yield


def _weigh(
    weights: Weigh, zeros: Sequence[Tensor], micro_batches: MicroBatches, number: int | None, losses: Sequence[Tensor]
) -> Weights:
    """Returns the factors of this process's losses, for weights that depend on the losses over all processes.

    Args:
        weights: A function from the losses of all tasks to their weights.
        zeros: A zero for each task.
        micro_batches: The micro-batches of this process.
        number: The number of the only micro-batch that has labels; None if this process has none.
        losses: The losses of the tasks in the micro-batch.
    """
    totals = list(zeros)
    members = [] if number is None else micro_batches.members[number]
    row = [] if number is None else micro_batches.shares[number]
    for index, loss in zip(members, losses, strict=True):
        totals[index] = row[index] * loss.detach().double()
    all_weights = weights(sum_scalars(totals))
    return [all_weights[index] * row[index] for index in members]
