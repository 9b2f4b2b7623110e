"""DualProj: the mean gradient, projected so that it conflicts with no task."""

import numpy as np
import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, parameters_of
from mtl.balancers.upgrad import project


class DualProj(Balancer):
    """The direction nearest to the mean gradient along which no task's loss rises, to first order.

    d is the projection of ḡ onto the dual cone {d: G d ≥ 0}; exactly, by an active set.

    Args:
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper, on continual learning,
            projects the gradient over all parameters.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840.
    """

    def __init__(self, *, over: str = "shared") -> None:
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 1/T."""
        assert gramian is not None
        count = len(gramian)
        return torch.from_numpy(project(gramian.numpy(), np.full(count, 1 / count)))
