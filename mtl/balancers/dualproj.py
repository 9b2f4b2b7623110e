"""DualProj: the mean gradient, projected so that it conflicts with no task."""

import numpy as np
import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, parameters_of
from mtl.balancers.upgrad import project


class DualProj(Balancer):
    """Weights of the direction nearest to the mean gradient along which no task's loss rises, to first order.

    d is the projection of ḡ onto the dual cone {d: G d ≥ 0}, computed exactly by an active-set method. Needs the
    Gramian.

    Args:
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper, on continual learning,
            projects the gradient over all parameters.

    Raises:
        ValueError: If `over` is neither `shared` nor `all`.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840.
    """

    def __init__(self, *, over: str = "shared") -> None:
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 1/T.

        Raises:
            ArithmeticError: If the solver doesn't converge because of rounding errors.
        """
        assert gramian is not None
        count = len(gramian)
        return torch.from_numpy(project(gramian.numpy(), np.full(count, 1 / count)))
