"""Forward and backward passes of one micro-batch, in one of three arrangements that compute the same gradient.

    passes      trunk passes   graphs in memory at the same time
    joint       1              all
    sequential  one a task     one task's
    shared      1              the trunk's and one head's

All three also leave the same buffers and the same random state. `joint` and `shared` draw random numbers in the order
trunk, head 1, loss 1, head 2, loss 2, …; `sequential` starts each later forward pass of the trunk from the random state
and the buffers that the first one started from.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtl.batch import Batch
from mtl.choices import PASSES
from mtl.errors import UserError
from mtl.gradients.leaves import leaves
from mtl.gradients.reach import Reach
from mtl.gradients.rows import Rows
from mtl.model import MultiTaskModel
from mtl.snapshots import Buffers, Snapshot
from mtl.step.forward import loss_from, without_gradients
from mtl.step.precision import Autocast, autocast_for
from mtl.task import Task

LEAVES = (Tensor, str, int, float, NoneType)  # the values that features may contain, in tuples, lists and dicts

Weights = Sequence[float | Tensor]
Weigh = Callable[[Sequence[Tensor]], Weights]  # from the losses to their weights


@dataclass(frozen=True)
class Recorders:
    """Objects that record the gradients of the tasks during the passes; None for what isn't recorded.

    Attributes:
        measure: Computes the gradient of each task in additional backward passes, for measurements.
        collect: Takes the gradient of each task out of `.grad` after the backward pass of that task. In passes of
            the kind `shared`, with one forward pass through the trunk for all tasks, this is an `AtFeatures`, which
            records gradients at the features.
        reach: Records which parameters each task reaches.
    """

    measure: Rows | None = None
    collect: Any = None
    reach: Reach | None = None


class Passes:
    """Runs the forward and backward passes of tasks on one micro-batch.

    Args:
        model: The model.
        kind: `joint`, `sequential`, `shared`, or `auto`: `shared` if the tasks share a trunk, else `sequential`.
        precision: The precision of the forward passes, see `mtl.Step`.

    Attributes:
        kind: `joint`, `sequential` or `shared`.

    Raises:
        UserError: If the kind or the precision is unknown, or if the kind is `shared` and there is no shared trunk.
    """

    def __init__(self, model: MultiTaskModel, kind: str, precision: str) -> None:
        self.model = model
        self.kind = choose(kind, model)
        self.precision = precision
        self._trunk = model.shared
        autocast_for(precision, self.device)  # raises an error for an unknown precision before the first step
        self._starts: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def autocast(self) -> Autocast:
        """A function that makes the context manager in which forward passes run."""
        return nullcontext if self.precision == "fp32" else autocast_for(self.precision, self.device)

    @cached_property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler that keeps fp16 gradients from underflowing, created at first use on the model's device."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def __call__(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        weights: Weights | Weigh,
        recorders: Recorders = Recorders(),  # frozen
    ) -> list[Tensor]:
        """Runs the forward and backward passes; the gradients are accumulated in `.grad`, or collected.

        Args:
            tasks: The tasks that take part. A task with an objective has to be the only one.
            batch: The micro-batch.
            weights: The factor of each task's loss, or a function from the losses to these factors.
            recorders: Record the gradients of the tasks. If they are collected, the weights are 1.

        Returns:
            The unweighted loss of each task, as detached 0-dim tensors.

        Raises:
            UserError: If the trunk, a head or a loss fails.
        """
        kind = "sequential" if any(task.objective for task in tasks) else self.kind
        passes: Callable[..., list[Tensor]] = getattr(self, f"_{kind}")
        return passes(tasks, batch, weights, recorders)

    def _joint(
        self, tasks: Sequence[Task], batch: Batch, weights: Weights | Weigh, recorders: Recorders
    ) -> list[Tensor]:
        """Runs one forward pass for all tasks and one backward pass of the weighted sum of their losses."""
        losses = []
        autocast = self.autocast
        with autocast():
            features = self.model.features(batch)
        for task in tasks:
            with autocast():
                losses.append(loss_from(self.model, task, batch, features))
            self._record(recorders, task, losses[-1])
        weights = weights(losses) if callable(weights) else weights
        if recorders.collect is None:
            self.backward(losses, weights)
        else:
            buffers = Buffers(self.model) if len(tasks) > 1 else None
            for task, loss, weight in zip(tasks, losses, weights, strict=True):
                retain_graph = task is not tasks[-1]
                self.backward([loss], [weight], retain_graph=retain_graph)
                if buffers is not None and retain_graph:
                    buffers.restore()
                recorders.collect.take(task.name)
        return [loss.detach() for loss in losses]

    def _sequential(
        self, tasks: Sequence[Task], batch: Batch, weights: Weights | Weigh, recorders: Recorders
    ) -> list[Tensor]:
        """Runs a forward and a backward pass for each task; each graph is freed before the next task.

        Weights that depend on the losses need an additional forward pass without gradients.
        """
        autocast = self.autocast
        if callable(weights):
            weights = weights(without_gradients(self.model, [(tasks, batch)], autocast)[0])
        start = None
        if self._trunk is not None and len(tasks) > 1:
            start = Snapshot(self.model, self._trunk)
        losses: list[Tensor] = []
        for task, weight in zip(tasks, weights, strict=True):
            with autocast():
                features = None
                if task.objective is not None:
                    pass
                elif start is not None and losses:
                    features = start.repeat(self.model.features, batch)
                else:
                    features = self.model.features(batch)
                loss = loss_from(self.model, task, batch, features)
            self._record(recorders, task, loss)
            self.backward([loss], [weight])
            if recorders.collect is not None:
                recorders.collect.take(task.name)
            losses.append(loss.detach())
            del features, loss  # the next task's graph is built only after this one's is gone
        return losses

    def _shared(
        self, tasks: Sequence[Task], batch: Batch, weights: Weights | Weigh, recorders: Recorders
    ) -> list[Tensor]:
        """Runs each head forward and backward as far as the features, and the trunk once forward and once backward.

        If the weights depend on the losses, the graphs of all heads are in memory at the same time.
        """
        autocast = self.autocast
        with autocast():
            features, structure = tree_flatten(self.model.features(batch))
        _check_features(features)
        # The heads get detached features, at which their gradients accumulate.
        cuts = [f.detach().requires_grad_(f.requires_grad) if isinstance(f, Tensor) else f for f in features]
        cut_features = tree_unflatten(cuts, structure)
        pairs = {c: f for c, f in zip(cuts, features, strict=True) if isinstance(c, Tensor) and c.requires_grad}
        losses = []
        at_features: dict[str, list[Tensor | None]] = {}
        for index, task in enumerate(tasks):
            with autocast():
                loss = loss_from(self.model, task, batch, cut_features)
            self._record(recorders, task, loss, pairs)
            if not callable(weights):
                self.backward([loss], [weights[index]])
                loss = loss.detach()
            losses.append(loss)
            if recorders.collect is not None:
                recorders.collect.take(task.name)
                at_features[task.name] = [cut.grad for cut in pairs]
                for cut in pairs:
                    cut.grad = None
        if callable(weights):
            self.backward(losses, weights(losses))
        if recorders.collect is not None:
            recorders.collect.take_at_features(list(pairs.values()), at_features)
        elif used := [(feature, cut.grad) for cut, feature in pairs.items() if cut.grad is not None]:
            torch.autograd.backward([f for f, _ in used], [g for _, g in used])
        return [loss.detach() for loss in losses]

    def backward(self, losses: Sequence[Tensor], weights: Weights, *, retain_graph: bool = False) -> None:
        """Runs the backward pass of 0-dim losses, each multiplied by its weight and, in fp16, scaled.

        Args:
            losses: The losses. A loss without a graph is left out, since all parameters that it depends on are frozen.
            weights: The weight of each loss.
            retain_graph: Whether to keep the graphs for another backward pass.
        """
        pairs = [(loss, w) for loss, w in zip(losses, weights, strict=True) if loss.requires_grad]
        starts = [self._start(loss, weight) for loss, weight in pairs]
        if self.scaler:
            starts = [self.scaler.scale(start) for start in starts]
        if retain_graph:
            leaves([loss for loss, _ in pairs])  # raises an error for graphs that allow one backward pass only
        if pairs:
            torch.autograd.backward([loss for loss, _ in pairs], starts, retain_graph=retain_graph)

    def _start(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        if isinstance(weight, Tensor):
            return weight.to(loss.dtype)
        key = (weight, loss.dtype, loss.device)
        if len(self._starts) > 64:  # micro-batches may have many different shares
            self._starts.clear()
        if key not in self._starts:
            self._starts[key] = torch.tensor(weight, dtype=loss.dtype, device=loss.device)
        return self._starts[key]

    def _record(
        self, recorders: Recorders, task: Task, loss: Tensor, cuts: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Measures the task's gradient in an additional backward pass, and records which parameters the task reaches.

        The additional backward pass leaves the buffers as they were.
        """
        if recorders.measure is not None:
            buffers = Buffers(self.model)
            recorders.measure.add(task.name, loss, cuts)
            buffers.restore()
        if recorders.reach is not None:
            recorders.reach.add(task.name, loss, cuts)


def choose(passes: str, model: MultiTaskModel) -> str:
    """Returns the kind of passes for the model: `passes`, or what `auto` stands for.

    Raises:
        UserError: If the kind is unknown, or if it is `shared` and there is no shared trunk.
    """
    if passes == "auto":
        return "sequential" if model.shared is None else "shared"
    if passes not in PASSES:
        raise UserError(f"passes: '{passes}' is not one of {', '.join(PASSES)}, auto")
    if passes == "shared" and model.shared is None:
        raise UserError("passes: 'shared' needs one trunk for all tasks; take auto, sequential or joint")
    return passes


def _check_features(features: Sequence[Any]) -> None:
    opaque = [type(feature).__name__ for feature in features if not isinstance(feature, LEAVES)]
    if opaque:
        raise UserError(
            f"passes: 'shared' does not support features of type {opaque[0]}; let the trunk return tensors, "
            "or tuples, lists or dicts of tensors, take a part of it with model/trunk=picked, or take passes=sequential"
        )
