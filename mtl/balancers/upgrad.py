"""UPGrad: the mean of the gradients, each projected so that it conflicts with no task."""

import numpy as np
import torch
from torch import Tensor

from mtl.balancers._math.quadratic import Array, minimise
from mtl.balancers.balancer import Balancer, parameters_of


class UPGrad(Balancer):
    """Weights equivalent to averaging the projections of the gradients onto the dual cone {d: G d ≥ 0}.

    The projections are computed exactly by an active-set method. Needs the Gramian.

    Args:
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper is about all parameters of
            one objective function; for multi-task learning its authors' package, TorchJD, uses `shared`.

    Raises:
        ValueError: If `over` is neither `shared` nor `all`.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232.
    """

    def __init__(self, *, over: str = "shared") -> None:
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 1/T.

        Raises:
            ArithmeticError: If the solver doesn't converge because of rounding errors.
        """
        assert gramian is not None
        matrix = gramian.numpy()
        return torch.from_numpy(np.mean([project(matrix, row) for row in np.eye(len(matrix))], axis=0))


def project(gramian: Array, combination: Array) -> Array:
    """Returns the weights, (T,), of the projection of Gᵀu onto the dual cone of the rows of G.

    The projection is Gᵀ(u + v), where v ≥ 0 minimises ½ vᵀMv + vᵀMu; rows that are zero are left out of the problem.

    Args:
        gramian: M = G Gᵀ, (T, T).
        combination: u, (T,).

    Raises:
        ArithmeticError: If the solver doesn't converge because of rounding errors.
    """
    moving = np.flatnonzero(gramian.diagonal() > 0)
    weights = combination.copy()
    if len(moving):
        matrix = gramian[np.ix_(moving, moving)]
        weights[moving] += minimise(matrix, matrix @ combination[moving], simplex=False)
    return weights
