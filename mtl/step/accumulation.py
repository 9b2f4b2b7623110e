"""The loop over a step's micro-batches, whose gradients and losses add up to those of the whole batch.

A task's loss is a mean over what it counts: samples, elements, or the weights of classes. With D counted on each
micro-batch, Σ L · D / Σ D is the loss of the whole batch, whatever the sizes of the micro-batches; a plain mean isn't.
Each micro-batch's loss is therefore weighted by its share D / Σ D.
"""

from typing import Any, cast

import torch
from torch import Tensor

from mtl.gradients.reach import Reach
from mtl.gradients.rows import Rows
from mtl.step.loss_checks import LossChecks
from mtl.step.micro_batches import MicroBatches
from mtl.step.passes import Passes, Weigh, Weights
from mtl.step.whole_batch import Preview


def accumulate(
    passes: Passes,
    checks: LossChecks,
    micro_batches: MicroBatches,
    weights: Weights | Weigh,
    *,
    measure: Rows | None = None,
    collect: Any = None,
    reach: Reach | None = None,
) -> list[Tensor]:
    """Each task's loss over all micro-batches, 0-dim; the gradients are in `.grad`, or were collected.

    Args:
        passes: takes one micro-batch forward and backward.
        checks: tests the losses, whether they are means over what is counted.
        micro_batches: two or more.
        weights: what each task's loss is multiplied by, or a function that gives this when the losses are known.
        measure, collect, reach: see `Passes`.

    Raises:
        UserError: for a loss that can't be taken in micro-batches.
    """
    tasks, autocast = micro_batches.tasks, passes.autocast
    checks(micro_batches, autocast)
    preview = None
    if callable(weights) or any(task.whole_batch and task.objective is None for task in tasks):
        preview = Preview(passes.model, micro_batches, autocast)
    watches = checks.watches(micro_batches)
    known = weights(preview.losses) if callable(weights) and preview else cast(Weights, weights)
    totals = [torch.zeros((), dtype=torch.float64, device=passes.device) for _ in tasks]
    for number, (batch, row) in enumerate(zip(micro_batches.batches, micro_batches.shares, strict=True)):
        members = micro_batches.members[number]
        if not members:
            continue
        for rows in (measure, collect):
            if rows is not None:
                rows.shares = {tasks[i].name: row[i] for i in members}
        taking = preview.tasks_of(number) if preview else [tasks[i] for i in members]
        taking = [watches[task.name].task if task.name in watches else task for task in taking]
        factors = [known[i] * row[i] for i in members]
        losses = passes(taking, batch, factors, measure=measure, collect=collect, reach=reach)
        for index, loss in zip(members, losses, strict=True):
            totals[index] = totals[index] + row[index] * loss
    for watch in watches.values():
        watch.check()
    return preview.corrected(totals) if preview else totals
