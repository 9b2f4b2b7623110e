"""One step of multi-task training: clear the gradients, run all tasks forward and backward, update the parameters.

    step = mtl.Step(model, tasks, optimizer)
    for batch in loader:
        result = step(batch)

`Step.__call__` is the whole step. computation.py computes the gradients of a batch, passes.py runs the forward and
backward passes of one micro-batch, and accumulation.py loops over several micro-batches.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from mtl.balancers import Balancer, Equal
from mtl.distributed import sharding
from mtl.distributed.batch_norm import is_synchronised
from mtl.distributed.collectives import world_size
from mtl.distributed.replicas import check_joined, share_buffers
from mtl.distributed.same_modules import SameModules
from mtl.gradients.reach import Reach
from mtl.model import MultiTaskModel
from mtl.process.seeding import common_seed
from mtl.step import described
from mtl.step.balancing import Balancing
from mtl.step.compatibility import check_aligned, check_arguments, check_optimizers, check_processes, check_shards
from mtl.step.compiled_check import CompiledCheck
from mtl.step.compiling import Compiled, runs_compiled
from mtl.step.computation import Computation
from mtl.step.descent import Descent
from mtl.step.gradient_source import check_representation
from mtl.step.micro_batches import MicroBatches, StepBatch
from mtl.step.passes import Passes
from mtl.step.result import StepResult
from mtl.step.settings import Gradients, Update
from mtl.task import Task


class Step:
    """A step of multi-task training, for use in any training loop.

    If `torch.distributed` has a process group of several processes, the batches of all processes together are the batch
    of the step, see `mtl.distributed`.

    Args:
        model: The model: a trunk and a head for each task.
        tasks: The tasks, in the order of their passes.
        optimizer: The optimizer of the model's parameters; None if only `backward` and `after` are used.
        balancer: Computes the weights of the tasks; by default all weights are equal.
        passes: `joint`, `sequential`, `shared` or `auto`, see passes.py.
        gradients: How, and how often, the balancer's Gramian is computed.
        micro_batch_size: The number of samples in a micro-batch. Each batch is divided into micro-batches, which are
            processed one after the other; the gradient is that of the whole batch, see accumulation.py.
        num_micro_batches: The number of micro-batches that each batch is divided into, instead of `micro_batch_size`.
        update: Learning rate scheduler, gradient clipping and an optimizer that takes over later.
        precision: `fp32`, or forward passes under autocast in `bf16` or, with gradient scaling, in `fp16`.
        on_nonfinite: What to do about a loss or a gradient that isn't finite. `error` raises an error if a balancer
            reads the losses or gradients; otherwise the parameters are updated, and the caller has to check the losses.
            `skip_step` changes nothing: neither parameters nor optimizer, balancer, buffers or random state.
            `skip_task` runs the step as if the task had no labels in the batch. Both check the values in every step,
            so that the CPU waits for the GPU.
        compile: Names of modules that are compiled by `torch.compile` inside of the step, with the wildcards `*` and
            `?`; True for trunk and heads. The first step compares them with eager ones.

    Raises:
        UserError: If an argument is invalid, or if settings can't be combined.
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
        compile: bool | Sequence[str] = False,
    ) -> None:
        check_arguments(model, tasks, balancer, micro_batch_size, num_micro_batches, on_nonfinite)
        self.model = model
        self.tasks = list(tasks)
        self._sharded = sharding.begin(model)  # whether the parameters are divided over the processes
        self._same_modules = SameModules(model)
        self._synchronised = is_synchronised(model)  # whether batch norm normalises over all processes
        self.passes = Passes(model, passes, precision)
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.on_nonfinite = on_nonfinite
        self.parameters = dict(model.named_parameters())
        at_once = micro_batch_size is None and num_micro_batches in (None, 1)
        self.balancing = Balancing(balancer or Equal(), self.tasks, gradients, passes=self.passes.kind, at_once=at_once)
        if self.balancing.collects:
            check_representation(model, self.balancing.source)
        self.descent = Descent(self.parameters, optimizer, update)
        self._reach = None if update.clip_shared_norm is None else Reach(self.parameters, [t.name for t in tasks])
        self.computation = Computation(model, self.parameters, self.passes, self.balancing, self._reach)
        learned, clips_shared = self.computation.learned, self._reach is not None
        check_optimizers(self.descent, self.balancing, learned, precision=precision, clips_shared=clips_shared)
        self.compiled = Compiled(model, compile)
        self._check = CompiledCheck(self.compiled, self.passes, [task.name for task in tasks])
        self._settings = described.fixed(
            update,
            gradients,
            passes=self.passes.kind,
            precision=precision,
            micro_batch_size=micro_batch_size,
            num_micro_batches=num_micro_batches,
            on_nonfinite=on_nonfinite,
            compile=self.compiled.names,
        )
        self._searched: MicroBatches | None = None  # the micro-batches for a line search
        self._processes = 1  # that train together, in the current step
        self._compared = False  # whether all processes have been found to have the same model
        if self._sharded or self._synchronised:
            check_aligned(self.tasks, self.compiled.names)
        if self._sharded:
            check_shards(model, self.balancing, self.descent, precision)
            if self.balancing.source == "layerwise":
                self.balancing.source = "rows"  # of which each process has a part

    @property
    def optimizer(self) -> Optimizer | None:
        """The current optimizer."""
        return self.descent.optimizer

    @property
    def num_taken(self) -> int:
        """The number of optimizer steps taken."""
        return self.descent.num_taken

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler that keeps fp16 gradients from underflowing; None in other precisions."""
        return self.passes.scaler

    def __call__(self, batch: StepBatch, *, measure: bool = False) -> StepResult:
        """Runs a whole step on one batch: gradients, parameter update and the balancer's update.

        Args:
            batch: A dict of inputs and targets by name, on the model's device; a dict of such batches by task name if
                the tasks have separate batches; or a list of micro-batches.
            measure: Whether to measure gradient norms, cosines and reach as well. The parameters are updated in the
                same way.

        Returns:
            The losses, weights and measurements of the step.
        """
        result = self.backward(batch, measure=measure)
        self.update(result)
        if result.taken:
            self.after(batch)
        return result

    @runs_compiled
    def backward(self, batch: StepBatch, *, measure: bool = False) -> StepResult:
        """Clears the gradients and leaves the weighted sum of the tasks' gradients in `.grad`.

        For training loops that clip gradients and step the optimizer themselves. In fp16, the gradients are still
        scaled, so that `update` has to be called next. The arguments are those of `__call__`.
        """
        self.descent.moving = False
        if self.model.thaws(self.num_taken):
            self._check.again()
        self.model.begin_step(self.num_taken)
        self._meet()
        micro_batches = self._cut(batch, measure=measure)
        self._searched = micro_batches if isinstance(self.optimizer, LBFGS) else None
        with self._same_modules.compared() if self._sharded else nullcontext():
            result = self.computation(
                micro_batches, self.num_taken, measure=measure, on_nonfinite=self.on_nonfinite, check=self._check
            )
        if self._processes > 1:
            share_buffers(self.model)
        return result

    def _meet(self) -> None:
        """Notes the number of processes, and compares the processes before they do anything together."""
        self._processes = world_size()
        if self._processes == 1:
            check_joined()
        if (self._processes > 1 or self._sharded) and not self._compared:
            settings = self._settings | described.current(self.tasks, self.balancing, self.descent)
            check_processes(self.model, self.tasks, self._sharded, settings)
            self.balancing.seed = common_seed()
            self._compared = True

    def _cut(self, batch: StepBatch, *, measure: bool = False) -> MicroBatches:
        """Returns the micro-batches of the batch, without tasks that have no labels or a scheduled weight of 0."""
        now = self.num_taken
        faded = {t.name: 0 for t in self.tasks if callable(t.weight) and t.weight_at(now) == 0}
        return MicroBatches.of(
            self.tasks,
            batch,
            size=self.micro_batch_size,
            count=self.num_micro_batches,
            without=faded,
            processes=self._processes,
            aligned=self._sharded or (self._synchronised and self._processes > 1),
            measure=measure,
        )

    def undo(self) -> bool:
        """Restores the state from before the last step, for a step that failed before it updated the parameters.

        Returns:
            Whether everything is now as it was before the step. False if parameters may have been updated, or if a
            balancer that works on rows has already processed the rows of the step.
        """
        if self.descent.moving:  # what was saved belongs to other parameters
            self.computation.clear()
            return False
        return self.computation.undo()

    def update(self, result: StepResult) -> None:
        """Unscales and clips the gradients, and steps the optimizer and the scheduler once.

        Nothing is updated if the gradients overflowed, if the step was skipped, or if no task took part.
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
        """Updates the balancer after the parameters were updated; some balancers need the losses again."""
        if self.balancing.needs == "nothing":
            return
        losses_now = None
        if self.balancing.balancer.needs_losses_after:
            with self.compiled.running():
                losses_now = self.computation.losses_now(self._cut(batch))
        self.balancing.after(self.computation.losses, losses_now)

    @runs_compiled
    def _search(self, micro_batches: MicroBatches, weights: Sequence[float]) -> Tensor:
        return self.computation.search(micro_batches, weights)

    def epoch_end(self) -> None:
        """Ends an epoch: notifies the balancer, and steps a scheduler whose interval is `epoch`."""
        self._meet()
        self.balancing.epoch_end(self.num_taken, self._processes)
        self.descent.epoch_end()

    def validated(self, value: float) -> None:
        """Steps a `ReduceLROnPlateau` after a validation; other schedulers don't depend on validation.

        Args:
            value: The monitored value.
        """
        self.descent.epoch_end(value)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps taken and the states of optimizer, scheduler, gradient scaler and balancer."""
        states = {name: component.state_dict() for name, component in self._components().items()}
        return {**self.descent.state_dict(), **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        for name, component in self._components().items():
            if name != "reach" or name in state:  # missing if the run began without clip_shared_norm
                component.load_state_dict(state[name])
        self.descent.load_state_dict(state)

    def _components(self) -> dict[str, Any]:
        components = {
            "scaler": self.scaler,
            "reach": self._reach,
            "balancing": self.balancing,
            "checked": self.computation.checks,
        }
        return {name: component for name, component in components.items() if component is not None}
