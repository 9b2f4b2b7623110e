"""What a step does with its balancer: what it is asked, when, and what its weights multiply."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.balancers import Balancer
from mtl.errors import NotFinite
from mtl.gradients.rows import Rows
from mtl.step import balancer_errors
from mtl.step.gradient_source import COLLECTING, choose_source
from mtl.step.learned import parameters_of
from mtl.step.settings import Gradients
from mtl.task import Task


class Balancing:
    """A balancer at work.

    Args:
        balancer: gives the tasks' weights. With one task alone it isn't asked: that is plain training.
        tasks: whose weights it gives.
        gradients: where its Gramian comes from, and how often.
        passes: the kind of passes, chosen.
        at_once: whether a batch is never cut into micro-batches.

    Attributes:
        needs: what the balancer needs, `nothing` with one task.
        collects: whether it is to be given the tasks' gradients.
        settings: where its Gramian comes from, and how often.
        source: `rows`, `layerwise` or `representation`.
        answered: whether the balancer has been asked in the step that is under way.

    Raises:
        UserError: for a balancer that can't be served, and a source that can't be used with it.
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
        self._tasks = list(tasks)
        self._scheduled = any(callable(task.weight) for task in tasks)
        self._all_own = self._own_at(0)
        self._present: list[int] | None = None  # the tasks that take part in the step; None for all
        self._give_preference()
        self._constant = torch.ones_like(self._own)
        if self.needs == "nothing" and len(tasks) > 1:
            self._constant = balancer.weights(torch.full_like(self._own, torch.nan), None)
        self._fixed = (self._own * self._constant).tolist()
        self._last = torch.full_like(self._own, torch.nan)  # what the balancer gave last, the tasks' own included
        self._age = 0  # steps taken with them
        self._applied: Tensor | None = None  # the weights of the step at hand
        self.answered = False
        self._on_device: tuple[torch.device, dict[str, Tensor]] | None = None

    @property
    def _names(self) -> list[str]:
        return self._all_names if self._present is None else [self._all_names[index] for index in self._present]

    @property
    def _own(self) -> Tensor:
        return self._all_own if self._present is None else self._all_own[self._present]

    def _own_at(self, step: int) -> Tensor:
        return torch.tensor([task.weight_at(step) for task in self._tasks], dtype=torch.float64)

    def begin(
        self, present: Sequence[str], step: int, device: torch.device
    ) -> Sequence[float | Tensor] | Callable[..., Sequence[Tensor]]:
        """Begins a step in which some tasks take part. The others' weights and state stay as they are.

        Args:
            present: the tasks' names.
            step: optimizer steps taken; tasks' own weights may depend on it.
            device: where the losses are.

        Returns:
            What the losses are multiplied by before they go backward, or a function that gives this when the losses
            are known.
        """
        if self._scheduled:
            self._all_own = self._own_at(step)
            self._present = None
            self._fixed = (self._own * self._constant).tolist()
            self._on_device = None
            self._give_preference()
        everyone = len(present) == len(self._all_names)
        self._present = None if everyone else [n for n, name in enumerate(self._all_names) if name in present]
        self._applied = None
        self.answered = False
        self.balancer.num_tasks = len(self._all_names)
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
        """The present tasks' last weights, (P,), float64; their own where there are none yet."""
        last = self._last if self._present is None else self._last[self._present]
        return last.where(~last.isnan(), self._own.to(last.device))

    def _keep(self, weights: Tensor) -> None:
        self._applied = weights
        if self._present is None:
            self._last = weights
        else:
            self._last = self._last.to(weights).clone()
            self._last[self._present] = weights

    @property
    def num_tasks(self) -> int:
        """How many tasks there are in all."""
        return len(self._all_names)

    def _give_preference(self) -> None:
        if self.needs == "nothing":
            return
        if self.balancer.preference == "none" and not (self._own == 1).all():
            raise balancer_errors.cannot_follow(self.balancer, self._names, self._own)
        if self.balancer.preference == "steer":
            self.balancer.own = self._own

    @property
    def fresh(self) -> bool:
        """Whether this step is one that asks for new weights."""
        return self._age % self.settings.every == 0 or bool(self._last[self._present or slice(None)].isnan().any())

    def _weigh(self, losses: Sequence[Tensor]) -> Sequence[Tensor]:
        at_hand = torch.stack(list(losses)).detach().double()
        weights = self._ask(at_hand)
        self._keep(weights)
        return list(weights.unbind())

    def _ask(self, losses: Tensor, gramian: Tensor | None = None) -> Tensor:
        """The balancer's weights, with the tasks' own in them as it wants it."""
        if self.needs != "past":
            self._check_losses(losses)
        own = self._own.to(losses.device)
        steered = self.balancer.preference == "steer"
        with balancer_errors.naming(self.balancer):
            if steered:
                weights = self.balancer.weights(losses, gramian)
            else:
                given = None if gramian is None else gramian * own.outer(own)
                weights = self.balancer.weights(own * losses, given)
        if not isinstance(weights, Tensor) or weights.shape != own.shape:
            raise balancer_errors.wrong_shape(self.balancer, weights, len(own))
        if weights.device.type == "cpu" and not weights.isfinite().all():  # elsewhere it would wait for the device
            raise balancer_errors.not_finite(self.balancer, self._names, losses, by_losses=gramian is None)
        weights = weights.detach().to(own)
        return weights if steered else own * weights

    def _check_losses(self, losses: Tensor) -> None:
        """Raises a UserError for losses that aren't finite, where looking doesn't mean to wait for a device."""
        if losses.device.type != "cpu" or losses.isfinite().all():
            return
        named = zip(self._names, losses.tolist(), strict=True)
        raise NotFinite({name: f"its loss is {loss}" for name, loss in named if not math.isfinite(loss)})

    def balance(
        self, rows: Rows, losses: Sequence[Tensor], *, may_overflow: bool, alone_for_now: bool = False
    ) -> dict[str, Tensor]:
        """Asks the balancer for weights, if it is time, and leaves the combination of the rows in `.grad`.

        Args:
            rows: the tasks' gradients.
            losses: the tasks' losses.
            may_overflow: gradients that aren't finite are left to a scaler, which will skip the step.
            alone_for_now: whether it is no mistake if the tasks share no parameter: what they share is still frozen.

        Returns:
            The weights by task, see `applied`.

        Raises:
            NotFinite: for gradients that aren't.
        """
        self._balance(rows, losses, may_overflow, alone_for_now)
        return self.applied(losses[0].device)

    def _balance(self, rows: Rows, losses: Sequence[Tensor], may_overflow: bool, alone_for_now: bool) -> None:
        at_hand = torch.stack(list(losses)).double()
        by_itself = len(self._names) == 1 and len(self._all_names) > 1
        if by_itself or (alone_for_now and not rows.shared()):  # a gradient stays as it is
            self._applied = self._alone(at_hand)
            rows.combine(self._applied.tolist(), self._applied.tolist())
            return
        if self.needs == "rows":
            if not may_overflow:
                self._check_losses(at_hand)
            if self._all_finite(rows.finite(), may_overflow):
                self._combine_rows(rows, at_hand)
                return
        elif self.fresh:
            count = len(self._own)
            products = rows.gramian() if self.balancer.over == "shared" else rows.gramian_of_all()
            read = torch.cat([products.flatten(), at_hand]).cpu()  # at once, since each read waits for the GPU
            gramian, known = read[: count * count].view(count, count), read[count * count :]
            if not may_overflow:
                self._check_losses(known)
            finite = gramian.diagonal().isfinite()
            small = gramian.diagonal() < max(1e-70, 1e-50 * float(gramian.diagonal().max()))
            gramian[small], gramian[:, small] = 0.0, 0.0  # a gradient this short is none, and its weight had no room
            if self._all_finite(finite & rows.finite().cpu() if may_overflow else finite, may_overflow):
                self._keep(self._ask(known, gramian))
                self._age = 0
        weights = self.weights
        rows.combine(weights.tolist(), (weights if self.balancer.scope == "all" else self._alone(at_hand)).tolist())

    def _combine_rows(self, rows: Rows, losses: Tensor) -> None:
        own = self._own.to(losses.device)
        steered = self.balancer.preference == "steer"
        alone = self._alone(losses)
        self.answered = True
        with balancer_errors.naming(self.balancer):
            weights, direction = self.balancer.combine(
                losses if steered else own * losses, rows.stacked([1.0] * len(own) if steered else own.tolist())
            )
        weights = weights if steered else own * weights.to(own)
        self._keep(weights)
        rows.place(direction, (weights if self.balancer.scope == "all" else alone).tolist())

    def _alone(self, losses: Tensor) -> Tensor:
        return self._own * self.balancer.alone(losses).cpu()

    def _all_finite(self, finite: Tensor, may_overflow: bool) -> bool:
        if finite.all():
            return True
        if may_overflow:
            return False
        named = zip(self._names, finite.tolist(), strict=True)
        raise NotFinite({name: "its gradient is not finite" for name, right in named if not right})

    def parameters(self, like: Tensor) -> list[nn.Parameter]:
        """What the model's optimizer is to move of the balancer; they are made on the device of `like`."""
        with balancer_errors.naming(self.balancer):
            return parameters_of(self.balancer, len(self._all_names), like)

    def learn(self, losses: Sequence[Tensor]) -> None:
        """Lets the balancer give its parameters gradients from the losses of the step at hand."""
        known = torch.stack(list(losses)).double()
        with balancer_errors.naming(self.balancer):
            self.balancer.learn(self._own.to(known.device) * known if self.balancer.preference == "scale" else known)

    def after(self, losses: Sequence[Tensor], losses_now: Sequence[Tensor] | None) -> None:
        """Called when the parameters have moved.

        Args:
            losses: the step's.
            losses_now: the same with the new parameters, for a balancer that compares them.
        """
        self._age += 1
        again = None if losses_now is None else torch.stack(list(losses_now)).double()
        known = torch.stack(list(losses)).double()
        own = self._own.to(known.device) if self.balancer.preference == "scale" else 1.0
        self.balancer.after(own * known, None if again is None else own * again)

    def current(self) -> list[float]:
        """The weights of the step that was made, of the tasks in it, the tasks' own included."""
        if self.needs == "nothing":
            return self._fixed if self._present is None else [self._fixed[index] for index in self._present]
        weights: list[float] = (self.weights if self._applied is None else self._applied).tolist()
        return weights

    def applied(self, device: torch.device) -> dict[str, Tensor]:
        """The weights of the step that was made, by task, 0-dim float32."""
        if self.needs != "nothing":
            weights = (self.weights if self._applied is None else self._applied).to(device, torch.float32)
            return dict(zip(self._names, weights.unbind(), strict=True))
        if self._on_device is None or self._on_device[0] != device:
            self._on_device = device, dict(zip(self._all_names, torch.tensor(self._fixed, device=device), strict=True))
        return {name: self._on_device[1][name] for name in self._names}

    def state_dict(self) -> dict[str, Any]:
        """The balancer's state, and the weights that serve until the next Gramian."""
        return {"balancer": self.balancer.state_dict(), "weights": self._last, "age": self._age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self.balancer.load_state_dict(state["balancer"])
        self._last, self._age = state["weights"], state["age"]
