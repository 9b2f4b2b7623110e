"""Equal weights."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer


class Equal(Balancer):
    """Every task weighs 1: the step moves along the plain sum of the tasks' gradients.

    A task's own `weight` multiplies its loss, here as with every balancer.
    """

    needs = "nothing"

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Ones."""
        return torch.ones(len(losses), dtype=torch.float64)
