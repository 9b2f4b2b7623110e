"""FairGrad: α-fair gains for the tasks."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, parameters_of

RATIO = 2.0  # from one power 1/α to the next on the way to the one asked for
RIDGE = 1e-12  # of each gradient's square: bounds the weights at a Pareto-stationary point


class FairGrad(Balancer):
    """Weights w > 0 with Mw = w^(−1/α): the direction that maximises the α-fair utility of the tasks' gains d·g_t.

    w minimises the strictly convex ½wᵀMw − Σ w^(1−1/α)/(1−1/α), with log w in place of the power for α = 1, which is
    Nash-MTL; damped Newton finds it. The tasks' own weights p multiply their utilities: Mw = (p/w)^(1/α).

    The authors' code multiplies d by T and then clips the gradient over the shared parameters, without the heads, at a
    norm of 1: `clip_shared_norm=1.0` of `mtl.Step`, `trainer.clip_shared_norm=1` in a config.

    Args:
        alpha: fairness, above 0: from near 0, the sum of the gains, through 1, proportional fairness, to the
            smallest gain alone as it grows. Far above 10 there need not be an answer that numbers can hold where the
            gradients are of very unlike sizes; it is then an error.
        scope: what the weights multiply: what is `shared`, as in the paper and its authors' code, or `all` of a task's
            gradient, as in LibMTL.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones or, with a scope
            of `all`, `all` of them, heads included. The paper and its authors' code have the shared ones.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", arXiv 2402.15638.
    """

    preference = "steer"

    def __init__(self, *, alpha: float = 1.0, scope: str = "shared", over: str = "shared") -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; it must be above 0")
        self.alpha = alpha
        self.over, self.scope = parameters_of(over, scope)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, above 0; 0 where a gradient or a task's own weight is zero."""
        assert gramian is not None
        return solve(gramian, self.alpha, self.preferences(len(gramian)))


def solve(gramian: Tensor, alpha: float, preferences: Tensor) -> Tensor:
    """The w with Mw = (p/w)^(1/α), (T,) from (T, T) and (T,); 0 for gradients and preferences that are zero.

    Newton's method starts from α = 1 and follows the solution to the α asked for: far from there it would cycle where
    the gradients' sizes are very unlike.

    Raises:
        ArithmeticError: where Newton's method doesn't arrive.
    """
    weights = torch.zeros(len(gramian), dtype=torch.float64)
    moving = (gramian.diagonal() > 0) & (preferences > 0)
    if not moving.any():
        return weights
    matrix, wanted = gramian[moving][:, moving], preferences[moving]
    power = 1.0
    v: Tensor | None = None
    while True:
        m, system, r = _scaled(matrix, wanted, power)
        if v is None:
            v = torch.full_like(m, float(system.sum(1).mean().clamp(min=1.0) ** (-1 / (1 + power))))
        v = _newton(system, r, v, power)
        if power == 1 / alpha:
            break
        power = max(power / RATIO, 1 / alpha) if alpha > 1 else min(power * RATIO, 1 / alpha)
    weights[moving] = v * m
    return weights


def _scaled(matrix: Tensor, wanted: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """The m with which w_t = v_t·m_t is v = 1 for the diagonal alone, at any scale; the A of Av = v^(−power), whose
    rows are those of a symmetric matrix over r; and r.
    """
    target = wanted**power
    m = (target / matrix.diagonal()) ** (1 / (1 + power))
    r = m.pow(1 - power) * target
    return m, matrix * torch.outer(m, m) / r.unsqueeze(1) + RIDGE * torch.eye(len(m), dtype=torch.float64), r


def _newton(system: Tensor, r: Tensor, v: Tensor, power: float) -> Tensor:
    """The v > 0 with Av = v^(−power), where a convex function has its minimum; r times the residual is its gradient."""
    off = torch.inf
    residual = system @ v - v.pow(-power)
    for _ in range(100):
        off = float(residual.abs().max() / (system.abs() @ v + v.pow(-power)).max())
        if off <= 1e-13:
            return v
        step = -torch.linalg.solve(system + torch.diag(power * v.pow(-power - 1)), residual)
        # No component may fall to less than a hundredth, and the slope along the step not turn up again.
        size = float((0.99 / (-step / v).max().clamp(min=0.99)).clamp(max=1.0))
        downhill = float((r * residual) @ step)
        for _ in range(40):
            there = v + size * step
            residual = system @ there - there.pow(-power)
            if float((r * residual) @ step) <= 0.5 * abs(downhill):
                break
            size /= 2
        v = there
    if off <= 1e-9:  # as near as rounding lets it come
        return v
    raise ArithmeticError(f"the weights of {len(v)} tasks were not found; they are off by {off:.1e}")
