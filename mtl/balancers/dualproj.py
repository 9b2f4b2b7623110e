"""DualProj: the mean gradient, projected so that it conflicts with no task."""

import numpy as np
import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer
from mtl.balancers.upgrad import project


class DualProj(Balancer):
    """The direction nearest to the mean gradient along which no task's loss rises, to first order.

    d is the projection of ḡ onto the dual cone {d: G d ≥ 0}; exactly, by an active set.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840.
    """

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weights, at least 1/T."""
        assert gramian is not None
        count = len(gramian)
        return torch.from_numpy(project(gramian.numpy(), np.full(count, 1 / count)))
