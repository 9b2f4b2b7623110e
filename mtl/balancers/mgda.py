"""MGDA: the shortest convex combination of the gradients."""

import numpy as np
import torch
from torch import Tensor

from mtl.balancers._math.quadratic import minimise
from mtl.balancers.balancer import Balancer, parameters_of


class MGDA(Balancer):
    """Weights of the shortest convex combination of the gradients, along which no task's loss rises, to first order.

    w minimises ‖Gᵀw‖² over w ≥ 0, Σw = 1; solved exactly by an active-set method. A task whose gradient is zero gets
    the weight 0: the formula would give it all the weight, and the other tasks would stop learning. Needs the Gramian.

    Args:
        normalise: The divisor of each gradient before the solution: `none`, its norm (`l2`), the task's loss (`loss`),
            or the product of both (`loss+`).
        combine: What the weights of normalised gradients multiply: the `normalised` gradients, as in LibMTL, so that
            the weights of the gradients themselves are divided by the divisors; or the `raw` gradients, as in the
            authors' code and nash-mtl.
        scope: What the weights multiply: the gradients over the `shared` parameters, as in the paper's algorithm, or
            `all` of a task's gradient, heads included, as in the authors' code, where they multiply the losses.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones or, with a scope
            of `all`, `all` of them, heads included. The paper and its authors' code use `shared`.

    Raises:
        ValueError: If an argument is none of these values.

    Source: Désidéri 2012; for multi-task learning Sener and Koltun, "Multi-Task Learning as Multi-Objective
    Optimization", arXiv 1810.04650, whose code has the four ways to normalise.
    """

    def __init__(
        self, *, normalise: str = "none", combine: str = "normalised", scope: str = "shared", over: str = "shared"
    ) -> None:
        if normalise not in ("none", "l2", "loss", "loss+"):
            raise ValueError(f"normalise: '{normalise}' is not one of none, l2, loss, loss+")
        if combine not in ("normalised", "raw"):
            raise ValueError(f"combine: '{combine}' is not one of normalised, raw")
        self.normalise = normalise
        self.combine_raw = combine == "raw"
        self.over, self.scope = parameters_of(over, scope)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0; the sum is 1 if nothing is normalised, or the raw gradients are combined.

        Raises:
            ArithmeticError: If the gradients are to be divided by a negative loss, or if the solver doesn't converge
                because of rounding errors.
        """
        assert gramian is not None
        matrix = gramian.numpy()
        divisor = np.ones(len(matrix))
        if self.normalise in ("l2", "loss+"):
            divisor = divisor * np.sqrt(matrix.diagonal())
        if self.normalise in ("loss", "loss+"):
            if (losses < 0).any():
                raise ArithmeticError(
                    f"normalise={self.normalise} needs losses of at least 0, but the losses are {losses.tolist()}"
                )
            divisor = divisor * losses.numpy()
        moving = np.flatnonzero((matrix.diagonal() > 0) & (divisor > 0))
        weights = np.zeros(len(matrix))
        if len(moving):
            scaled = matrix[np.ix_(moving, moving)] / np.outer(divisor[moving], divisor[moving])
            weights[moving] = minimise(scaled, np.zeros(len(moving)), simplex=True)
            if not self.combine_raw:
                weights[moving] /= divisor[moving]
        return torch.from_numpy(weights)
