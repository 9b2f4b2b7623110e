"""The three ways to make the forward and backward passes of one micro-batch. All leave the same gradient.

    passes      trunk forwards and backwards   graphs alive at once
    joint       1                              all
    sequential  one a task                     one task's
    shared      1                              the trunk's and one head's

From one state they also leave the same buffers and the same random state: `joint` and `shared` draw in the order
trunk, head 1, loss 1, head 2, loss 2, …, and `sequential` makes each later trunk forward start from the random state
and the buffers that the first one started from.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtl.batch import Batch
from mtl.choices import PASSES
from mtl.errors import UserError
from mtl.gradients.reach import Reach
from mtl.gradients.rows import Rows, leaves
from mtl.model import MultiTaskModel
from mtl.snapshots import Buffers, Snapshot
from mtl.step.forward import loss_from, loss_of, without_gradients
from mtl.step.precision import Autocast, autocast_for
from mtl.task import Task

LEAVES = (Tensor, str, int, float, NoneType)  # what features may be made of, in tuples, lists and dicts

Weights = Sequence[float | Tensor]
Weigh = Callable[[Sequence[Tensor]], Weights]  # from the losses to what each is multiplied by


class Passes:
    """Takes tasks forward and backward on one micro-batch.

    Args:
        model: trunk and heads.
        kind: `joint`, `sequential`, `shared`, or `auto`: `shared` where the tasks share a trunk, else `sequential`.
        precision: of the forward passes, see `mtl.Step`.

    Attributes:
        kind: one of the three.

    Raises:
        UserError: for an unknown kind or precision, and for `shared` where the tasks share no trunk.
    """

    def __init__(self, model: MultiTaskModel, kind: str, precision: str) -> None:
        self.model = model
        self.kind = choose(kind, model)
        self.precision = precision
        self._trunk = model.shared
        autocast_for(precision, self.device)  # an unknown precision is an error now, not in the first step
        self._starts: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def autocast(self) -> Autocast:
        """Makes the context that forward passes run in."""
        return nullcontext if self.precision == "fp32" else autocast_for(self.precision, self.device)

    @cached_property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What keeps fp16 gradients from underflowing; made when it is first needed, where the model is by then."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def __call__(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        weights: Weights | Weigh,
        *,
        measure: Rows | None = None,
        collect: Any = None,
        reach: Reach | None = None,
    ) -> list[Tensor]:
        """Takes the tasks forward and backward; the gradients are in `.grad`, or were collected.

        Args:
            tasks: those that take part. A task with an objective is alone.
            batch: what the model is trained on.
            weights: what each task's loss is multiplied by, or a function that gives this when the losses are known.
            measure: takes each task's row beside the backward passes.
            collect: takes each task's row out of `.grad` after the backward pass of that task alone; the weights are
                then 1. In `shared` passes it is an `AtFeatures`.
            reach: records which parameters each task reaches.

        Returns:
            Each task's unweighted loss, detached, 0-dim.

        Raises:
            UserError: for a trunk, head or loss that fails.
        """
        kind = "sequential" if any(task.objective for task in tasks) else self.kind
        passes: Callable[..., list[Tensor]] = getattr(self, f"_{kind}")
        return passes(tasks, batch, weights, measure, collect, reach)

    def _joint(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        weights: Weights | Weigh,
        measure: Rows | None,
        collect: Rows | None,
        reach: Reach | None,
    ) -> list[Tensor]:
        """One forward of everything, the weighted losses summed, one backward."""
        losses = []
        autocast = self.autocast
        with autocast():
            features = self.model.features(batch)
        for task in tasks:
            with autocast():
                losses.append(loss_of(task, self.model.predict(task.name, features), batch))
            if measure is not None:
                self._measure(measure, task, losses[-1])
            if reach is not None:
                reach.add(task.name, losses[-1])
        weights = weights(losses) if callable(weights) else weights
        if collect is None:
            self.backward(losses, weights)
        else:
            buffers = Buffers(self.model) if len(tasks) > 1 else None
            for task, loss, weight in zip(tasks, losses, weights, strict=True):
                more = task is not tasks[-1]
                self.backward([loss], [weight], retain_graph=more)
                if buffers is not None and more:
                    buffers.restore()
                collect.take(task.name)
        return [loss.detach() for loss in losses]

    def _sequential(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        weights: Weights | Weigh,
        measure: Rows | None,
        collect: Rows | None,
        reach: Reach | None,
    ) -> list[Tensor]:
        """Per task: forward, backward, free. Weights that depend on the losses need a forward pass beforehand."""
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
            if measure is not None:
                self._measure(measure, task, loss)
            if reach is not None:
                reach.add(task.name, loss)
            self.backward([loss], [weight])
            if collect is not None:
                collect.take(task.name)
            losses.append(loss.detach())
            del features, loss  # the next task's graph is built only after this one's is gone
        return losses

    def _shared(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        weights: Weights | Weigh,
        measure: Rows | None,
        collect: Any,
        reach: Reach | None,
    ) -> list[Tensor]:
        """The trunk once; per head forward and backward down to the features; one backward of the trunk.

        Where the weights depend on the losses, all heads' graphs are alive at once.
        """
        autocast = self.autocast
        with autocast():
            features, structure = tree_flatten(self.model.features(batch))
        _check_features(features)
        # Heads are given detached features, at which their gradients gather.
        cuts = [f.detach().requires_grad_(f.requires_grad) if isinstance(f, Tensor) else f for f in features]
        cut_features = tree_unflatten(cuts, structure)
        pairs = {c: f for c, f in zip(cuts, features, strict=True) if isinstance(c, Tensor) and c.requires_grad}
        losses = []
        at_features: dict[str, list[Tensor | None]] = {}
        for index, task in enumerate(tasks):
            with autocast():
                loss = loss_of(task, self.model.predict(task.name, cut_features), batch)
            if measure is not None:
                self._measure(measure, task, loss, pairs)
            if reach is not None:
                reach.add(task.name, loss, pairs)
            if not callable(weights):
                self.backward([loss], [weights[index]])
                loss = loss.detach()
            losses.append(loss)
            if collect is not None:
                collect.take(task.name)
                at_features[task.name] = [cut.grad for cut in pairs]
                for cut in pairs:
                    cut.grad = None
        if callable(weights):
            self.backward(losses, weights(losses))
        if collect is not None:
            collect.take_at_features(list(pairs.values()), at_features)
        elif used := [(feature, cut.grad) for cut, feature in pairs.items() if cut.grad is not None]:
            torch.autograd.backward([f for f, _ in used], [g for _, g in used])
        return [loss.detach() for loss in losses]

    def backward(self, losses: Sequence[Tensor], weights: Weights, *, retain_graph: bool = False) -> None:
        """Takes 0-dim losses backward, each times its weight, scaled where the precision asks for it.

        Args:
            losses: with their graphs; those without are left out, since all that they reach is frozen.
            weights: one a loss: the gradient that its backward pass starts from.
            retain_graph: keeps the graphs for another backward pass.
        """
        pairs = [(loss, w) for loss, w in zip(losses, weights, strict=True) if loss.requires_grad]
        starts = [self._start(loss, weight) for loss, weight in pairs]
        if self.scaler:
            starts = [self.scaler.scale(start) for start in starts]
        if retain_graph:
            leaves([loss for loss, _ in pairs])  # which refuses graphs that can go backward only once
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

    def _measure(self, rows: Rows, task: Task, loss: Tensor, cuts: dict[Tensor, Tensor] | None = None) -> None:
        """Takes the task's row beside the backward passes, and restores the buffers."""
        buffers = Buffers(self.model)
        rows.add(task.name, loss, cuts)
        buffers.restore()


def choose(passes: str, model: MultiTaskModel) -> str:
    """The kind of passes that `passes`, which may be `auto`, means for this model.

    Raises:
        UserError: for an unknown kind, and for `shared` where there is no shared trunk.
    """
    if passes == "auto":
        return "sequential" if model.shared is None else "shared"
    if passes not in PASSES:
        raise UserError(f"passes: '{passes}' is not one of {', '.join(PASSES)}, auto")
    if passes == "shared" and model.shared is None:
        raise UserError("passes: 'shared' needs one trunk for all tasks; take auto, sequential or joint")
    return passes


def _check_features(features: Sequence[Any]) -> None:
    hidden = [type(feature).__name__ for feature in features if not isinstance(feature, LEAVES)]
    if hidden:
        raise UserError(
            f"passes: 'shared' can't look into the trunk's features, a {hidden[0]}; let the trunk give tensors, "
            "or tuples, lists or dicts of them, take a part of it with model/trunk=picked, or take passes=sequential"
        )
