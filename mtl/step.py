"""One step of multi-task training: clear the gradients, take each task forward and backward, move.

    step = mtl.Step(model, tasks, optimizer)
    for batch in loader:
        result = step(batch)

What happens between the first and the last line of `Step.__call__` is all there is to it; how the forward and
backward passes are arranged is in passes.py.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtl.balancers import Balancer, Equal
from mtl.errors import UserError
from mtl.gradients import Rows
from mtl.model import Batch, MultiTaskModel
from mtl.passes import PASSES, Autocast, choose
from mtl.task import Task

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class StepResult:
    """What one step did: 0-dim tensors on the model's device, by task name; None where it wasn't measured.

    Attributes:
        losses: each task's loss, before its weight.
        weights: what each task's gradient was multiplied by, the task's own weight included.
        grad_norms: the norm of each unweighted loss's gradient over all the parameters it reaches.
        cosines: by pair of names, between the two tasks' gradients over the shared parameters.
        total_norm: of the summed gradient that the optimizer was to get, before clipping.
        reach: from each parameter's name to the tasks that reach it.
        taken: whether the parameters moved; False where fp16 gradients overflowed.
    """

    losses: dict[str, Tensor]
    weights: dict[str, Tensor]
    grad_norms: dict[str, Tensor] | None = None
    cosines: dict[tuple[str, str], Tensor] | None = None
    total_norm: Tensor | None = None
    reach: dict[str, tuple[str, ...]] | None = None
    taken: bool = True


class Step:
    """The multi-task training step, for a trainer's or anybody's own loop.

    Args:
        model: trunk and heads.
        tasks: those that take part, in the order in which their passes go.
        optimizer: over the model's parameters; None where only `backward` and `after` are used.
        balancer: gives the tasks' weights.
        passes: `joint`, `sequential`, `shared`, or `auto`, see passes.py.
        scheduler: steps once after each optimizer step.
        clip_norm: the norm that the summed gradient is clipped to.
        precision: `fp32`, or forward passes under autocast in `bf16` or, with gradient scaling, `fp16`.

    Raises:
        UserError: for an unknown kind of passes or precision, or a balancer that this step can't serve.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Sequence[Task],
        optimizer: Optimizer | None = None,
        *,
        balancer: Balancer | None = None,
        passes: str = "auto",
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        precision: str = "fp32",
    ) -> None:
        if not tasks:
            raise UserError("a step needs at least one task")
        strangers = [task.name for task in tasks if task.name not in model.heads]
        if strangers:
            raise UserError(f"the model has no task '{strangers[0]}'; it has: {', '.join(model.heads)}")
        self.model = model
        self.tasks = list(tasks)
        self.optimizer = optimizer
        self.balancer = balancer or Equal()
        if self.balancer.needs not in ("nothing", "gramian"):
            raise UserError(
                f"balancer {type(self.balancer).__name__}: needs is '{self.balancer.needs}', not nothing or gramian"
            )
        self.passes = choose(passes, model)
        self.scheduler = scheduler
        self.clip_norm = clip_norm
        self.parameters = dict(model.named_parameters())
        autocast_for(precision, self.device)  # an unknown precision is an error now, not in the first step
        self.precision = precision
        if optimizer is not None:
            optimizer.register_step_post_hook(self._count)
        self._taken = 0
        self._names = [task.name for task in self.tasks]
        self._own = torch.tensor([task.weight for task in self.tasks], dtype=torch.float64)
        unknown = torch.full_like(self._own, torch.nan)
        constant = (
            self.balancer.weights(unknown, None) if self.balancer.needs == "nothing" else torch.ones_like(self._own)
        )
        self._weights = (self._own * constant).tolist()
        self._on_device: tuple[torch.device, dict[str, Tensor]] | None = None
        self._starts: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.parameters.values())).device

    @property
    def autocast(self) -> Autocast:
        """Makes the context that forward passes run in."""
        return autocast_for(self.precision, self.device)

    @cached_property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What keeps fp16 gradients from underflowing; made when it is first needed, where the model is by then."""
        return torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    def __call__(self, batch: Batch, *, measure: bool = False) -> StepResult:
        """One whole step on one batch.

        Args:
            batch: inputs and targets by name, on the model's device.
            measure: also measure gradient norms, cosines and reach; the parameters move the same way.
        """
        result = self.backward(batch, measure=measure)
        self.update(result)
        self.after(batch)
        return result

    def backward(self, batch: Batch, *, measure: bool = False) -> StepResult:
        """Clears the gradients and leaves the weighted sum of the tasks' gradients in `.grad`.

        For loops that clip and step by themselves; in fp16 the gradients are still scaled, and `update` is the way to
        go on. Arguments as for a whole step.
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        collect = self.balancer.needs == "gramian" and len(self.tasks) > 1  # one task alone is plain training
        scale = self.scaler.get_scale() if self.scaler and (measure or collect) else 1.0
        # Beside the training's own passes, which the scaler looks after, a smaller factor leaves half losses room.
        rows = Rows(self.parameters, scale=scale if collect else min(scale, 2.0**12)) if measure or collect else None
        losses = PASSES[self.passes](
            self.model,
            self.tasks,
            batch,
            [1.0] * len(self.tasks) if collect else self._weights,
            backward=self._backward,
            autocast=self.autocast,
            measure=None if collect else rows,
            collect=rows if collect else None,
        )
        result = StepResult(dict(zip(self._names, losses, strict=True)), self._applied(losses[0].device))
        if rows and measure:
            result.grad_norms, result.cosines, result.reach = rows.norms(), rows.cosines(), rows.reach()
        if rows and collect:
            weights = self._balance(losses, rows)
            rows.combine(weights.tolist(), self._own.tolist())
            result.weights = dict(zip(self._names, weights.to(losses[0].device, torch.float32), strict=True))
        if measure:
            result.total_norm = self._total_norm() / scale
        return result

    def _balance(self, losses: Sequence[Tensor], rows: Rows) -> Tensor:
        """The balancer's weights times the tasks' own, (T,), float64, on the CPU.

        Raises:
            UserError: for a gradient that isn't finite, unless that is an overflow that the scaler skips.
        """
        own = self._own
        gramian = rows.gramian().cpu()
        finite = gramian.diagonal().isfinite()
        if not finite.all():
            if self.scaler:
                return own
            named = ", ".join(
                f"'{name}'" for name, right in zip(self._names, finite.tolist(), strict=True) if not right
            )
            raise UserError(f"the gradient of task {named} is not finite, so the tasks can't be balanced")
        return own * self.balancer.weights(own * torch.stack(list(losses)).double().cpu(), gramian * own.outer(own))

    def update(self, result: StepResult) -> None:
        """Unscales, clips, and steps optimizer and scheduler, each once. A step that overflowed moves nothing."""
        assert self.optimizer is not None, "a Step without an optimizer has backward and after only"
        scaler = self.scaler if any(p.grad is not None for p in self.parameters.values()) else None
        if scaler:
            scaler.unscale_(self.optimizer)
        if self.clip_norm is not None:
            total = self._total_norm()
            clip_grads_with_norm_(self.parameters.values(), self.clip_norm, total)
            result.total_norm = total
        before = self._taken
        if scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        result.taken = self._taken > before
        if self.scheduler is not None and result.taken:
            self.scheduler.step()

    def after(self, batch: Batch) -> None:
        """What a balancer does after the parameters have moved; those there are do nothing."""

    def _count(self, *_: Any) -> None:
        """Called by the optimizer when it has stepped; a scaler doesn't say that it skipped a step."""
        self._taken += 1

    def _backward(self, losses: Sequence[Tensor], weights: Sequence[float], *, retain_graph: bool = False) -> None:
        """Takes the weighted losses backward: a weight is the gradient that a loss's backward starts from."""
        pairs = [(loss, w) for loss, w in zip(losses, weights, strict=True) if loss.requires_grad]  # else all is frozen
        starts = [self._start(loss, weight) for loss, weight in pairs]
        if self.scaler:
            starts = [self.scaler.scale(start) for start in starts]
        if pairs:
            torch.autograd.backward([loss for loss, _ in pairs], starts, retain_graph=retain_graph)

    def _applied(self, device: torch.device) -> dict[str, Tensor]:
        if self._on_device is None or self._on_device[0] != device:
            self._on_device = device, dict(zip(self._names, torch.tensor(self._weights, device=device), strict=True))
        return self._on_device[1].copy()

    def _start(self, loss: Tensor, weight: float) -> Tensor:
        key = (weight, loss.dtype, loss.device)
        if key not in self._starts:
            self._starts[key] = torch.tensor(weight, dtype=loss.dtype, device=loss.device)
        return self._starts[key]

    def _total_norm(self) -> Tensor:
        gradients = [
            p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            for p in self.parameters.values()
            if p.grad is not None
        ]
        return get_total_norm(gradients) if gradients else torch.zeros((), device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """States of optimizer, scheduler, scaler and balancer."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in {**parts, "balancer": self.balancer}.items() if part is not None}


def autocast_for(precision: str, device: torch.device) -> Autocast:
    """Makes the context that forward passes of this precision run in.

    Raises:
        UserError: for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: '{precision}' is not one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return partial(torch.autocast, device.type, dtype) if dtype else nullcontext
