"""One step of multi-task training: clear the gradients, take each task forward and backward, move.

    step = mtl.Step(model, tasks, optimizer)
    for batch in loader:
        result = step(batch)

What happens between the first and the last line of `Step.__call__` is all there is to it; how the forward and
backward passes are arranged is in passes.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtl.balancers import Balancer, Equal
from mtl.errors import NotFinite, UserError
from mtl.gradients.at_features import AtFeatures
from mtl.gradients.compiled import reusable_graphs
from mtl.gradients.reach import Reach
from mtl.gradients.rows import Rows, total_norm
from mtl.model import MultiTaskModel
from mtl.snapshots import kept_buffers
from mtl.step.balancing import Balancing
from mtl.step.before import Before
from mtl.step.lazy import check_not_lazy
from mtl.step.micro_batches import Parts, StepBatch
from mtl.step.passes import choose, generators_of, kept_draws, set_states
from mtl.step.precision import Autocast, autocast_for
from mtl.step.runner import Runner
from mtl.step.update import Descent
from mtl.step.whole_batch import Look
from mtl.task import Task

ON_NONFINITE = ("error", "skip_task", "skip_step")
INTERVALS = ("step", "epoch")


@dataclass
class StepResult:
    """What one step did: 0-dim tensors on the model's device, by task name; None where it wasn't measured.

    Attributes:
        losses: each task's loss, before its weight; a task without labels in the step isn't there.
        weights: what each task's gradient, over the shared parameters where the balancer's scope is these, was
            multiplied by, the task's own weight included.
        grad_norms: the norm of each unweighted loss's gradient over all the parameters it reaches.
        cosines: by pair of names, between the two tasks' gradients over the shared parameters.
        total_norm: of the summed gradient that the optimizer was to get, before clipping.
        reach: from each parameter's name to the tasks that reach it.
        taken: whether the parameters moved; False where fp16 gradients overflowed, the step was skipped, or no task had
            labels in it.
        nonfinite: from the names of tasks that were left out of the step to what wasn't finite.
    """

    losses: dict[str, Tensor]
    weights: dict[str, Tensor]
    grad_norms: dict[str, Tensor] | None = None
    cosines: dict[tuple[str, str], Tensor] | None = None
    total_norm: Tensor | None = None
    reach: dict[str, tuple[str, ...]] | None = None
    taken: bool = True
    nonfinite: dict[str, str] = field(default_factory=dict)


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
        scheduler: of the learning rate.
        interval: when the scheduler steps: after each optimizer `step`, or after each `epoch`, in `epoch_end`;
            `ReduceLROnPlateau` then does in `validated`.
        clip_norm: the norm that the summed gradient is clipped to.
        clip_shared_norm: the norm that the summed gradient over the shared parameters is clipped to, before
            `clip_norm`; heads stay as they are. Shared are parameters that at least two tasks have reached, in this
            step or an earlier one. FAMO, FairGrad and Nash-MTL do so at 1 in their authors' code.
        precision: `fp32`, or forward passes under autocast in `bf16` or, with gradient scaling, `fp16`.
        on_nonfinite: what is done about a loss or gradient that isn't finite. `error` where a balancer looks at them;
            otherwise they go into the parameters, and it is for whoever reads the losses to see. `skip_step` moves
            nothing: parameters, optimizer, balancer, buffers, random state. `skip_task` makes the step as if the task
            had no labels in it. The skips look at every step, which makes the CPU wait for a GPU.
        then: from how many steps on which other optimizer takes over, without the scheduler. It may be
            `torch.optim.LBFGS`, whose line search looks at the batch's loss again and again, the weights held fixed and
            multiplying heads too, without clipping. It takes curvature from one step to the next: batches, and with a
            balancer weights, that differ much spoil it; large batches or fixed points serve it best.

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
        interval: str = "step",
        clip_norm: float | None = None,
        clip_shared_norm: float | None = None,
        precision: str = "fp32",
        on_nonfinite: str = "error",
        then: tuple[int, Optimizer] | None = None,
    ) -> None:
        if not tasks:
            raise UserError("a step needs at least one task")
        strangers = [task.name for task in tasks if task.name not in model.heads]
        if strangers:
            raise UserError(f"the model has no task '{strangers[0]}'; it has: {', '.join(model.heads)}")
        check_not_lazy(model)
        self.model = model
        self.tasks = list(tasks)
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
        if on_nonfinite not in ON_NONFINITE:
            raise UserError(f"on_nonfinite: '{on_nonfinite}' is not one of {', '.join(ON_NONFINITE)}")
        self.on_nonfinite = on_nonfinite
        self.parameters = dict(model.named_parameters())
        if interval not in INTERVALS:
            raise UserError(f"interval: '{interval}' is not one of {', '.join(INTERVALS)}")
        for name, limit in (("clip_norm", clip_norm), ("clip_shared_norm", clip_shared_norm)):
            if limit is not None and not limit > 0:
                raise UserError(f"trainer.{name} is {limit}; it must be above 0, or None")
        self.descent = Descent(
            self.parameters,
            optimizer,
            scheduler=scheduler,
            interval=interval,
            clip_norm=clip_norm,
            clip_shared_norm=clip_shared_norm,
            then=then,
        )
        if self.descent.waits_for_validation and interval == "step":
            raise UserError(
                "scheduler: ReduceLROnPlateau waits for figures on validation, which come once an epoch; set its "
                "interval to epoch"
            )
        self._reach = None if clip_shared_norm is None else Reach(self.parameters)
        autocast_for(precision, self.device)  # an unknown precision is an error now, not in the first step
        self.precision = precision
        self.runner = Runner(model, self.passes, self.autocast)
        for each in self.descent.optimizers:
            if isinstance(each, LBFGS):
                self._check_search(each, alone=clip_shared_norm is not None and each is self.descent.first)
        self._learned = self.balancing.parameters(next(iter(self.parameters.values())))
        self._check_learned()
        self._before: Before | None = None
        self._losses: Sequence[Tensor] = ()  # the last step's, of the tasks in it
        self._took_part: Sequence[Task] = ()
        self._searched: Parts | None = None  # what a line search looks at
        self._shares: Sequence[Sequence[float]] = ()

    @property
    def optimizer(self) -> Optimizer | None:
        """The one at work."""
        return self.descent.optimizer

    @property
    def num_taken(self) -> int:
        """Optimizer steps taken."""
        return self.descent.num_taken

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

    def __call__(self, batch: StepBatch, *, measure: bool = False) -> StepResult:
        """One whole step on one batch.

        Args:
            batch: inputs and targets by name, on the model's device; by task name a batch each, where they have their
                own; or a list of micro-batches.
            measure: also measure gradient norms, cosines and reach; the parameters move the same way.
        """
        result = self.backward(batch, measure=measure)
        self.update(result)
        if result.taken:
            self.after(batch)
        return result

    @reusable_graphs()
    def backward(self, batch: StepBatch, *, measure: bool = False) -> StepResult:
        """Clears the gradients and leaves the weighted sum of the tasks' gradients in `.grad`.

        For loops that clip and step by themselves; in fp16 the gradients are still scaled, and `update` is the way to
        go on. Arguments as for a whole step.
        """
        self.descent.moving = False
        self.model.thaw(self.num_taken)
        parts = self._parts_of(batch)
        faded = {t.name: 0 for t in self.tasks if callable(t.weight) and t.weight_at(self.num_taken) == 0}
        parts = parts.without(faded) if faded else parts
        self._before = Before(self.model, self.balancing, self.runner.checks)
        if self.on_nonfinite == "error":
            return self._take(parts, measure)
        return self._take_what_is_finite(parts, measure)

    def undo(self) -> bool:
        """Puts back what the last step changed before it moved the parameters, for one that didn't get to move them.

        Returns:
            Whether everything is now as it was before the step: not where parameters may have moved, or a balancer
            that works on rows has taken these in.
        """
        self._clear()
        if self._before is None or self.descent.moving:
            return False
        self._before.restore()
        return not (self.balancing.needs == "rows" and self.balancing.answered)

    def _clear(self) -> None:
        for parameter in (*self.parameters.values(), *self._learned):
            parameter.grad = None

    def param_groups(self, *, first: bool = False) -> list[dict[str, Any]]:
        """Those of the optimizer at work, or of the first one."""
        optimizer = self.descent.first if first else self.optimizer
        return [] if optimizer is None else optimizer.param_groups

    def _take(self, parts: Parts, measure: bool) -> StepResult:
        """The passes of the tasks that have labels in the step, and their balance."""
        self._clear()
        here = parts.present()
        if not here:
            return StepResult({}, {}, taken=False)
        parts = parts.of_tasks(here)
        balancing = self.balancing
        balancing.begin(here, self.num_taken)
        scale = self.scaler.get_scale() if self.scaler and (measure or balancing.collects) else 1.0
        rows: Any = self._rows(parts.names, scale, at_once=len(parts) == 1) if balancing.collects else None
        beside = None
        if measure and (rows is None or not balancing.fresh or balancing.source == "representation"):
            # Beside the training's own passes, which the scaler looks after, a smaller factor leaves half losses room.
            beside = Rows(self.parameters, parts.names, scale=min(scale, 2.0**12))
        if self._reach is not None:
            self._reach.begin()
        losses = self._run(parts, balancing.loss_weights(self.device), beside, rows, self._reach)
        self._losses, self._took_part, self._shares = losses, parts.tasks, parts.shares
        self._searched = parts if isinstance(self.optimizer, LBFGS) else None
        result = StepResult(dict(zip(parts.names, losses, strict=True)), {})
        if measure:
            measured = beside or rows
            result.grad_norms, result.cosines, result.reach = measured.norms(), measured.cosines(), measured.reach()
        if rows is not None:
            alone = self.model.thaws
            balancing.balance(rows, losses, may_overflow=self.scaler is not None, alone_for_now=alone)
        if self._learned:
            balancing.learn(losses)
            for parameter in self._learned:
                if parameter.grad is not None and self.scaler:
                    parameter.grad = self.scaler.scale(parameter.grad)
        result.weights = balancing.applied(losses[0].device)
        if measure:
            result.total_norm = total_norm(self.parameters.values()) / scale
        return result

    def _take_what_is_finite(self, parts: Parts, measure: bool) -> StepResult:
        """The same without the tasks whose loss or gradient isn't finite, or, to skip the step, not at all."""
        found: dict[str, str] = {}
        while True:
            try:
                result = self._take(parts, measure)
                more = self._not_finite(result, parts)
            except NotFinite as error:
                more = error.found
            if not more:
                result.nonfinite = found
                return result
            self.undo()
            found |= more
            parts = parts.without(found)
            if self.on_nonfinite == "skip_step":
                return StepResult({}, {}, nonfinite=found, taken=False)

    def _not_finite(self, result: StepResult, parts: Parts) -> dict[str, str]:
        """By task, what isn't finite in the step; gradients that overflow in fp16 are the scaler's business."""
        if not result.losses:
            return {}
        at_hand = [*result.losses.values(), total_norm(self.parameters.values())]
        *losses, norm = torch.stack([tensor.double() for tensor in at_hand]).tolist()
        found = {n: f"its loss is {x}" for n, x in zip(result.losses, losses, strict=True) if not math.isfinite(x)}
        if found or self.scaler or math.isfinite(norm):
            return found
        self.undo()
        rows = Rows(self.parameters, list(result.losses))
        parts = parts.of_tasks(parts.present())
        self._run(parts, [1.0] * len(parts.tasks), rows, None)
        norms = dict(zip(result.losses, torch.stack(list(rows.norms().values())).tolist(), strict=True))
        named = [name for name, norm in norms.items() if not math.isfinite(norm)] or list(norms)
        return dict.fromkeys(named, "its gradient is not finite")

    @property
    def _run(self) -> Runner:
        """What takes parts forward and backward, where the model and the scaler are by now."""
        self.runner.autocast = self.autocast
        self.runner.scaler = self.scaler
        return self.runner

    def _parts_of(self, batch: StepBatch) -> Parts:
        return Parts.of(self.tasks, batch, size=self.micro_batch_size, count=self.num_micro_batches)

    def _rows(self, names: Sequence[str], scale: float, *, at_once: bool) -> Rows:
        if self.passes == "shared":
            source = self.balancing.source if at_once else self.balancing.source_in_parts()
            return AtFeatures(self.model, names, source=source, scale=scale)
        return Rows(self.parameters, names, scale=scale)

    def update(self, result: StepResult) -> None:
        """Unscales, clips, and steps optimizer and scheduler, each once.

        A step that overflowed, was skipped, or in which no task took part moves nothing.
        """
        if not result.losses:
            return
        search = None
        if self._searched is not None:
            search = partial(self._search, self._searched, self.balancing.current())
        before = self.num_taken
        norm = self.descent(self.scaler, search, self._reach.shared() if self._reach else ())
        result.total_norm = result.total_norm if norm is None else norm
        result.taken = self.num_taken > before

    def after(self, batch: StepBatch) -> None:
        """What a balancer does after the parameters have moved: some look at the losses again."""
        self.balancing.after(self._losses, lambda: self._look_again(batch))

    def epoch_end(self) -> None:
        """Ends an epoch: some balancers compare epochs, and a scheduler whose interval is `epoch` steps."""
        self.balancing.balancer.epoch_end()
        self.descent.epoch_end()

    def validated(self, value: float) -> None:
        """Steps a `ReduceLROnPlateau`; other schedulers don't follow figures on validation.

        Args:
            value: the figure that it follows.
        """
        self.descent.epoch_end(value)

    @reusable_graphs()
    def _look_again(self, batch: StepBatch) -> Sequence[Tensor]:
        """The losses now, with the draws that the step began with: what they change by is the step's doing alone."""
        assert self._before is not None
        with kept_draws(self.model):
            set_states(generators_of(self.model), self._before.draws)
            parts = Parts(self._took_part, self._parts_of(batch).batches, self._shares)
            return Look(self.model, parts, self.autocast).losses

    @reusable_graphs()
    def _search(self, parts: Parts, weights: Sequence[float]) -> Any:
        """The weighted loss as the parameters are now, with its gradient in `.grad`; a line search asks for both."""
        assert self._before is not None
        for parameter in self.parameters.values():
            parameter.grad = None
        set_states(generators_of(self.model), self._before.draws)
        with kept_buffers(self.model):
            losses = self._run(parts, list(weights), None, None)
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()

    def _check_search(self, optimizer: Optimizer, *, alone: bool) -> None:
        name = type(self.balancing.balancer).__name__
        if alone:
            raise UserError(
                f"trainer.clip_shared_norm: {type(optimizer).__name__} searches along the loss by its gradient as it "
                "is, and nothing would be clipped; leave it at null"
            )
        if self.balancing.needs == "rows":
            raise UserError(
                f"optimizer: {type(optimizer).__name__} searches along the weighted loss, and the balancer {name} "
                "works on the gradients themselves; take one that gives weights"
            )
        if self.precision == "fp16":
            raise UserError(
                f"precision: fp16 scales gradients, and {type(optimizer).__name__} can't be told; take bf16"
            )

    def _check_learned(self) -> None:
        """Raises a UserError where an optimizer doesn't move what the balancer has for it."""
        name = type(self.balancing.balancer).__name__
        for each in self.descent.optimizers if self._learned else ():
            if isinstance(each, LBFGS):
                raise UserError(
                    f"balancer.optimizer: LBFGS searches along a loss that has no parameters of {name}; take own"
                )
            moved = {parameter for group in each.param_groups for parameter in group["params"]}
            if not moved.issuperset(self._learned):
                raise UserError(
                    f"the balancer {name} has optimizer='model', and its parameters are not in {type(each).__name__}; "
                    f"give it [*model.parameters(), *balancer.parameters({len(self.tasks)})]"
                )

    def state_dict(self) -> dict[str, Any]:
        """The steps taken, states of optimizer, scheduler, scaler and balancer, and weights that serve on."""
        counters = {"num_taken": self.num_taken, "checked": self.runner.checks.state_dict()}
        return {**counters, **{name: part.state_dict() for name, part in self._parts().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        for name, part in self._parts().items():
            if name != "reach" or name in state:  # not there where the run began without clip_shared_norm
                part.load_state_dict(state[name])
        self.descent.resume(state["num_taken"])
        self.runner.checks.load_state_dict(state["checked"])

    def _parts(self) -> dict[str, Any]:
        scaler = {"scaler": self.scaler} if self.scaler else {}
        reach = {"reach": self._reach} if self._reach else {}
        return {**self.descent.parts(), **scaler, **reach, "balancing": self.balancing}
