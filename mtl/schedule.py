"""Schedules of task weights, for instance for auxiliary tasks that fade out or start late."""

import math

from mtl.choices import SHAPES
from mtl.errors import UserError


class Schedule:
    """A task weight that depends on the number of optimizer steps taken.

    Args:
        start: The weight at the beginning.
        end: The weight after `steps` steps, which stays the same from then on.
        steps: The number of steps of the transition, at least 1.
        shape: The shape of the transition: `linear`, or half a `cosine`, whose slope is 0 at both ends.

    Raises:
        UserError: If an argument is invalid.
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
        """Returns the weight after a number of steps."""
        part = min(step / self.steps, 1.0)
        part = part if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * part)
        return self.start * (1 - part) + self.end * part
