"""Numbers, one a task, that are learned beside the model's parameters."""

from typing import Any

import torch
from torch import Tensor

MEAN, SQUARE, TINY = 0.9, 0.999, 1e-8  # Adam's β₁, β₂ and ε


class Learned:
    """One number a task, learned by Adam; they are made at first use, when it is known how many and on which device.

    Each has its own averages and its own number of steps, since a task may be absent from some: torch's Adam would
    count these too, and go on moving its number.

    Args:
        lr: learning rate, above 0.
        weight_decay: added to the gradient, times the number itself.
        initial: what each number starts from.
    """

    def __init__(self, *, lr: float, weight_decay: float = 0.0, initial: float = 0.0) -> None:
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be above 0")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must be at least 0")
        self.lr = lr
        self.weight_decay = weight_decay
        self.initial = initial
        self._state: Tensor | None = None  # numbers, averages of gradients and of their squares, steps: (4, T)

    def at(self, count: int, device: torch.device) -> Tensor:
        """A copy of the numbers as they are now, (count,), float64, on the device, where they are from now on."""
        if self._state is None:
            self._state = torch.zeros(4, count, dtype=torch.float64, device=device)
            self._state[0] = self.initial
        self._state = self._state.to(device)
        return self.values.clone()

    @property
    def values(self) -> Tensor:
        """The numbers; what is assigned is copied into them. Only after first use."""
        assert self._state is not None
        return self._state[0]

    @values.setter
    def values(self, values: Tensor) -> None:
        self.values.copy_(values)

    def step(self, gradient: Tensor, present: Tensor | None = None) -> None:
        """One step of Adam down the gradient; only after first use.

        Args:
            gradient: (P,), of the numbers that take part.
            present: which these are, (P,), int64; `None`: all. The others stay as they are.
        """
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
        """The numbers and Adam's averages and steps, (4, T), without the settings; `None` before first use."""
        return {"state": None if self._state is None else self._state.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`; also before first use."""
        self._state = None if state["state"] is None else state["state"].clone()
