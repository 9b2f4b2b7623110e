"""FairGrad: α-fair gains of the tasks."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, parameters_of

RATIO = 2.0  # the largest ratio of successive powers 1/α on the path from α = 1 to the requested α
RIDGE = 1e-12  # relative to each gradient's squared norm; bounds the weights at a Pareto-stationary point


class FairGrad(Balancer):
    """Weights w > 0 with Mw = w^(−1/α): the direction that maximises the α-fair utility of the tasks' gains d·g_t.

    w minimises the strictly convex ½wᵀMw − Σ w^(1−1/α)/(1−1/α), in which log w replaces the power for α = 1, which is
    Nash-MTL. It is solved by a damped Newton method. The task weights p multiply the utilities: Mw = (p/w)^(1/α). Needs
    the Gramian M.

    The authors' code multiplies d by T and then clips the gradient over the shared parameters, without the heads, at a
    norm of 1: `clip_shared_norm=1.0` of `mtl.Step`, `trainer.clip_shared_norm=1` in a config.

    Args:
        alpha: The fairness α, above 0: near 0 the sum of the gains counts, 1 is proportional fairness, and for large
            values only the smallest gain counts. Far above 10, with gradients of very different norms, the weights may
            exceed the range of floating-point numbers, which is an error.
        scope: What the weights multiply: the gradients over the `shared` parameters, as in the paper and its authors'
            code, or `all` of a task's gradient, heads included, as in LibMTL.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones or, with a scope
            of `all`, `all` of them, heads included. The paper and its authors' code use `shared`.

    Raises:
        ValueError: If `alpha` is not above 0, or if `scope` or `over` is invalid.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", arXiv 2402.15638.
    """

    preference = "steer"

    def __init__(self, *, alpha: float = 1.0, scope: str = "shared", over: str = "shared") -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; it must be above 0")
        self.alpha = alpha
        self.over, self.scope = parameters_of(over, scope)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, above 0; 0 for a task whose gradient or task weight is zero.

        Raises:
            ArithmeticError: If Newton's method doesn't converge.
        """
        assert gramian is not None
        return solve(gramian, self.alpha, self.preferences(len(gramian)))


def solve(gramian: Tensor, alpha: float, preferences: Tensor) -> Tensor:
    """Returns the w with Mw = (p/w)^(1/α), (T,); 0 for a task whose gradient or preference is zero.

    Newton's method solves the problem for α = 1, then for values that approach the requested α, each time starting from
    the previous solution, because Newton's method may cycle if it starts far from the solution and the norms of the
    gradients are very different.

    Args:
        gramian: M, (T, T).
        alpha: α, above 0.
        preferences: p, (T,).

    Raises:
        ArithmeticError: If Newton's method doesn't converge.
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
    """Rescales the weights, so that the solution for a diagonal matrix is 1, whatever the scale of the gradients.

    With w_t = v_t·m_t, the equation Mw = (p/w)^power becomes Av = v^(−power).

    Args:
        matrix: M, (T, T).
        wanted: p, (T,).
        power: 1/α.

    Returns:
        m, (T,); A, (T, T); and r, (T,), with which diag(r)·A is symmetric.
    """
    target = wanted**power
    m = (target / matrix.diagonal()) ** (1 / (1 + power))
    r = m.pow(1 - power) * target
    return m, matrix * torch.outer(m, m) / r.unsqueeze(1) + RIDGE * torch.eye(len(m), dtype=torch.float64), r


def _newton(system: Tensor, r: Tensor, v: Tensor, power: float) -> Tensor:
    """Returns the v > 0 with Av = v^(−power), the minimum of a convex function with the gradient r·(Av − v^(−power)).

    Args:
        system, r: A and r of `_scaled`.
        v: The starting point.
        power: 1/α.
    """
    off = torch.inf
    residual = system @ v - v.pow(-power)
    for _ in range(100):
        off = float(residual.abs().max() / (system.abs() @ v + v.pow(-power)).max())
        if off <= 1e-13:
            return v
        step = -torch.linalg.solve(system + torch.diag(power * v.pow(-power - 1)), residual)
        # The step is shortened so that no component falls below a hundredth of its value, and so that the function
        # rises at the end of the step at most half as steeply as it falls at the start.
        size = float((0.99 / (-step / v).max().clamp(min=0.99)).clamp(max=1.0))
        downhill = float((r * residual) @ step)
        for _ in range(40):
            moved = v + size * step
            residual = system @ moved - moved.pow(-power)
            if float((r * residual) @ step) <= 0.5 * abs(downhill):
                break
            size /= 2
        v = moved
    if off <= 1e-9:  # rounding may prevent a smaller residual
        return v
    raise ArithmeticError(
        f"Newton's method did not converge for the weights of {len(v)} tasks; the relative residual is {off:.1e}"
    )
