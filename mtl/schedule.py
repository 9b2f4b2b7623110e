"""A task's weight that changes over the run: auxiliary tasks that fade, or come in late."""

import math

from mtl.choices import SHAPES
from mtl.errors import UserError


class Schedule:
    """From the number of optimizer steps taken to a weight.

    Args:
        start, end: the weight at the beginning, and from `steps` steps on.
        steps: how many it takes, at least 1.
        shape: `linear`, or half a `cosine`, which is level at both ends.

    Raises:
        UserError: for values that make no weight.
    """

    def __init__(self, *, start: float, end: float, steps: int, shape: str = "linear") -> None:
        for name, value in (("start", start), ("end", end)):
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise UserError(f"{name} is {value!r}; it must be a finite number of at least 0")
        if type(steps) is not int or steps < 1:
            raise UserError(f"steps is {steps!r}; it must be a whole number of at least 1")
        if shape not in SHAPES:
            raise UserError(f"shape: '{shape}' is not one of {', '.join(SHAPES)}")
        self.start = float(start)
        self.end = float(end)
        self.steps = steps
        self.shape = shape

    def __call__(self, step: int) -> float:
        """The weight when so many steps have been taken."""
        part = min(step / self.steps, 1.0)
        part = part if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * part)
        return self.start * (1 - part) + self.end * part
