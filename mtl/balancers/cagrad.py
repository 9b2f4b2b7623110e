"""CAGrad: the direction near the mean gradient that is best for the task with the smallest gain."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.balancers._math.quadratic import RIDGE, Array, minimise
from mtl.balancers.balancer import Balancer, parameters_of

VANISHED = 1e-6  # a combination shorter than this, relative to the gradients' norms, consists of rounding errors


class CAGrad(Balancer):
    """Weights of the direction d with the largest min_t d·g_t under the constraint ‖d − ḡ‖ ≤ c‖ḡ‖.

    By duality d = ḡ + c‖ḡ‖ g_w/‖g_w‖, where g_w = Gᵀw and w minimises g_w·ḡ + c‖ḡ‖‖g_w‖ over w ≥ 0, Σw = 1; solved
    exactly by an active-set method. At a Pareto-stationary point the minimum may be g_w = 0, where this formula doesn't
    define d: every d within the constraint that conflicts with no task is then optimal, and the one nearest to ḡ is
    used. A task whose gradient is zero counts in ḡ, but not in w. If ḡ is zero, d is zero. Needs the Gramian.

    Args:
        c: The radius of the constraint relative to ‖ḡ‖, at least 0; at 0 the direction is ḡ, and for large values it
            approaches that of MGDA.
        rescale: Whether to divide the weights by 1 + c².
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper and its authors' code use
            `shared`.

    Raises:
        ValueError: If `c` is negative, or if `over` is neither `shared` nor `all`.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", arXiv 2110.14048.
    """

    def __init__(self, *, c: float = 0.5, rescale: bool = False, over: str = "shared") -> None:
        if not c >= 0:
            raise ValueError(f"c is {c}; it must be at least 0")
        self.c = c
        self.rescale = rescale
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 1/T; with `rescale`, at least 1/(T(1 + c²)).

        Raises:
            ArithmeticError: If the solver doesn't converge because of rounding errors.
        """
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
    """Returns the y ≥ 0 with ‖Gᵀy‖ ≤ radius for which the smallest component of Gḡ + GGᵀy is largest.

    With y = w/s and Σw = 1, w minimises ½‖Gᵀw‖² + s ḡ·Gᵀw for the s where ‖Gᵀw‖ = radius·s. While the same tasks have
    w > 0, w is linear in s and ‖Gᵀw‖² = p + q s², from which the next s is computed.

    Args:
        matrix: GGᵀ, (n, n), with a diagonal above zero.
        gains: Gḡ, (n,).
        radius: The largest norm, above 0.

    Raises:
        ArithmeticError: If 100 rounds don't reach a solution, which only rounding errors can cause.
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
        next_s = _length_met(matrix, gains, radius, np.flatnonzero(w))
        low, high = (s, high) if next_s > s else (low, s)
        if abs(next_s - s) <= 1e-12 * s or high - low <= 1e-12 * s:
            y: Array = w / s
            return y
        s = next_s
    raise ArithmeticError(f"the search for the weights of {len(gains)} tasks did not converge in 100 rounds")


def _length_met(matrix: Array, gains: Array, radius: float, inside: NDArray[np.intp]) -> float:
    """Returns the s with ‖Gᵀw‖ = radius·s, where w minimises ½‖Gᵀw‖² + s ḡ·Gᵀw over the active tasks, Σw = 1.

    Args:
        matrix, gains, radius: See `_pull`.
        inside: The indices of the active tasks.
    """
    scale = 1 / np.sqrt(matrix.diagonal()[inside])
    a = matrix[np.ix_(inside, inside)] * np.outer(scale, scale) + RIDGE * np.eye(len(inside))
    free, along = np.linalg.solve(a, np.stack([-gains[inside] * scale, scale], axis=1)).T
    start = along / (scale @ along)
    slope = free - start * (scale @ free)
    p, q = float(start @ a @ start), float(slope @ a @ slope)
    return math.sqrt(p / (radius**2 - q)) if q < radius**2 else math.inf
