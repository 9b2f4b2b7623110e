"""Equal weights."""

from typing import Any

import torch
from torch import Tensor


class Equal:
    """Every task weighs 1: the step moves along the plain sum of the tasks' gradients.

    A task's own `weight` multiplies its loss, here as with every balancer.
    """

    needs = "nothing"  # neither losses nor gradients: the weights are known before the first pass

    def weights(self, num_tasks: int) -> Tensor:
        """Ones of shape (num_tasks,), float64."""
        return torch.ones(num_tasks, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept from step to step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
