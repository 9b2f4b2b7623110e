"""The base class of balancers, which compute a weight for each task from the tasks' losses and gradients."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtl.balancers.learned import Learned


class Balancer:
    """Computes a weight for each task in every step; the step uses the weighted sum of the tasks' gradients.

    A subclass defines `weights`, or `combine` if it needs the rows. The attributes named in `state_names` are the
    state that lasts from step to step.

    A task without labels in a step is absent from the step. The method is then applied to the P present tasks as if
    there were no other tasks. The state covers all T tasks: the part of an absent task doesn't change, and a task that
    is present for the first time begins as in a first step. The methods `begun`, `of_present` and `put` help with such
    states.

    Attributes:
        needs: What the weights of a step depend on. `nothing`: the weights are the same in all steps. `past`: on
            earlier steps and random numbers. `losses`: on the losses of the step. `gramian`: on the Gramian of the
            step's gradients over the shared parameters. `rows`: on these gradients themselves.
        scope: What weights that depend on gradients multiply. `shared`: a task's gradient over the shared parameters;
            the gradient over parameters that only this task reaches is multiplied by `alone`. `all`: the whole gradient
            of a task, which is the same as multiplying the loss. Other weights always multiply the loss.
        over: The parameters of the Gramian. `shared`: those that at least two tasks reach. `all`: the squared gradient
            norm over the parameters that only one task reaches, those of its head, is added to the diagonal element of
            the task. `all` needs a balancer with the Gramian and the scope `all`, since a combination without the heads
            has different inner products with the gradients than the method assumes.
        preference: How the balancer uses task weights, which the user sets. `scale`: losses and gradients are
            multiplied by the task weights before the balancer gets them. `steer`: the method is invariant to the scale
            of the losses; the balancer gets them unscaled, reads the task weights from `own`, and includes them in the
            result. `none`: the method can't use task weights.
        needs_losses_after: Whether `after` needs the losses after the step as well.
        own: The task weights, (T,), float64, on the CPU, if `preference` is `steer`.
        num_tasks: T, the number of all tasks, set once by the caller. None means the number of tasks in the step.
        present: The indices of the tasks in the step, (P,), int64, ascending, on the CPU, set by the caller before each
            step and valid until `after` returns. None means all tasks.
        learned: Numbers that are learned together with the model, for methods that have such numbers. The model's
            optimizer may train them, see `parameters`.
        state_names: The names of the attributes to save in checkpoints: numbers, tensors, nested containers of numbers
            and tensors, generators, and objects that have a `state_dict`.
    """

    needs: ClassVar[str] = "gramian"
    preference: ClassVar[str] = "scale"
    needs_losses_after: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ()
    scope: str = "shared"
    over: str = "shared"
    own: Tensor | None = None
    num_tasks: int | None = None
    present: Tensor | None = None
    learned: Learned | None = None

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights of a step.

        Args:
            losses: The losses, (P,), float64; on the CPU if `needs` is `gramian`, else on the model's device. NaN if
                `needs` is `nothing` or `past`. If `needs` is `nothing`, this method is called only once.
            gramian: The Gramian, (P, P), float64, on the CPU, if `needs` is `gramian`; else None.

        Returns:
            The weights, (P,).
        """
        raise NotImplementedError

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Combines the rows to a direction over the shared parameters, for balancers that need the rows.

        Args:
            losses: The losses, (P,), float64, on the model's device.
            rows: By parameter name, the gradients of all tasks, (P, *shape). The balancer may change and keep them.

        Returns:
            The factor of each task's gradient, (P,), for the log, and the direction by parameter name.
        """
        raise NotImplementedError

    def alone(self, losses: Tensor) -> Tensor:
        """Returns the factor of the gradients over parameters that only one task reaches, (P,), by default 1.

        The task weight is applied in addition.
        """
        return torch.ones_like(losses)

    def parameters(
        self, count: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[nn.Parameter]:
        """Returns the parameters that the model's optimizer trains: one for each task if `optimizer` is `model`.

        Args:
            count: T, the number of tasks.
            device, dtype: The device and the data type of the parameters, which the first call creates.
        """
        learned = self.learned
        return learned.parameters(count, device=device, dtype=dtype) if isinstance(learned, Learned) else []

    def learn(self, losses: Tensor) -> None:
        """Computes the gradients of `parameters` from the losses, (P,), float64, before the parameter update."""

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Called after the parameter update.

        Args:
            losses: The losses of the step, (P,), float64, on the model's device.
            again: The losses after the update, with the same batch and random numbers; None without
                `needs_losses_after`.
        """

    def epoch_end(self) -> None:
        """Called after the last step of each epoch."""

    def preferences(self, count: int) -> Tensor:
        """Returns the task weights of the present tasks, (P,), float64, on the CPU, for a `preference` of `steer`.

        Args:
            count: P, the number of present tasks; the weights are 1 if none were set.
        """
        return torch.ones(count, dtype=torch.float64) if self.own is None else self.of_present(self.own)

    def begun(self, state: Tensor | None, like: Tensor, value: float = 0.0) -> Tensor:
        """Returns the state (T, ...) on the device of `like` (P, ...), or a new one filled with `value`."""
        if state is None or state.shape[1:] != like.shape[1:]:
            return like.new_full((self.num_tasks or len(like), *like.shape[1:]), value)
        return state.to(like.device)

    def of_present(self, state: Tensor) -> Tensor:
        """Returns the part (P, ...) of a state (T, ...) for the present tasks, or the state itself if all are."""
        return state if self.present is None else state[self._at(state.device, self.present)]

    def put(self, state: Tensor, part: Tensor) -> Tensor:
        """Writes the part for the present tasks into the state and returns it; if all are present, returns the part."""
        return part if self.present is None else state.index_copy_(0, self._at(state.device, self.present), part)

    @staticmethod
    def _at(device: torch.device, present: Tensor) -> Tensor:
        return present.to(device, non_blocking=True)  # a blocking copy would wait until the GPU is idle

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that lasts from step to step."""
        state: dict[str, Any] = {}
        for name in self.state_names:
            value = getattr(self, name)
            if isinstance(value, torch.Generator):
                value = value.get_state()
            elif hasattr(value, "state_dict"):
                value = value.state_dict()
            state[name] = value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from `state_dict`; the state is copied, since later steps change it in place."""
        state = copy.deepcopy(state)
        for name in self.state_names:
            value = getattr(self, name)
            if isinstance(value, torch.Generator):
                value.set_state(state[name])
            elif hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])


