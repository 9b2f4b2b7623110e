"""What a training's steps cost: time and memory."""

import time
from collections.abc import Mapping
from typing import Any

from mtl.process.memory import peak_within
from mtl.step import Step, StepResult


class Costs:
    """Adds up the time of the steps, and measures the memory of some of the first.

    Args:
        step: of the training.

    Attributes:
        seconds: spent in training steps and logging after the first step; validation and saving are left out, and so
            are the steps whose memory was measured.
        memory_per_step: the peak, in bytes, of a step's tensors beyond parameters, buffers and optimizer state; None
            where it wasn't measured.
        weighed: the number of steps whose memory was measured.
    """

    def __init__(self, step: Step) -> None:
        self.seconds = 0.0
        self.memory_per_step: int | None = None
        self.weighed = 0
        # Steps differ where a step's weights serve the following ones, or where tasks come by turns.
        self._to_weigh = max(step.balancing.settings.every, len(step.tasks))

    @property
    def wants_memory(self) -> bool:
        """Whether the memory of more steps is to be measured."""
        return self.weighed < self._to_weigh

    def weigh(self, step: Step, batch: Any, *, measure: bool) -> StepResult:
        """Takes the step, and measures its memory.

        Args:
            step: to be taken.
            batch: its argument.
            measure: whether gradients are measured in it.
        """
        start = time.perf_counter()
        for parameter in step.parameters.values():
            parameter.grad = None  # the gradients of the step before would count
        result, peak = peak_within(lambda: step(batch, measure=measure), step.passes.device)
        self.memory_per_step = max([p for p in (self.memory_per_step, peak) if p is not None], default=None)
        self.weighed += 1
        self.seconds -= time.perf_counter() - start  # such a step takes longer than others
        return result

    def state_dict(self) -> dict[str, Any]:
        """The costs so far, as plain data."""
        return {"seconds": self.seconds, "memory_per_step": self.memory_per_step, "weighed": self.weighed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`; other keys are ignored."""
        self.seconds, self.memory_per_step, self.weighed = state["seconds"], state["memory_per_step"], state["weighed"]
