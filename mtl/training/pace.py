"""The learning rates and the speed in each line of the log."""

import time
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from mtl import tags


class Pace:
    """Counts samples and time between two lines of the log, and stores the learning rates of the last step."""

    def __init__(self) -> None:
        self._rates: list[float] = []
        self._samples = 0
        self._start = 0.0

    def restart(self) -> float:
        """Restarts the timer, and returns the current time of the clock."""
        self._start = time.perf_counter()
        return self._start

    def note_rates(self, optimizer: Optimizer) -> None:
        """Stores the learning rates before a step, which are those that the step uses."""
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]

    def add(self, samples: int) -> None:
        """Counts the samples of a step."""
        self._samples += samples

    def take(self, optimizer: Optimizer) -> dict[str, float]:
        """Returns the learning rate of each group in the last step, and the samples per second since the last call.

        Both are by tag. The count of samples restarts at 0.
        """
        seconds = time.perf_counter() - self._start
        scalars = {}
        for index, (group, rate) in enumerate(zip(optimizer.param_groups, self._rates, strict=False)):
            scalars[tags.learning_rate(group.get("name", index if len(self._rates) > 1 else "default"))] = rate
        scalars[tags.SPEED] = self._samples / seconds
        self._samples = 0
        return scalars

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain data."""
        return {"_samples": self._samples, "_rates": self._rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`; other keys are ignored."""
        self._samples, self._rates = state["_samples"], state["_rates"]
