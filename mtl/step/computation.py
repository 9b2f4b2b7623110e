"""Computes the gradient of a step: the passes over the micro-batches and the balancing of the tasks."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.distributed.sharding import is_sharded
from mtl.errors import NotFinite
from mtl.gradients.at_features import AtFeatures
from mtl.gradients.backward import total_norm
from mtl.gradients.overlap import Overlap
from mtl.gradients.reach import Reach
from mtl.gradients.rows import Rows
from mtl.model import MultiTaskModel
from mtl.snapshots import Snapshot, preserved_buffers, preserved_random_state
from mtl.step.accumulation import accumulate
from mtl.step.balancing import Balancing
from mtl.step.gradient_source import source_in_micro_batches
from mtl.step.loss_checks import LossChecks
from mtl.step.micro_batches import MicroBatches
from mtl.step.passes import Passes, Recorders, Weigh, Weights
from mtl.step.result import StepResult
from mtl.step.shares import known
from mtl.step.whole_batch import Preview
from mtl.task import Task


class Computation:
    """Runs the passes of a step and balances the tasks. The parameters are not updated.

    Args:
        model: The model.
        parameters: All parameters of the model, by name.
        passes: Runs the forward and backward passes of one micro-batch.
        balancing: Applies the balancer.
        reach: Records which parameters each task reaches; None if the record is not needed.

    Attributes:
        checks: Tests the losses that are computed in micro-batches.
        learned: The balancer's parameters that the model's optimizer trains.
        losses: The losses of the last step, one for each task that took part.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        parameters: Mapping[str, nn.Parameter],
        passes: Passes,
        balancing: Balancing,
        reach: Reach | None,
    ) -> None:
        self.passes = passes
        self.checks = LossChecks(model)
        self.learned = balancing.parameters(next(iter(parameters.values())))
        self._model = model
        self._parameters = parameters
        self._balancing = balancing
        self._reach = reach
        self._overlap = Overlap(parameters.values())
        self._sharded = is_sharded(next(iter(parameters.values())))
        self._before: Snapshot | None = None
        self.losses: list[Tensor] = []
        self._tasks: list[Task] = []  # the tasks of the last step
        self._shares: list[list[float]] = []  # the share of each task's loss, by micro-batch of the last step
        self._members: list[list[int]] | None = None  # by micro-batch, the tasks that run in all processes

    def __call__(
        self,
        micro_batches: MicroBatches,
        step: int,
        *,
        measure: bool,
        on_nonfinite: str = "error",
        check: Callable[[MicroBatches], None],
    ) -> StepResult:
        """Computes the weighted sum of the tasks' gradients and leaves it in `.grad`.

        Args:
            micro_batches: The micro-batches of the step.
            step: The number of optimizer steps taken so far.
            measure: Whether to measure gradient norms, cosines and reach as well.
            on_nonfinite: What to do about losses and gradients that are not finite, see `mtl.Step`.
            check: Called with the micro-batches before their passes, and raises a UserError if these would be wrong.

        Returns:
            The losses, the weights and, with `measure`, the measurements of the step.
        """
        components: list[Any] = [self.checks] if len(micro_batches.batches) > 1 or micro_batches.processes > 1 else []
        if self._balancing.needs not in ("nothing", "rows"):  # the state of a balancer of rows is as large as the rows
            components.append(self._balancing)
        self._before = Snapshot(self._model, others=components)
        check(micro_batches)
        if on_nonfinite == "error":
            return self._take(micro_batches, step, measure)
        nonfinite: dict[str, str] = {}
        while True:  # until the losses and gradients of all remaining tasks are finite
            try:
                result = self._take(micro_batches, step, measure)
                reasons = self._not_finite(result, micro_batches)
            except NotFinite as error:
                reasons = error.reasons
            if not reasons:
                result.nonfinite = nonfinite
                return result
            self.undo()
            nonfinite |= reasons
            micro_batches = micro_batches.without(nonfinite)
            if on_nonfinite == "skip_step":
                return StepResult({}, {}, nonfinite=nonfinite, taken=False)

    def _take(self, micro_batches: MicroBatches, step: int, measure: bool) -> StepResult:
        """Runs the passes of the tasks in the micro-batches, and balances these tasks."""
        self.clear()
        tasks, names, balancing, scaler = micro_batches.tasks, micro_batches.names, self._balancing, self.passes.scaler
        if not tasks:
            return StepResult({}, {}, taken=False)
        balancing.processes = micro_batches.processes
        weights = balancing.begin(names, step, next(iter(self._parameters.values())).device)
        scale = scaler.get_scale() if scaler and (measure or balancing.collects) else 1.0
        collect: Any = self._collector(micro_batches, scale) if balancing.collects else None
        measured = None
        if measure and (collect is None or not balancing.fresh or balancing.source == "representation"):
            # The scaler doesn't adapt to these additional passes; a smaller factor keeps fp16 losses from overflowing.
            measured = Rows(self._parameters, names, scale=min(scale, 2.0**12), processes=micro_batches.processes)
        if self._reach is not None:
            self._reach.begin()
        losses = self._run(micro_batches, weights, Recorders(measured, collect, self._reach))
        self.losses, self._tasks, self._shares = losses, tasks, micro_batches.shares
        self._members = micro_batches.members if micro_batches.is_aligned else None
        result = StepResult(dict(zip(names, losses, strict=True)), {})
        if measure:
            rows = measured or collect
            result.grad_norms, result.cosines, result.reach = rows.norms(), rows.cosines(), rows.reach()
        if collect is not None:
            may_share_nothing = bool(self._model.frozen_until)
            result.weights = balancing.balance(
                collect, losses, may_overflow=scaler is not None, may_share_nothing=may_share_nothing
            )
        else:
            result.weights = balancing.applied(losses[0].device)
        if self.learned:
            balancing.learn(losses)
            for parameter in self.learned:
                if parameter.grad is not None and scaler:
                    parameter.grad = scaler.scale(parameter.grad)
        if measure:
            result.total_norm = total_norm(self._parameters.values()) / scale
        return result

    def _run(
        self,
        micro_batches: MicroBatches,
        weights: Weights | Weigh,
        recorders: Recorders = Recorders(),  # noqa: B008
    ) -> list[Tensor]:
        """Runs the forward and backward passes of the micro-batches and returns the loss of each task.

        The gradients in `.grad` are those of all processes. Recorders sum the gradients that they hold by themselves.
        """
        if len(micro_batches.batches) == 1 and micro_batches.processes == 1:
            tasks = [micro_batches.task(0, index) for index in micro_batches.members[0]]
            return self.passes(tasks, micro_batches.batches[0], weights, recorders)
        if recorders.collect is not None or micro_batches.processes == 1 or self._sharded:
            return accumulate(self.passes, self.checks, micro_batches, weights, recorders)
        members = None if micro_batches.is_aligned else micro_batches.members  # SyncBatchNorm sums in passes as well
        with self._overlap(micro_batches.names, members) as sums:
            return accumulate(self.passes, self.checks, micro_batches, weights, recorders, sums.finish)

    def _collector(self, micro_batches: MicroBatches, scale: float) -> Rows:
        """Returns an object that collects the tasks' gradients during the passes."""
        processes = micro_batches.processes
        whole = self._balancing.needs == "rows"
        if self.passes.kind != "shared":
            return Rows(self._parameters, micro_batches.names, scale=scale, whole=whole, processes=processes)
        source, several = self._balancing.source, micro_batches.several
        if several:  # the batch may have come as a list of micro-batches
            source = source_in_micro_batches(self._balancing.settings)
        waits = not several and self._balancing.needs == "gramian"
        return AtFeatures(
            self._model, micro_batches.names, source=source, waits=waits, scale=scale, whole=whole, processes=processes
        )

    def _not_finite(self, result: StepResult, micro_batches: MicroBatches) -> dict[str, str]:
        """Returns, by task name, what is not finite in the step.

        Gradients that overflow in fp16 are not reported, since the gradient scaler handles them.
        """
        if not result.losses:
            return {}
        *losses, norm = _read([*result.losses.values(), total_norm(self._parameters.values())])
        named = zip(result.losses, losses, strict=True)
        nonfinite = {name: f"its loss is {loss}" for name, loss in named if not math.isfinite(loss)}
        if nonfinite or self.passes.scaler or math.isfinite(norm):
            return nonfinite
        self.undo()
        rows = Rows(self._parameters, list(result.losses), processes=micro_batches.processes)
        self._run(micro_batches, [1.0] * len(micro_batches.tasks), Recorders(measure=rows))
        norms = dict(zip(result.losses, _read(rows.norms().values()), strict=True))
        names = [name for name, norm in norms.items() if not math.isfinite(norm)] or list(norms)
        return dict.fromkeys(names, "its gradient is not finite")

    def undo(self) -> bool:
        """Clears the gradients and restores the state that the last step changed before the parameter update.

        Returns:
            Whether everything is now as it was before the step. False if a balancer that works on rows has already
            processed the rows of the step, since its state isn't saved.
        """
        self.clear()
        if self._before is None:
            return False
        self._before.restore()
        return not (self._balancing.needs == "rows" and self._balancing.answered)

    def clear(self) -> None:
        """Clears the gradients of the model's parameters, and those of the balancer's."""
        for parameter in (*self._parameters.values(), *self.learned):
            parameter.grad = None

    def losses_now(self, micro_batches: MicroBatches) -> list[Tensor]:
        """Computes the losses of the last step's tasks again, with the current parameters.

        The random state is the one at the beginning of the step, so that the losses differ by the update alone.

        Args:
            micro_batches: The micro-batches of the last step.

        Returns:
            The loss of each task, as 0-dim tensors.
        """
        assert self._before is not None
        with preserved_random_state(self._model):
            self._before.restore_random_state()
            again = MicroBatches(
                self._tasks,
                micro_batches.batches,
                known(self._shares),
                processes=micro_batches.processes,
                members=self._members,
                sources=micro_batches.sources,
            )
            return Preview(self._model, again, self.passes.autocast).losses

    def search(self, micro_batches: MicroBatches, weights: Sequence[float]) -> Tensor:
        """Computes the weighted loss and its gradient at the current parameters, for an optimizer's line search.

        Args:
            micro_batches: The micro-batches of the step.
            weights: The weight of each task.

        Returns:
            The weighted sum of the losses, a 0-dim tensor; the gradient is in `.grad`.
        """
        assert self._before is not None
        self.clear()
        self._before.restore_random_state()
        with preserved_buffers(self._model):
            losses = self._run(micro_batches, list(weights))
        return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()


def _read(tensors: Iterable[Tensor]) -> list[float]:
    """Returns the values of 0-dim tensors, with a single transfer from the device."""
    values: list[float] = torch.stack([tensor.double() for tensor in tensors]).tolist()
    return values
