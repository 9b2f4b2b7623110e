"""One step of multi-task training: clear the gradients, take each task forward and backward, move the parameters.

    step = mtl.Step(model, tasks, optimizer)
    for batch in loader:
        result = step(batch)

`Step.__call__` is the whole step. computation.py goes from the batch to the gradients, passes.py makes the forward and
backward passes of one micro-batch, and accumulation.py loops over several.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from mtl.balancers import Balancer, Equal
from mtl.gradients.reach import Reach
from mtl.model import MultiTaskModel
from mtl.step.balancing import Balancing
from mtl.step.compatibility import check_arguments, check_optimizers
from mtl.step.computation import Computation
from mtl.step.descent import Descent
from mtl.step.micro_batches import MicroBatches, StepBatch
from mtl.step.passes import Passes
from mtl.step.result import StepResult
from mtl.step.settings import Gradients, Update
from mtl.task import Task


@contextmanager
def reusable_graphs() -> Iterator[None]:
    """Within, what torch.compile compiles keeps its saved tensors, since a step may go backward several times."""
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
        self._reach = None if update.clip_shared_norm is None else Reach(self.parameters)
        self.computation = Computation(model, self.parameters, self.passes, self.balancing, self._reach)
        learned, clips_shared = self.computation.learned, self._reach is not None
        check_optimizers(self.descent, self.balancing, learned, precision=precision, clips_shared=clips_shared)
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

    @reusable_graphs()
    def backward(self, batch: StepBatch, *, measure: bool = False) -> StepResult:
        """Clears the gradients and leaves the weighted sum of the tasks' gradients in `.grad`.

        For loops that clip and step by themselves; in fp16 the gradients are still scaled, and `update` is the way to
        go on. Arguments as for a whole step.
        """
        self.descent.moving = False
        if self.model.frozen_until:
            self.model.thaw(self.num_taken)
        micro_batches = self._cut(batch)
        self._searched = micro_batches if isinstance(self.optimizer, LBFGS) else None
        return self.computation(micro_batches, self.num_taken, measure=measure, on_nonfinite=self.on_nonfinite)

    def _cut(self, batch: StepBatch) -> MicroBatches:
        """The step's micro-batches, without tasks that have no labels in it or whose weight is 0 for now."""
        now = self.num_taken
        faded = {t.name: 0 for t in self.tasks if callable(t.weight) and t.weight_at(now) == 0}
        return MicroBatches.of(
            self.tasks, batch, size=self.micro_batch_size, count=self.num_micro_batches, without=faded
        )

    def undo(self) -> bool:
        """Restores what the last step changed before it moved the parameters, for one that didn't get to move them.

        Returns:
            Whether everything is now as it was before the step: not where parameters may have moved, or a balancer
            that works on rows has taken these in.
        """
        return self.computation.undo() and not self.descent.moving

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
        if self.balancing.needs == "nothing":
            return
        losses_now = None
        if self.balancing.balancer.looks_back:
            with reusable_graphs():
                losses_now = self.computation.losses_now(self._cut(batch))
        self.balancing.after(self.computation.losses, losses_now)

    @reusable_graphs()
    def _search(self, micro_batches: MicroBatches, weights: Sequence[float]) -> Tensor:
        return self.computation.search(micro_batches, weights)

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
        others = {
            "scaler": self.scaler,
            "reach": self._reach,
            "balancing": self.balancing,
            "checked": self.computation.checks,
        }
        return {name: other for name, other in others.items() if other is not None}
