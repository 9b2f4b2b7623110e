"""MoCo: MGDA in small steps, with gradients averaged over steps."""

import numpy as np
import torch
from torch import Tensor

from mtl.balancers._math.gramian import gramian
from mtl.balancers._math.quadratic import minimise
from mtl.balancers.balancer import Balancer


class MoCo(Balancer):
    """MGDA in small steps on moving averages of the gradients, which reduce the bias due to the noise of batches.

    y_t ← y_t − β_k(y_t − g_t); λ ← Π(λ − γ_k(YYᵀ + ρI)λ), where Π is the projection onto the simplex; d = Yᵀλ.
    β_k = β/√k in the k-th step in which the task is present; γ_k = γ/√k with the largest k of the present tasks. The
    averages start at zero and take as much memory as the gradients. In a step, the λ of the present tasks are scaled to
    sum to 1; before they are stored, they are scaled back to their previous sum, so that the λ of all tasks still sum
    to 1. Needs the gradient of each task (the rows).

    LibMTL's method of this name is different: before the averaging it scales each gradient so that its norm is the
    task's loss, and it has a softmax instead of the projection.

    Args:
        beta: β, in (0, 1].
        gamma: The step size γ, above 0.
        rho: The regularisation ρ, at least 0.

    Raises:
        ValueError: If an argument is out of range.

    Source: Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Stochastic
    Approach", arXiv 2210.12624.
    """

    needs = "rows"
    state_names = ("averages", "simplex", "steps")

    def __init__(self, *, beta: float = 0.5, gamma: float = 0.1, rho: float = 0.0) -> None:
        if not 0 < beta <= 1 or not gamma > 0 or not rho >= 0:
            raise ValueError(f"beta {beta} must be in (0, 1], gamma {gamma} above 0, rho {rho} at least 0")
        self.beta = beta
        self.gamma = gamma
        self.rho = rho
        self.averages: dict[str, Tensor] = {}
        self.simplex: Tensor | None = None  # λ
        self.steps: Tensor | None = None  # the number of steps in which each task was present; on the CPU, as λ

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weights λ, at least 0, with sum 1, and the direction.

        Raises:
            ArithmeticError: If the projection doesn't converge because of rounding errors.
        """
        count = len(losses)
        alike = torch.full((count,), 1 / count, dtype=torch.float64)
        self.steps = self.begun(self.steps, alike)
        steps = self.of_present(self.steps) + 1
        self.steps = self.put(self.steps, steps)
        pace = (self.beta * steps**-0.5).to(losses.device, non_blocking=True)
        for name, row in rows.items():
            average = self.begun(self.averages.get(name), row)
            rows[name] = self.of_present(average).lerp_(row, pace.to(row).view(-1, *[1] * (row.ndim - 1)))
            self.averages[name] = self.put(average, rows[name])
        self.simplex = self.begun(self.simplex, alike, 1 / (self.num_tasks or count))
        share = self.of_present(self.simplex)
        total = share.sum()
        weights = share / total if total > 0 else alike
        products = gramian(average.unbind() for average in rows.values()).cpu()
        moved = weights - self.gamma * steps.max() ** -0.5 * (products @ weights + self.rho * weights)
        projected = torch.from_numpy(minimise(np.eye(count), (moved.max() - moved).numpy(), simplex=True))
        self.simplex = self.put(self.simplex, projected * total)
        return projected, {name: _mix(projected, average) for name, average in rows.items()}


def _mix(weights: Tensor, row: Tensor) -> Tensor:
    mixed: Tensor = torch.tensordot(weights.to(row), row, dims=1)
    return mixed
