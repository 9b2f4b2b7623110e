"""One step of multi-task training: clear the gradients, take each task forward and backward, move.

    step = mtl.Step(model, tasks, optimizer)
    for batch in loader:
        result = step(batch)

What happens between the first and the last line of `Step.__call__` is all there is to it; how the forward and
backward passes are arranged is in passes.py.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtl.accumulation import check_losses, cut
from mtl.accumulation import shares as shares_of
from mtl.balancers import Balancer, Equal
from mtl.balancing import Balancing
from mtl.errors import UserError, told
from mtl.features import AtFeatures
from mtl.gradients import Rows
from mtl.model import Batch, MultiTaskModel
from mtl.passes import PASSES, Autocast, Weigh, Weights, choose, generators_of, look, set_states
from mtl.task import Task

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class StepResult:
    """What one step did: 0-dim tensors on the model's device, by task name; None where it wasn't measured.

    Attributes:
        losses: each task's loss, before its weight.
        weights: what each task's gradient, over the shared parameters where the balancer's scope is these, was
            multiplied by, the task's own weight included.
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
        source: where a balancer's Gramian comes from, see features.py: `rows`, `layerwise`, `representation`, or
            `auto`: `layerwise` where that is possible, else `rows`, both exact.
        every: steps from one Gramian to the next; between them the weights stay.
        micro_batch_size: cuts each batch into parts of so many samples, of which one at a time has a graph. The
            gradient is that of the whole batch, see accumulation.py.
        num_micro_batches: into so many parts, instead.
        scheduler: steps once after each optimizer step.
        clip_norm: the norm that the summed gradient is clipped to.
        precision: `fp32`, or forward passes under autocast in `bf16` or, with gradient scaling, `fp16`.

    Raises:
        UserError: for an unknown kind of passes, source or precision, for a balancer that this step can't serve, and
            for a source that can't be used with it.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Sequence[Task],
        optimizer: Optimizer | None = None,
        *,
        balancer: Balancer | None = None,
        passes: str = "auto",
        source: str = "auto",
        every: int = 1,
        micro_batch_size: int | None = None,
        num_micro_batches: int | None = None,
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
        self.passes = choose(passes, model)
        if balancer is not None and not isinstance(balancer, Balancer):
            raise UserError(f"balancer is {balancer!r}; it must be an instance of a class in mtl.balancers")
        for name, number in (("micro_batch_size", micro_batch_size), ("num_micro_batches", num_micro_batches)):
            if number is not None and (type(number) is not int or number < 1):
                raise UserError(f"{name} is {number!r}; it must be a whole number of at least 1")
        if micro_batch_size is not None and num_micro_batches is not None:
            raise UserError("trainer.micro_batch_size and trainer.num_micro_batches: give one of the two")
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.balancing = Balancing(
            balancer or Equal(),
            self.tasks,
            passes=self.passes,
            source=source,
            every=every,
            at_once=micro_batch_size is None and num_micro_batches in (None, 1),
        )
        self._losses_checked = False
        self.scheduler = scheduler
        self.clip_norm = clip_norm
        self.parameters = dict(model.named_parameters())
        autocast_for(precision, self.device)  # an unknown precision is an error now, not in the first step
        self.precision = precision
        if optimizer is not None:
            optimizer.register_step_post_hook(self._count)
        _keep_compiled_graphs(model)
        self._taken = 0
        self._names = [task.name for task in self.tasks]
        self._draws: list[Tensor] = []  # the random state that the step began with
        self._losses: Sequence[Tensor] = ()
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

    def __call__(self, batch: Batch | list[Batch], *, measure: bool = False) -> StepResult:
        """One whole step on one batch.

        Args:
            batch: inputs and targets by name, on the model's device; or a list of micro-batches.
            measure: also measure gradient norms, cosines and reach; the parameters move the same way.
        """
        result = self.backward(batch, measure=measure)
        self.update(result)
        if result.taken:
            self.after(batch)
        return result

    def backward(self, batch: Batch | list[Batch], *, measure: bool = False) -> StepResult:
        """Clears the gradients and leaves the weighted sum of the tasks' gradients in `.grad`.

        For loops that clip and step by themselves; in fp16 the gradients are still scaled, and `update` is the way to
        go on. Arguments as for a whole step.
        """
        for parameter in self.parameters.values():
            parameter.grad = None
        parts, shares = self._parts_of(batch)
        balancing = self.balancing
        scale = self.scaler.get_scale() if self.scaler and (measure or balancing.collects) else 1.0
        rows: Any = self._rows(scale, at_once=len(parts) == 1) if balancing.collects else None
        beside = None
        if measure and (rows is None or not balancing.fresh or balancing.source == "representation"):
            # Beside the training's own passes, which the scaler looks after, a smaller factor leaves half losses room.
            beside = Rows(self.parameters, self._names, scale=min(scale, 2.0**12))
        if balancing.balancer.looks_back:
            self._draws = [generator.get_state() for generator in generators_of(self.model)]
        weights = balancing.loss_weights(self.device)
        if len(parts) == 1:
            losses = self._passes(self.tasks, parts[0], weights, beside, rows)
        else:
            losses = self._accumulate(parts, shares, weights, beside, rows)
        self._losses = losses
        result = StepResult(dict(zip(self._names, losses, strict=True)), {})
        if measure:
            measured = beside or rows
            result.grad_norms, result.cosines, result.reach = measured.norms(), measured.cosines(), measured.reach()
        if rows is not None:
            balancing.balance(rows, losses, may_overflow=self.scaler is not None)
        result.weights = balancing.applied(losses[0].device)
        if measure:
            result.total_norm = self._total_norm() / scale
        return result

    def _passes(
        self, tasks: Sequence[Task], batch: Batch, weights: Weights | Weigh, measure: Rows | None, collect: Any
    ) -> list[Tensor]:
        return PASSES[self.passes](
            self.model,
            tasks,
            batch,
            weights,
            backward=self._backward,
            autocast=self.autocast,
            measure=measure,
            collect=collect,
        )

    def _accumulate(
        self,
        parts: Sequence[Batch],
        shares: Sequence[Sequence[float]],
        weights: Weights | Weigh,
        measure: Rows | None,
        collect: Rows | None,
    ) -> list[Tensor]:
        """The passes of one micro-batch after the other, each loss times its part's share; the whole batch's losses."""
        if not self._losses_checked:
            for part in parts:
                check_losses(self.model, self.tasks, part, self.autocast)
            self._losses_checked = True
        if callable(weights):
            weights = weights(self._look(parts, shares))
        known = weights

        def passes(part: Batch, row: Sequence[float], present: Sequence[int]) -> Sequence[Tensor]:
            for rows in (measure, collect):
                if rows is not None:
                    rows.shares = dict(zip(self._names, row, strict=True))
            tasks = [self.tasks[i] for i in present]
            losses = self._passes(tasks, part, [known[i] * row[i] for i in present], measure, collect)
            if collect is not None:
                collect.settle()
            return losses

        return self._summed(parts, shares, passes)

    def _parts_of(self, batch: Batch | list[Batch]) -> tuple[list[Batch], list[list[float]]]:
        """The batch's micro-batches, and each one's share in each task's loss."""
        if isinstance(batch, list):
            parts = batch
        elif self.micro_batch_size is not None or self.num_micro_batches is not None:
            parts = cut(batch, size=self.micro_batch_size, count=self.num_micro_batches)
        else:
            parts = [batch]
        return parts, shares_of(self.tasks, parts) if len(parts) > 1 else [[1.0] * len(self.tasks)]

    def _look(self, parts: Sequence[Batch], shares: Sequence[Sequence[float]]) -> list[Tensor]:
        """The whole batch's losses without gradients; random state and buffers stay as they are."""

        def looked(part: Batch, row: Sequence[float], present: Sequence[int]) -> Sequence[Tensor]:
            return look(self.model, [self.tasks[i] for i in present], part, self.autocast)

        return self._summed(parts, shares, looked)

    def _summed(
        self,
        parts: Sequence[Batch],
        shares: Sequence[Sequence[float]],
        take: Callable[[Batch, Sequence[float], Sequence[int]], Sequence[Tensor]],
    ) -> list[Tensor]:
        """The whole batch's losses: those that `take` gives for each part and the tasks present in it, by its share."""
        losses = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in self.tasks]
        for part, row in zip(parts, shares, strict=True):
            present = [index for index, share in enumerate(row) if share]
            for index, loss in zip(present, take(part, row, present), strict=True):
                losses[index] = losses[index] + row[index] * loss
        return losses

    def _rows(self, scale: float, *, at_once: bool) -> Rows:
        if self.passes == "shared":
            source = self.balancing.source if at_once else self.balancing.source_in_parts()
            return AtFeatures(self.model, self._names, source=source, scale=scale)
        return Rows(self.parameters, self._names, scale=scale)

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
        part: Any = self.optimizer
        try:
            if scaler:
                scaler.step(self.optimizer)
                scaler.update()
            else:
                self.optimizer.step()
            result.taken = self._taken > before
            if self.scheduler is not None and result.taken:
                part = self.scheduler
                part.step()
        except (TypeError, ValueError, ArithmeticError) as error:
            name = type(part).__name__
            raise UserError(f"{name} failed in its step: {told(error)}. Look at its arguments") from error

    def after(self, batch: Batch | list[Batch]) -> None:
        """What a balancer does after the parameters have moved: some look at the losses again."""
        self.balancing.after(self._losses, lambda: self._look_again(batch))

    def epoch_end(self) -> None:
        """Tells the balancer that an epoch is over: some compare epochs, and do nothing unless this is called."""
        self.balancing.balancer.epoch_end()

    def _look_again(self, batch: Batch | list[Batch]) -> Sequence[Tensor]:
        """The losses now, with the draws that the step began with: what they change by is the step's doing alone."""
        generators = generators_of(self.model)
        draws = [generator.get_state() for generator in generators]
        set_states(generators, self._draws)
        losses = self._look(*self._parts_of(batch))
        set_states(generators, draws)
        return losses

    def _count(self, *_: Any) -> None:
        """Called by the optimizer when it has stepped; a scaler doesn't say that it skipped a step."""
        self._taken += 1

    def _backward(self, losses: Sequence[Tensor], weights: Weights, *, retain_graph: bool = False) -> None:
        """Takes the weighted losses backward: a weight is the gradient that a loss's backward starts from."""
        pairs = [(loss, w) for loss, w in zip(losses, weights, strict=True) if loss.requires_grad]  # else all is frozen
        starts = [self._start(loss, weight) for loss, weight in pairs]
        if self.scaler:
            starts = [self.scaler.scale(start) for start in starts]
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

    def _total_norm(self) -> Tensor:
        gradients = [
            p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            for p in self.parameters.values()
            if p.grad is not None
        ]
        return get_total_norm(gradients) if gradients else torch.zeros((), device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """States of optimizer, scheduler, scaler and balancer, and the weights that serve until the next Gramian."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in {**parts, "balancing": self.balancing}.items() if part is not None}


def _keep_compiled_graphs(model: MultiTaskModel) -> None:
    """Lets compiled modules go backward several times, as measuring and balancing do."""
    if any(getattr(m, "_compiled_call_impl", None) or type(m).__name__ == "OptimizedModule" for m in model.modules()):
        import torch._functorch.config as compilation

        compilation.donated_buffer = False


def autocast_for(precision: str, device: torch.device) -> Autocast:
    """Makes the context that forward passes of this precision run in.

    Raises:
        UserError: for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: '{precision}' is not one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return partial(torch.autocast, device.type, dtype) if dtype else nullcontext
