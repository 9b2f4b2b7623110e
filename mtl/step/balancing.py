"""How a step uses its balancer: the inputs, how often they are computed, and what the weights multiply."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mtl.balancers import Balancer
from mtl.errors import NotFinite
from mtl.gradients.rows import Rows
from mtl.step import balancer_errors
from mtl.step.balancer_calls import calling
from mtl.step.gradient_source import COLLECTING, choose_source
from mtl.step.learned import parameters_of
from mtl.step.settings import Gradients
from mtl.task import Task


class Balancing:
    """Calls a balancer in each step and applies the weights that it returns.

    Args:
        balancer: The balancer. It isn't used if there is only one task, which is plain training.
        tasks: All tasks.
        gradients: The settings of the balancer's Gramian: the source, and how often it is computed.
        passes: The kind of passes: `joint`, `sequential` or `shared`.
        at_once: Whether the whole batch is always processed at once, not in micro-batches.

    Attributes:
        needs: What the balancer needs; `nothing` if there is only one task.
        collects: Whether the tasks' gradients are collected for the balancer.
        settings: The settings of the balancer's Gramian.
        source: The source of the Gramian: `rows`, `layerwise` or `representation`.
        num_tasks: The number of all tasks.
        answered: Whether the balancer has combined rows in the current step.
        processes: The number of processes.
        seed: With several processes, a number that is the same in all of them, with which they seed random draws.

    Raises:
        UserError: If the attributes of the balancer contradict each other, or if the source can't be used with the
            balancer or the passes.
    """

    def __init__(
        self, balancer: Balancer, tasks: Sequence[Task], gradients: Gradients, *, passes: str, at_once: bool = True
    ) -> None:
        self.balancer = balancer
        self.needs = balancer.needs if len(tasks) > 1 else "nothing"
        self.collects = self.needs in COLLECTING
        self.settings = gradients
        self.source = choose_source(balancer, self.needs, gradients, passes, at_once=at_once)
        self._all_names = [task.name for task in tasks]
        self.num_tasks = len(tasks)
        self._tasks = list(tasks)
        self._scheduled = any(callable(task.weight) for task in tasks)
        self._all_task_weights = self._task_weights_at(0)
        self._present: list[int] | None = None  # the indices of the tasks in the step; None for all tasks
        balancer_errors.set_preference(self.balancer, self.needs, self._names, self._task_weights)
        self._constant = torch.ones_like(self._task_weights)
        if self.needs == "nothing" and len(tasks) > 1:
            self._constant = balancer.weights(torch.full_like(self._task_weights, torch.nan), None)
        self._fixed = (self._task_weights * self._constant).tolist()
        self._last = torch.full_like(self._task_weights, torch.nan)  # of all tasks, task weights included
        self._age = 0  # the number of steps taken with the last weights
        self._applied: Tensor | None = None  # the weights of the current step
        self.answered = False
        self.processes, self.seed, self._step = 1, 0, 0
        self._on_device: tuple[torch.device, dict[str, Tensor]] | None = None

    @property
    def _names(self) -> list[str]:
        return self._all_names if self._present is None else [self._all_names[index] for index in self._present]

    @property
    def _task_weights(self) -> Tensor:
        return self._all_task_weights if self._present is None else self._all_task_weights[self._present]

    def _task_weights_at(self, step: int) -> Tensor:
        return torch.tensor([task.weight_at(step) for task in self._tasks], dtype=torch.float64)

    def begin(
        self, present: Sequence[str], step: int, device: torch.device
    ) -> Sequence[float | Tensor] | Callable[..., Sequence[Tensor]]:
        """Begins a step in which some of the tasks take part. Weights and state of the other tasks don't change.

        Args:
            present: The names of the tasks in the step.
            step: The number of optimizer steps taken so far, on which scheduled task weights depend.
            device: The device of the losses.

        Returns:
            The factors of the losses in the backward pass, or a function from the losses to these factors.
        """
        self._step = step
        if self._scheduled:
            self._all_task_weights = self._task_weights_at(step)
            self._present = None
            self._fixed = (self._task_weights * self._constant).tolist()
            self._on_device = None
            balancer_errors.set_preference(self.balancer, self.needs, self._names, self._task_weights)
        everyone = len(present) == self.num_tasks
        self._present = None if everyone else [n for n, name in enumerate(self._all_names) if name in present]
        self._applied = None
        self.answered = False
        self.balancer.num_tasks = self.num_tasks
        self.balancer.present = None if self._present is None else torch.tensor(self._present)
        if self.needs == "losses":
            return self._weigh
        if self.needs == "past":
            return self._weigh([torch.tensor(torch.nan, device=device)] * len(self._names))
        if self.collects:
            return [1.0] * len(self._names)
        return self.current()

    @property
    def weights(self) -> Tensor:
        """The last weights of the tasks in the step, float64, or the task weights before the first balancer call."""
        last = self._last if self._present is None else self._last[self._present]
        return last.where(~last.isnan(), self._task_weights.to(last.device))

    def _keep(self, weights: Tensor) -> None:
        self._applied = weights
        if self._present is None:
            self._last = weights
        else:
            self._last = self._last.to(weights).clone()
            self._last[self._present] = weights

    @property
    def fresh(self) -> bool:
        """Whether the current step computes new weights."""
        return self._age % self.settings.every == 0 or bool(self._last[self._present or slice(None)].isnan().any())

    def _weigh(self, losses: Sequence[Tensor]) -> Sequence[Tensor]:
        weights = self._ask(torch.stack(list(losses)).detach().double())
        self._keep(weights)
        return list(weights.unbind())

    def _ask(self, losses: Tensor, gramian: Tensor | None = None) -> Tensor:
        """Computes the balancer's weights and combines them with the task weights."""
        if self.needs != "past":
            balancer_errors.check_losses(self._names, losses)
        task_weights = self._task_weights.to(losses.device)
        steered = self.balancer.preference == "steer"
        with self._calling("weights"):
            if steered:
                weights = self.balancer.weights(losses, gramian)
            else:
                scaled = None if gramian is None else gramian * task_weights.outer(task_weights)
                weights = self.balancer.weights(task_weights * losses, scaled)
        if not isinstance(weights, Tensor) or weights.shape != task_weights.shape:
            raise balancer_errors.wrong_shape(self.balancer, weights, len(task_weights))
        if weights.device.type == "cpu" and not weights.isfinite().all():  # on a GPU, the check would wait for it
            raise balancer_errors.not_finite(self.balancer, self._names, losses, by_losses=gramian is None)
        weights = weights.detach().to(task_weights)
        return weights if steered else task_weights * weights

    def balance(
        self, rows: Rows, losses: Sequence[Tensor], *, may_overflow: bool, may_share_nothing: bool = False
    ) -> dict[str, Tensor]:
        """Computes new weights if they are due, and leaves the combination of the tasks' gradients in `.grad`.

        Args:
            rows: The gradients of the tasks.
            losses: The losses of the tasks.
            may_overflow: Whether gradients that aren't finite are allowed, since a gradient scaler will skip the step.
            may_share_nothing: Whether the tasks may share no trainable parameter, since shared ones may be frozen.

        Returns:
            The weights by task name, see `applied`.

        Raises:
            NotFinite: If a loss or a gradient isn't finite.
        """
        self._balance(rows, losses, may_overflow, may_share_nothing)
        return self.applied(losses[0].device)

    def _balance(self, rows: Rows, losses: Sequence[Tensor], may_overflow: bool, may_share_nothing: bool) -> None:
        stacked = torch.stack(list(losses)).double()
        single = len(self._names) == 1 and self.num_tasks > 1
        if single or (may_share_nothing and not rows.shared()):  # there is nothing to balance
            self._applied = self._alone(stacked)
            rows.combine(self._applied.tolist(), self._applied.tolist())
            return
        if self.needs == "rows":
            if not may_overflow:
                balancer_errors.check_losses(self._names, stacked)
            if self._all_finite(rows.finite(), may_overflow):
                self._combine_rows(rows, stacked)
                return
        elif self.fresh:
            count = len(self._task_weights)
            products = rows.gramian() if self.balancer.over == "shared" else rows.gramian_of_all()
            values = torch.cat([products.flatten(), stacked]).cpu()  # one transfer, since each waits for the GPU
            gramian, loss_values = values[: count * count].view(count, count), values[count * count :]
            if not may_overflow:
                balancer_errors.check_losses(self._names, loss_values)
            finite = gramian.diagonal().isfinite()
            small = gramian.diagonal() < max(1e-70, 1e-50 * float(gramian.diagonal().max()))
            gramian[small], gramian[:, small] = 0.0, 0.0  # so short a gradient counts as 0: its weight would overflow
            if self._all_finite(finite & rows.finite().cpu() if may_overflow else finite, may_overflow):
                self._keep(self._ask(loss_values, gramian))
                self._age = 0
        weights = self.weights
        rows.combine(weights.tolist(), (weights if self.balancer.scope == "all" else self._alone(stacked)).tolist())

    def _combine_rows(self, rows: Rows, losses: Tensor) -> None:
        task_weights = self._task_weights.to(losses.device)
        steered = self.balancer.preference == "steer"
        alone = self._alone(losses)
        self.answered = True
        with self._calling("combine"):
            weights, direction = self.balancer.combine(
                losses if steered else task_weights * losses,
                rows.stacked([1.0] * len(task_weights) if steered else task_weights.tolist()),
            )
        weights = weights if steered else task_weights * weights.to(task_weights)
        self._keep(weights)
        rows.place(direction, (weights if self.balancer.scope == "all" else alone).tolist())

    def _alone(self, losses: Tensor) -> Tensor:
        with self._calling("alone"):
            return self._task_weights * self.balancer.alone(losses).cpu()

    def _all_finite(self, finite: Tensor, may_overflow: bool) -> bool:
        if finite.all():
            return True
        if may_overflow:
            return False
        named = zip(self._names, finite.tolist(), strict=True)
        raise NotFinite({name: "its gradient is not finite" for name, right in named if not right})

    def _calling(self, method: str) -> AbstractContextManager[None]:
        """Returns the context in which a method of the balancer is called."""
        return calling(self.balancer, method, (self.seed, self._step) if self.processes > 1 else None)

    def parameters(self, like: Tensor) -> list[nn.Parameter]:
        """Creates the balancer's parameters that the model's optimizer trains, on the device of `like`."""
        with calling(self.balancer, "parameters", None):
            return parameters_of(self.balancer, self.num_tasks, like)

    def learn(self, losses: Sequence[Tensor]) -> None:
        """Computes the gradients of the balancer's parameters from the losses of the current step."""
        stacked = torch.stack(list(losses)).double()
        scales = self.balancer.preference == "scale"
        with self._calling("learn"):
            self.balancer.learn(self._task_weights.to(stacked.device) * stacked if scales else stacked)

    def after(self, losses: Sequence[Tensor], losses_now: Sequence[Tensor] | None) -> None:
        """Notifies the balancer that the parameters were updated.

        Args:
            losses: The losses of the step, before the update.
            losses_now: The losses after the update, for a balancer that compares the two; else None.
        """
        self._age += 1
        after = None if losses_now is None else torch.stack(list(losses_now)).double()
        before = torch.stack(list(losses)).double()
        task_weights = self._task_weights.to(before.device) if self.balancer.preference == "scale" else 1.0
        with self._calling("after"):
            self.balancer.after(task_weights * before, None if after is None else task_weights * after)

    def epoch_end(self, step: int, processes: int) -> None:
        """Notifies the balancer that an epoch has ended.

        Args:
            step: The number of optimizer steps taken so far.
            processes: The number of processes.
        """
        self._step, self.processes = step, processes
        with self._calling("epoch_end"):
            self.balancer.epoch_end()

    def current(self) -> list[float]:
        """Returns the weights in the current step, task weights included, of the tasks that take part."""
        if self.needs == "nothing":
            return self._fixed if self._present is None else [self._fixed[index] for index in self._present]
        weights: list[float] = (self.weights if self._applied is None else self._applied).tolist()
        return weights

    def applied(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the weights in the current step, task weights included, by task name, as 0-dim float32 tensors."""
        if self.needs != "nothing":
            weights = (self.weights if self._applied is None else self._applied).to(device, torch.float32)
            return dict(zip(self._names, weights.unbind(), strict=True))
        if self._on_device is None or self._on_device[0] != device:
            self._on_device = device, dict(zip(self._all_names, torch.tensor(self._fixed, device=device), strict=True))
        return {name: self._on_device[1][name] for name in self._names}

    def state_dict(self) -> dict[str, Any]:
        """Returns the balancer's state, and the weights that are used until the next Gramian is computed."""
        return {"balancer": self.balancer.state_dict(), "weights": self._last, "age": self._age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.balancer.load_state_dict(state["balancer"])
        self._last, self._age = state["weights"], state["age"]
