"""MoCo: gradients averaged over steps before they are balanced."""

import numpy as np
import torch
from torch import Tensor

from mtl.balancers._math.gramian import gramian
from mtl.balancers._math.quadratic import minimise
from mtl.balancers.balancer import Balancer


class MoCo(Balancer):
    """MGDA by small steps on running averages of the gradients, so that the noise of batches does no harm.

    y_t ← y_t − β(y_t − g_t); λ ← Π(λ − γ(YYᵀ + ρI)λ), Π the projection on the simplex; d = Yᵀλ. β falls with the square
    root of the number of steps that had the task, γ with that of the task present that had most. The averages begin at
    zero; they take as much memory as the gradients. The λ of the tasks present are brought to the sum 1 for the step,
    and what is kept has the sum that it had before: so it stays 1 for all tasks.

    This is the paper's. LibMTL's is another: it gives each gradient the length of its loss before it is averaged, and
    has a softmax in place of the projection.

    Args:
        beta: of the averages, in (0, 1].
        gamma: step size of λ, above 0.
        rho: what is added to the diagonal, at least 0.

    Source: Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Stochastic
    Approach", arXiv 2210.12624.
    """

    needs = "rows"
    kept = ("averages", "simplex", "steps")

    def __init__(self, *, beta: float = 0.5, gamma: float = 0.1, rho: float = 0.0) -> None:
        if not 0 < beta <= 1 or not gamma > 0 or not rho >= 0:
            raise ValueError(f"beta {beta} must be in (0, 1], gamma {gamma} above 0, rho {rho} at least 0")
        self.beta = beta
        self.gamma = gamma
        self.rho = rho
        self.averages: dict[str, Tensor] = {}
        self.simplex: Tensor | None = None  # λ
        self.steps: Tensor | None = None  # that each task was present in, on the CPU like λ

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights λ, at least 0, their sum 1, and the direction."""
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
        found = torch.from_numpy(minimise(np.eye(count), (moved.max() - moved).numpy(), simplex=True))
        self.simplex = self.put(self.simplex, found * total)
        return found, {name: _mix(found, average) for name, average in rows.items()}


def _mix(weights: Tensor, row: Tensor) -> Tensor:
    mixed: Tensor = torch.tensordot(weights.to(row), row, dims=1)
    return mixed
