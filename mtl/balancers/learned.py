"""A learned number for each task, for balancers that learn their weights together with the model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MEAN, SQUARE, TINY = 0.9, 0.999, 1e-8  # Adam's β₁, β₂ and ε


class Learned:
    """One learned number for each task, created at first use, when the number of tasks and the device are known.

    The numbers are learned by a separate Adam or by the model's optimizer. The separate Adam has averages and a step
    count for each task, since a task may be absent from steps; torch's Adam would count these steps, and would change
    the number of the absent task. With the model's optimizer, each number is a parameter, which has no gradient while
    the task is absent.

    Args:
        lr: The learning rate of the separate Adam, above 0.
        weight_decay: The weight decay of the separate Adam, at least 0: this value times the number is added to the
            gradient.
        initial: The initial value of the numbers: one for all tasks, or one for each task in their order.
        optimizer: `own`, the separate Adam, or `model`, the model's optimizer, to which the caller adds `parameters`.

    Raises:
        ValueError: If an argument is not one of these values.
    """

    def __init__(
        self, *, lr: float, weight_decay: float = 0.0, initial: float | Sequence[float] = 0.0, optimizer: str = "own"
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be above 0")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must be at least 0")
        if optimizer not in ("own", "model"):
            raise ValueError(f"optimizer: '{optimizer}' is not one of own, model")
        self.lr = lr
        self.weight_decay = weight_decay
        self.initial = torch.as_tensor(initial, dtype=torch.float64)
        if self.initial.ndim > 1 or not self.initial.isfinite().all():
            raise ValueError(f"init is {initial}; it must be a finite number, or a list with one for each task")
        self.by_model = optimizer == "model"
        self._state: Tensor | None = None  # numbers, averages of gradients and of their squares, steps: (4, T)
        self._parameters: list[nn.Parameter] = []  # the numbers, if the model's optimizer trains them

    def parameters(
        self, count: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[nn.Parameter]:
        """Returns the numbers as 0-dim parameters for the model's optimizer; an empty list with the separate Adam.

        Args:
            count: T, the number of tasks.
            device, dtype: The device and the data type of the parameters, which the first call creates.

        Raises:
            ValueError: If `count` differs from that of the first call, or from the number of initial values.
        """
        if not self.by_model:
            return []
        if not self._parameters:
            start = self._start(count).to(device=device, dtype=dtype or torch.get_default_dtype())
            self._parameters = [nn.Parameter(value.clone()) for value in start]
        if len(self._parameters) != count:
            raise ValueError(f"there are parameters for {len(self._parameters)} tasks, not {count}")
        return self._parameters

    def _start(self, count: int) -> Tensor:
        if self.initial.ndim and len(self.initial) != count:
            raise ValueError(f"init has {len(self.initial)} numbers, and there are {count} tasks")
        return self.initial.expand(count)

    def at(self, count: int, device: torch.device) -> Tensor:
        """Returns a copy of the numbers, (count,), float64, on the device; the separate Adam's state is moved there.

        Raises:
            ValueError: If `count` differs from the number of initial values.
        """
        if self.by_model:
            self.parameters(count, device=device)
            return self.values.to(device)
        if self._state is None:
            self._state = torch.zeros(4, count, dtype=torch.float64, device=device)
            self._state[0] = self._start(count)
        self._state = self._state.to(device)
        return self.values.clone()

    @property
    def values(self) -> Tensor:
        """The numbers, (T,), float64, available after the first use; an assigned tensor is copied into them."""
        if self.by_model:
            return torch.stack([parameter.detach() for parameter in self._parameters]).double()
        assert self._state is not None
        return self._state[0]

    @values.setter
    def values(self, values: Tensor) -> None:
        if self.by_model:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, values, strict=True):
                    parameter.copy_(value)
        else:
            self.values.copy_(values)

    def step(self, gradient: Tensor, present: Tensor | None = None) -> None:
        """Updates the numbers by a step of the separate Adam, or sets the `.grad` that the model's optimizer uses.

        Only after the first use.

        Args:
            gradient: The gradient of the numbers of the present tasks, (P,).
            present: The indices of the present tasks, (P,), int64; None means all. Other numbers don't change.
        """
        if self.by_model:
            numbers = range(len(gradient)) if present is None else present.tolist()
            for number, slope in zip(numbers, gradient, strict=True):
                self._parameters[number].grad = slope.to(self._parameters[number])
            return
        assert self._state is not None
        at = slice(None) if present is None else present.to(self._state.device, non_blocking=True)
        values, mean, square, steps = self._state[:, at].unbind()
        gradient = gradient.to(values) + self.weight_decay * values
        steps = steps + 1
        mean = mean.lerp(gradient, 1 - MEAN)
        square = SQUARE * square + (1 - SQUARE) * gradient.square()
        length = square.sqrt() / (1 - SQUARE**steps).sqrt() + TINY
        values = values - self.lr / (1 - MEAN**steps) * mean / length
        self._state[:, at] = torch.stack([values, mean, square, steps])

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, without the settings.

        With the separate Adam: the numbers, its two averages and its step counts, (4, T); None before the first use.
        With the model's optimizer: the numbers, (T,), since the optimizer saves the rest.
        """
        if self.by_model:
            return {"numbers": self.values.clone() if self._parameters else None}
        return {"state": None if self._state is None else self._state.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from `state_dict`; possible before the first use as well."""
        if not self.by_model:
            self._state = None if state["state"] is None else state["state"].clone()
        elif state["numbers"] is not None:
            self.parameters(len(state["numbers"]))
            self.values = state["numbers"]
