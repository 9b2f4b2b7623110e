"""SDMGrad: the shortest convex combination of the gradients, regularised towards their mean."""

import numpy as np
import torch
from torch import Tensor

from mtl.balancers._math.quadratic import minimise
from mtl.balancers.balancer import Balancer, parameters_of


class SDMGrad(Balancer):
    """Weights of MGDA regularised towards the direction of the mean gradient ḡ.

    d = (Gᵀw + λḡ)/(1 + λ), where w minimises ½‖Gᵀw + λḡ‖² over w ≥ 0, Σw = 1. It is solved exactly for the gradients of
    one batch by an active-set method; the paper updates w from step to step by gradient descent, with gradients of
    independent batches. λ = 0 is MGDA. A task whose gradient is zero counts in ḡ, but not in w, as in MGDA. Needs the
    Gramian.

    Args:
        lam: λ, at least 0; the larger, the nearer is d to ḡ.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper and its authors' code use
            `shared`.

    Raises:
        ValueError: If `lam` is negative, or if `over` is neither `shared` nor `all`.

    Source: Xiao et al., "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
    arXiv 2305.18409; the division by 1 + λ is from its authors' code.
    """

    def __init__(self, *, lam: float = 0.3, over: str = "shared") -> None:
        if not lam >= 0:
            raise ValueError(f"lam is {lam}; it must be at least 0")
        self.lam = lam
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0, with sum 1.

        Raises:
            ArithmeticError: If the solver doesn't converge because of rounding errors.
        """
        assert gramian is not None
        matrix = gramian.numpy()
        weights = np.full(len(matrix), self.lam / len(matrix))
        moving = np.flatnonzero(matrix.diagonal() > 0)
        if len(moving):
            linear = self.lam * matrix.mean(1)[moving]
            weights[moving] += minimise(matrix[np.ix_(moving, moving)], linear, simplex=True)
        return torch.from_numpy(weights / (1 + self.lam))