def parameters_of(over: str, scope: str | None = None) -> tuple[str, str]:
    """Returns the attributes `over` and `scope` for a balancer's arguments.

    Args:
        over: `shared` or `all`.
        scope: `shared` or `all`; None if the balancer has no such argument, so that the scope is the same as `over`.

    Raises:
        ValueError: If a value is unknown, or if `over` is `all` and `scope` is `shared`.
    """
    for name, value in (("over", over), ("scope", scope)):
        if value not in ("shared", "all", None):
            raise ValueError(f"{name}: '{value}' is not one of shared, all")
    if over == "all" and scope == "shared":
        raise ValueError(
            "over: 'all' computes the weights for the whole gradients, heads included, but with scope 'shared' they "
            "would multiply only the gradients over the shared parameters; set scope to all"
        )
    return over, scope or over


TINY = 1e-30  # smaller losses count as zero: in float32 their gradients vanish and their inverses overflow


def inverse(losses: Tensor) -> Tensor:
    """Returns 1/L, the derivative of log L; 0 for a loss of zero, which is minimal, and NaN for a negative loss."""
    inverses = torch.where(losses > TINY, 1 / losses, 0.0)
    return torch.where(losses >= 0, inverses, torch.nan)


def generator(seed: int, device: torch.device | None = None) -> torch.Generator:
    """Creates a random generator for a balancer, which doesn't affect the model's random numbers, such as dropout."""
    return torch.Generator(device or "cpu").manual_seed(seed)
