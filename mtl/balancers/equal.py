"""Equal weights."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer


class Equal(Balancer):
    """A weight of 1 for every task: the direction is the sum of the tasks' gradients.

    The task weights multiply the losses. Needs neither losses nor gradients.
    """

    needs = "nothing"

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Returns ones, (P,)."""
        return torch.ones(len(losses), dtype=torch.float64)
