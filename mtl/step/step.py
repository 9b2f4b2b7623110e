"""One step of multi-task training: clear the gradients, take each task forward and backward, move the parameters.

    step = mtl.Step(model, tasks, optimizer)
    for batch in loader:
        result = step(batch)

`Step.__call__` and `Step._take` are the whole step; passes.py has the forward and backward passes of one micro-batch,
and accumulation.py the loop over several.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from mtl.balancers import Balancer, Equal
from mtl.errors import NotFinite
from mtl.gradients.at_features import AtFeatures
from mtl.gradients.reach import Reach
from mtl.gradients.rows import Rows, total_norm
from mtl.model import MultiTaskModel
from mtl.snapshots import Snapshot, preserved_buffers, preserved_random_state
from mtl.step.accumulation import accumulate
from mtl.step.balancing import Balancing
from mtl.step.compatibility import check_arguments, check_optimizers
from mtl.step.descent import Descent
from mtl.step.gradient_source import source_in_micro_batches
from mtl.step.loss_checks import LossChecks
from mtl.step.micro_batches import MicroBatches, StepBatch
from mtl.step.passes import Passes, Weigh, Weights
from mtl.step.result import StepResult
from mtl.step.settings import Gradients, Update
from mtl.step.whole_batch import Preview
from mtl.task import Task


@contextmanager
def _reusable_graphs() -> Iterator[None]:
    """What torch.compile compiles within keeps its saved tensors, since a step may go backward several times."""
    before = functorch.donated_buffer
    functorch.donated_buffer = False
    try:
        yield
    finally:
        functorch.donated_buffer = before


class Step:
    """The multi-task training step, for a trainer's or anybody's own loop.

    Args:
        model: trunk and heads.
        tasks: those that take part, in the order in which their passes go.
        optimizer: over the model's parameters; None where only `backward` and `after` are used.
        balancer: gives the tasks' weights; equal ones by default.
        passes: `joint`, `sequential`, `shared`, or `auto`, see passes.py.
        gradients: where a balancer's Gramian comes from, and how often.
        micro_batch_size: cuts each batch into micro-batches of so many samples, of which one at a time has a graph. The
            gradient is that of the whole batch, see accumulation.py.
        num_micro_batches: cuts each batch into so many micro-batches, instead.
        update: learning rate schedule, clipping, and another optimizer that takes over.
        precision: `fp32`, or forward passes under autocast in `bf16` or, with gradient scaling, `fp16`.
        on_nonfinite: what is done about a loss or gradient that isn't finite. `error` where a balancer looks at them;
            otherwise they go into the parameters, and it is for whoever reads the losses to see. `skip_step` moves
            nothing: parameters, optimizer, balancer, buffers, random state. `skip_task` makes the step as if the task
            had no labels in it. The skips look at every step, which makes the CPU wait for a GPU.

    Raises:
        UserError: for an unknown kind of passes or precision, and for settings that can't go together.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tasks: Sequence[Task],
        optimizer: Optimizer | None = None,
        *,
        balancer: Balancer | None = None,
        passes: str = "auto",
        gradients: Gradients = Gradients(),  # noqa: B008  # frozen
        micro_batch_size: int | None = None,
        num_micro_batches: int | None = None,
        update: Update = Update(),  # noqa: B008
        precision: str = "fp32",
        on_nonfinite: str = "error",
    ) -> None:
        check_arguments(model, tasks, balancer, micro_batch_size, num_micro_batches, on_nonfinite)
        self.model = model
        self.tasks = list(tasks)
        self.passes = Passes(model, passes, precision)
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.on_nonfinite = on_nonfinite
        self.parameters = dict(model.named_parameters())
        at_once = micro_batch_size is None and num_micro_batches in (None, 1)
        self.balancing = Balancing(balancer or Equal(), self.tasks, gradients, passes=self.passes.kind, at_once=at_once)
        self.descent = Descent(self.parameters, optimizer, update)
        self.checks = LossChecks(model)
        self._reach = None if update.clip_shared_norm is None else Reach(self.parameters)
        self._learned = self.balancing.parameters(next(iter(self.parameters.values())))
        check_optimizers(
            self.descent, self.balancing, self._learned, precision=precision, clips_shared=self._reach is not None
        )
        self._before: Snapshot | None = None
        self._last: tuple[list[str], list[list[float]]] = [], []  # the last step's tasks, and their shares
        self._losses: Sequence[Tensor] = ()  # of these
        self._searched: MicroBatches | None = None  # what a line search evaluates

    @property
    def optimizer(self) -> Optimizer | None:
        """The one at work."""
        return self.descent.optimizer

    @property
    def num_taken(self) -> int:
        """Optimizer steps taken."""
        return self.descent.num_taken

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What keeps fp16 gradients from underflowing; None in other precisions."""
        return self.passes.scaler

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

    @_reusable_graphs()
    def backward(self, batch: StepBatch, *, measure: bool = False) -> StepResult:
        """Clears the gradients and leaves the weighted sum of the tasks' gradients in `.grad`.

        For loops that clip and step by themselves; in fp16 the gradients are still scaled, and `update` is the way to
        go on. Arguments as for a whole step.
        """
        self.descent.moving = False
        if self.model.frozen_until:
            self.model.thaw(self.num_taken)
        micro_batches = self._cut(batch)
        others: list[Any] = [self.checks] if len(micro_batches.batches) > 1 else []
        if self.balancing.needs not in ("nothing", "rows"):  # the state of one on rows is as large as the rows
            others.append(self.balancing)
        self._before = Snapshot(self.model, others=others)
        if self.on_nonfinite == "error":
            return self._take(micro_batches, measure)
        return self._take_what_is_finite(micro_batches, measure)

    def _cut(self, batch: StepBatch) -> MicroBatches:
        """The step's micro-batches, without tasks that have no labels in it or whose weight is 0 for now."""
        now = self.num_taken
        faded = {t.name: 0 for t in self.tasks if callable(t.weight) and t.weight_at(now) == 0}
        return MicroBatches.of(
            self.tasks, batch, size=self.micro_batch_size, count=self.num_micro_batches, without=faded
        )

    def _take(self, micro_batches: MicroBatches, measure: bool) -> StepResult:
        """The passes of the tasks that are in the micro-batches, and their balance."""
        self._clear()
        names, balancing, scaler = micro_batches.names, self.balancing, self.scaler
        if not names:
            return StepResult({}, {}, taken=False)
        weights = balancing.begin(self._numbers(names), self.num_taken, next(iter(self.parameters.values())).device)
        scale = scaler.get_scale() if scaler and (measure or balancing.collects) else 1.0
        collect: Any = self._collector(micro_batches, scale) if balancing.collects else None
        measured = collect
        if measure and (collect is None or not balancing.fresh or balancing.source == "representation"):
            # Beside the training's own passes, which the scaler looks after, a smaller factor leaves half losses room.
            measured = Rows(self.parameters, names, scale=min(scale, 2.0**12))
        if self._reach is not None:
            self._reach.begin()
        beside = None if measured is collect else measured
        losses = self._run(micro_batches, weights, measure=beside, collect=collect, reach=self._reach)
        self._last, self._losses = (names, micro_batches.shares), losses
        self._searched = micro_batches if isinstance(self.optimizer, LBFGS) else None
        result = StepResult(dict(zip(names, losses, strict=True)), {})
        if measure:
            result.grad_norms, result.cosines, result.reach = measured.norms(), measured.cosines(), measured.reach()
        if collect is not None:
            alone_for_now = bool(self.model.frozen_until)
            balancing.balance(collect, losses, may_overflow=scaler is not None, alone_for_now=alone_for_now)
        if self._learned:
            balancing.learn(losses)
            for parameter in self._learned:
                if parameter.grad is not None and scaler:
                    parameter.grad = scaler.scale(parameter.grad)
        result.weights = balancing.applied(losses[0].device)
        if measure:
            result.total_norm = total_norm(self.parameters.values()) / scale
        return result

    def _numbers(self, names: Sequence[str]) -> list[int]:
        return [number for number, task in enumerate(self.tasks) if task.name in names]

    def _run(self, micro_batches: MicroBatches, weights: Weights | Weigh, **recorders: Any) -> list[Tensor]:
        """Takes the micro-batches forward and backward."""
        if len(micro_batches.batches) > 1:
            return accumulate(self.passes, self.checks, micro_batches, weights, **recorders)
        return self.passes(micro_batches.tasks, micro_batches.batches[0], weights, **recorders)

    def _collector(self, micro_batches: MicroBatches, scale: float) -> Rows:
        if self.passes.kind != "shared":
            return Rows(self.parameters, micro_batches.names, scale=scale)
        source, several = self.balancing.source, len(micro_batches.batches) > 1
        if several:  # a batch may come as several
            source = source_in_micro_batches(self.balancing.gradients)
        waits = not several and self.balancing.needs == "gramian"
        return AtFeatures(self.model, micro_batches.names, source=source, waits=waits, scale=scale)

    def _take_what_is_finite(self, micro_batches: MicroBatches, measure: bool) -> StepResult:
        """The same without the tasks whose loss or gradient isn't finite, or, to skip the step, not at all."""
        nonfinite: dict[str, str] = {}
        while True:
            try:
                result = self._take(micro_batches, measure)
                more = self._not_finite(result, micro_batches)
            except NotFinite as error:
                more = error.found
            if not more:
                result.nonfinite = nonfinite
                return result
            self.undo()
            nonfinite |= more
            micro_batches = micro_batches.without(nonfinite)
            if self.on_nonfinite == "skip_step":
                return StepResult({}, {}, nonfinite=nonfinite, taken=False)

    def _not_finite(self, result: StepResult, micro_batches: MicroBatches) -> dict[str, str]:
        """By task, what isn't finite in the step; gradients that overflow in fp16 are the scaler's business."""
        if not result.losses:
            return {}
        *losses, norm = _read([*result.losses.values(), total_norm(self.parameters.values())])
        named = zip(result.losses, losses, strict=True)
        nonfinite = {name: f"its loss is {loss}" for name, loss in named if not math.isfinite(loss)}
        if nonfinite or self.scaler or math.isfinite(norm):
            return nonfinite
        self.undo()
        rows = Rows(self.parameters, list(result.losses))
        self._run(micro_batches, [1.0] * len(micro_batches.tasks), measure=rows)
        norms = dict(zip(result.losses, _read(rows.norms().values()), strict=True))
        names = [name for name, norm in norms.items() if not math.isfinite(norm)] or list(norms)
        return dict.fromkeys(names, "its gradient is not finite")

    def undo(self) -> bool:
        """Restores what the last step changed before it moved the parameters, for one that didn't get to move them.

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
        """What a balancer does after the parameters have moved: some evaluate the losses again."""
        if self.balancing.needs != "nothing":
            self.balancing.after(self._losses, partial(self._losses_now, batch))

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

    @_reusable_graphs()
    def _losses_now(self, batch: StepBatch) -> Sequence[Tensor]:
        """The losses now, with the draws that the step began with: what they change by is the step's doing alone."""
        assert self._before is not None
        names, shares = self._last
        with preserved_random_state(self.model):
            self._before.restore_random_state()
            tasks = [task for task in self.tasks if task.name in names]
            again = MicroBatches(tasks, self._cut(batch).batches, shares)
            return Preview(self.model, again, self.passes.autocast).losses

    @_reusable_graphs()
    def _search(self, micro_batches: MicroBatches, weights: Sequence[float]) -> Any:
        """The weighted loss as the parameters are now, with its gradient in `.grad`; a line search asks for both."""
        assert self._before is not None
        for parameter in self.parameters.values():
            parameter.grad = None
        self._before.restore_random_state()
        with preserved_buffers(self.model):
            losses = self._run(micro_batches, list(weights))
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()

    def state_dict(self) -> dict[str, Any]:
        """The steps taken, states of optimizer, scheduler, scaler and balancer, and weights that serve on."""
        others = {name: other.state_dict() for name, other in self._others().items()}
        return {**self.descent.state_dict(), **others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        for name, other in self._others().items():
            if name != "reach" or name in state:  # not there where the run began without clip_shared_norm
                other.load_state_dict(state[name])
        self.descent.load_state_dict(state)

    def _others(self) -> dict[str, Any]:
        others = {"scaler": self.scaler, "reach": self._reach, "balancing": self.balancing, "checked": self.checks}
        return {name: other for name, other in others.items() if other is not None}


def _read(tensors: Any) -> list[float]:
    """The values of 0-dim tensors, read from the device at once."""
    values: list[float] = torch.stack([tensor.double() for tensor in tensors]).tolist()
    return values
