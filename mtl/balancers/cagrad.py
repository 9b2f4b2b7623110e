"""CAGrad: near the mean gradient, the direction that is best for the worst-off task."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.balancers._math.quadratic import RIDGE, Array, minimise
from mtl.balancers.balancer import Balancer, parameters_of

VANISHED = 1e-6  # of the gradients' lengths: what is left of a combination has no direction but that of rounding


class CAGrad(Balancer):
    """The d with the largest min_t d·g_t within ‖d − ḡ‖ ≤ c‖ḡ‖.

    By duality d = ḡ + c‖ḡ‖ g_w/‖g_w‖, with g_w = Gᵀw and the w that minimises g_w·ḡ + c‖ḡ‖‖g_w‖ over w ≥ 0, Σw = 1;
    exactly, by active sets. Where g_w = 0 is the minimum, which takes a Pareto-stationary point, that leaves d open:
    every d within the bound that conflicts with no task is then as good, and the one nearest to ḡ is taken. A task
    whose gradient is zero counts in ḡ and has no share in w: it has nothing to lose. Where ḡ is zero, so is d.

    Args:
        c: at least 0; 0 is the mean gradient, and as it grows the direction becomes that of MGDA.
        rescale: whether to divide by 1 + c².
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper and its authors' code have
            the shared ones.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", arXiv 2110.14048.
    """

    def __init__(self, *, c: float = 0.5, rescale: bool = False, over: str = "shared") -> None:
        if not c >= 0:
            raise ValueError(f"c is {c}; it must be at least 0")
        self.c = c
        self.rescale = rescale
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 1/T, or at least 1/(T(1 + c²))."""
        assert gramian is not None
        matrix = gramian.numpy()
        weights = np.full(len(matrix), 1 / len(matrix))
        moving = np.flatnonzero(matrix.diagonal() > 0)
        lengths = np.sqrt(matrix.diagonal())
        mean_length = math.sqrt(max(matrix.mean(), 0.0))
        if self.c > 0 and mean_length > VANISHED * lengths.mean():
            gains = matrix.mean(1)[moving]
            weights[moving] += _pull(matrix[np.ix_(moving, moving)], gains, self.c * mean_length)
        return torch.from_numpy(weights / (1 + self.c**2) if self.rescale else weights)


def _pull(matrix: Array, gains: Array, radius: float) -> Array:
    """The y ≥ 0 with ‖Gᵀy‖ ≤ radius that makes the smallest component of Gḡ + GGᵀy largest.

    With y = w/s, Σw = 1, it is the w that minimises ½‖Gᵀw‖² + s ḡ·Gᵀw, for the s where ‖Gᵀw‖ = radius·s. As long as
    the same tasks have w > 0, w is linear in s and ‖Gᵀw‖² = p + q s², which gives the s to try next.

    Args:
        matrix: GGᵀ, (n, n), its diagonal above zero.
        gains: Gḡ, (n,).
        radius: above 0.

    Raises:
        ArithmeticError: where s isn't found in 100 rounds, which rounding alone can bring about.
    """
    lengths = np.sqrt(matrix.diagonal())
    w = minimise(matrix, np.zeros(len(gains)), simplex=True)
    shortest = math.sqrt(max(float(w @ matrix @ w), 0.0))
    low, high = 0.5 * shortest / radius, 2 * float(lengths.max()) / radius
    if shortest <= VANISHED * (w @ lengths):
        projection = minimise(matrix, gains, simplex=False)
        if projection @ matrix @ projection <= radius**2:
            return projection
        low = 0.0
    s = _length_met(matrix, gains, radius, np.flatnonzero(w))
    for _ in range(100):
        if not low < s < high:
            s = math.sqrt(low * high) if low > 0 else high / 16
        w = minimise(matrix, s * gains, simplex=True)
        found = _length_met(matrix, gains, radius, np.flatnonzero(w))
        low, high = (s, high) if found > s else (low, s)
        if abs(found - s) <= 1e-12 * s or high - low <= 1e-12 * s:
            y: Array = w / s
            return y
        s = found
    raise ArithmeticError(f"the weights of {len(gains)} tasks were not found in 100 rounds")


def _length_met(matrix: Array, gains: Array, radius: float, inside: NDArray[np.intp]) -> float:
    """The s where ‖Gᵀw‖ = radius·s, for the w that minimises ½‖Gᵀw‖² + s ḡ·Gᵀw over the tasks inside, Σw = 1."""
    scale = 1 / np.sqrt(matrix.diagonal()[inside])
    a = matrix[np.ix_(inside, inside)] * np.outer(scale, scale) + RIDGE * np.eye(len(inside))
    free, along = np.linalg.solve(a, np.stack([-gains[inside] * scale, scale], axis=1)).T
    start = along / (scale @ along)
    slope = free - start * (scale @ free)
    p, q = float(start @ a @ start), float(slope @ a @ slope)
    return math.sqrt(p / (radius**2 - q)) if q < radius**2 else math.inf
