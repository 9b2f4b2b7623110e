"""What each line of the log says besides losses and gradients: the learning rates and the speed."""

import time
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from mtl import tags


class Pace:
    """Counts samples and time between two lines of the log, and remembers the rates of the last step."""

    def __init__(self) -> None:
        self._rates: list[float] = []
        self._samples = 0
        self._start = 0.0

    def restart(self) -> float:
        """Begins to count the time anew; returns the clock's reading."""
        self._start = time.perf_counter()
        return self._start

    def note_rates(self, optimizer: Optimizer) -> None:
        """Remembers the learning rates before a step, with which the optimizer takes it."""
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]

    def add(self, samples: int) -> None:
        """Counts the samples of a step."""
        self._samples += samples

    def take(self, optimizer: Optimizer) -> dict[str, float]:
        """The last step's learning rate for each group, and the samples a second since the last call, by tag."""
        seconds = time.perf_counter() - self._start
        scalars = {}
        for index, (group, rate) in enumerate(zip(optimizer.param_groups, self._rates, strict=False)):
            scalars[tags.learning_rate(group.get("name", index if len(self._rates) > 1 else "default"))] = rate
        scalars[tags.SPEED] = self._samples / seconds
        self._samples = 0
        return scalars

    def state_dict(self) -> dict[str, Any]:
        """What the next line of the log will say, as plain data."""
        return {"_samples": self._samples, "_rates": self._rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`; other keys are ignored."""
        self._samples, self._rates = state["_samples"], state["_rates"]
