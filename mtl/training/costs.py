"""Time and memory of training steps."""

import time
from collections.abc import Mapping
from typing import Any

from mtl.process.memory import peak_within
from mtl.step import Step, StepResult


class Costs:
    """Accumulates the time of all steps, and measures the memory of a few steps at the beginning.

    Args:
        step: The step of the training.

    Attributes:
        seconds: The time spent in training steps and logging, without the first step, without validation and saving,
            and without the steps whose memory was measured.
        memory_per_step: The peak memory, in bytes, of the tensors of a step, without parameters, buffers and optimizer
            state; None if it wasn't measured.
        weighed: The number of steps whose memory was measured.
    """

    def __init__(self, step: Step) -> None:
        self.seconds = 0.0
        self.memory_per_step: int | None = None
        self.weighed = 0
        # Steps differ if weights are computed in some steps only, or if tasks alternate between steps.
        self._to_weigh = max(step.balancing.settings.every, len(step.tasks))

    @property
    def wants_memory(self) -> bool:
        """Whether the memory of the next step should be measured."""
        return self.weighed < self._to_weigh

    def weigh(self, step: Step, batch: Any, *, measure: bool) -> StepResult:
        """Runs a step and measures the memory that the step needs.

        Args:
            step: The step.
            batch: The batch.
            measure: Whether gradients are measured in the step.

        Returns:
            The result of the step.
        """
        start = time.perf_counter()
        for parameter in step.parameters.values():
            parameter.grad = None  # else the gradients of the previous step would count
        result, peak = peak_within(lambda: step(batch, measure=measure), step.passes.device)
        self.memory_per_step = max([p for p in (self.memory_per_step, peak) if p is not None], default=None)
        self.weighed += 1
        self.seconds -= time.perf_counter() - start  # such a step takes longer than others
        return result

    def state_dict(self) -> dict[str, Any]:
        """Returns the costs so far, as plain data."""
        return {"seconds": self.seconds, "memory_per_step": self.memory_per_step, "weighed": self.weighed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`; other keys are ignored."""
        self.seconds, self.memory_per_step, self.weighed = state["seconds"], state["memory_per_step"], state["weighed"]
