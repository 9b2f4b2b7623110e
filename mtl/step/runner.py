"""Takes the parts of a step forward and backward, one after the other, by the kind of passes there is."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mtl.batch import Batch
from mtl.gradients.reach import Reach
from mtl.gradients.rows import Rows, leaves
from mtl.model import MultiTaskModel
from mtl.step.loss_checks import LossChecks
from mtl.step.micro_batches import Parts
from mtl.step.passes import PASSES, Weigh, Weights
from mtl.step.precision import Autocast
from mtl.step.whole_batch import Look, summed
from mtl.task import Task


class Runner:
    """One task's graph, or one micro-batch's, at a time.

    Args:
        model: what is trained.
        passes: the kind of passes, chosen.
        autocast: makes the context in which forward passes run.

    Attributes:
        scaler: of fp16 gradients; None in other precisions.
        checks: tests the losses that are taken in micro-batches.
    """

    def __init__(self, model: MultiTaskModel, passes: str, autocast: Autocast) -> None:
        self.model = model
        self.passes = passes
        self.autocast = autocast
        self.scaler: torch.amp.GradScaler | None = None
        self.checks = LossChecks(model)
        self._starts: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def __call__(
        self, parts: Parts, weights: Weights | Weigh, measure: Rows | None, collect: Any, reach: Reach | None = None
    ) -> list[Tensor]:
        """Each task's loss over all parts, 0-dim; the gradients are in `.grad`, or were collected.

        Args:
            parts: of tasks that are all present.
            weights: what each task's loss is multiplied by, or what says so when the losses are known.
            measure, collect, reach: see `mtl.step.passes.joint`.

        Raises:
            UserError: for a loss that can't be taken in parts.
        """
        if len(parts) == 1:
            return self._passes(parts.tasks, parts.batches[0], weights, measure, collect, reach)
        self.checks(parts, self.autocast)
        ahead = None
        if callable(weights) or any(task.whole_batch and task.objective is None for task in parts.tasks):
            ahead = Look(self.model, parts, self.autocast)
        watches = self.checks.watches(parts)
        known = weights(ahead.losses) if callable(weights) and ahead else cast(Weights, weights)

        def run(number: int, here: list[int]) -> Sequence[Tensor]:
            row = parts.shares[number]
            for rows in (measure, collect):
                if rows is not None:
                    rows.shares = {parts.tasks[i].name: row[i] for i in here}
            tasks = ahead.tasks_of(number) if ahead else [parts.tasks[i] for i in here]
            tasks = [watches[task.name].task if task.name in watches else task for task in tasks]
            factors = [known[i] * row[i] for i in here]
            losses = self._passes(tasks, parts.batches[number], factors, measure, collect, reach)
            if collect is not None:
                collect.settle()
            return losses

        losses = summed(parts, run, next(self.model.parameters()).device)
        for watch in watches.values():
            watch.check()
        return ahead.corrected(losses) if ahead else losses

    def _passes(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        weights: Weights | Weigh,
        measure: Rows | None,
        collect: Any,
        reach: Reach | None,
    ) -> list[Tensor]:
        alone = any(task.objective for task in tasks)  # it is the only one in its part
        return PASSES["sequential" if alone else self.passes](
            self.model,
            tasks,
            batch,
            weights,
            backward=self._backward,
            autocast=self.autocast,
            measure=measure,
            collect=collect,
            reach=reach,
        )

    def _backward(self, losses: Sequence[Tensor], weights: Weights, *, retain_graph: bool = False) -> None:
        """Takes the weighted losses backward: a weight is the gradient that a loss's backward starts from."""
        pairs = [(loss, w) for loss, w in zip(losses, weights, strict=True) if loss.requires_grad]  # else all is frozen
        starts = [self._start(loss, weight) for loss, weight in pairs]
        if self.scaler:
            starts = [self.scaler.scale(start) for start in starts]
        if retain_graph:
            leaves(loss for loss, _ in pairs)  # which refuses graphs that can go backward only once
        if pairs:
            torch.autograd.backward([loss for loss, _ in pairs], starts, retain_graph=retain_graph)

    def _start(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        if isinstance(weight, Tensor):
            return weight.to(loss.dtype)
        key = (weight, loss.dtype, loss.device)
        if len(self._starts) > 64:  # shares of micro-batches may be many
            self._starts.clear()
        if key not in self._starts:
            self._starts[key] = torch.tensor(weight, dtype=loss.dtype, device=loss.device)
        return self._starts[key]
