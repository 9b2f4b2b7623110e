"""ExcessMTL: higher weights for tasks that are far from convergence."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer


class ExcessMTL(Balancer):
    """Weights that grow with each task's excess risk, which is estimated from its gradients.

    e_t = g_tᵀ diag(Σ_steps g_t²)^(−½) g_t, divided by its value in the first step in which it isn't zero;
    w ← w·exp(η e); d = Σ w_t g_t. The weights of a step sum to P, the number of present tasks; before they are
    stored, they are scaled back to their previous sum, so that the sum over all tasks doesn't change. The weights
    multiply the losses, so they apply to the heads as well. Needs the gradient of each task (the rows); the sums of
    squares take as much memory as the gradients do in float64.

    Args:
        eta: The step size η, above 0.

    Raises:
        ValueError: If `eta` is not above 0.

    Source: He et al., "Robust Multi-Task Learning with Excess Risks", arXiv 2402.02009. As in the authors' code, the
    sum of the weights is P, while it is 1 in the paper, and the first step doesn't change the weights.
    """

    needs = "rows"
    scope = "all"
    state_names = ("squares", "first", "logits")

    def __init__(self, *, eta: float = 0.01) -> None:
        if not eta > 0:
            raise ValueError(f"eta is {eta}; it must be above 0")
        self.eta = eta
        self.squares: dict[str, Tensor] = {}
        self.first: Tensor | None = None  # e in the first step in which it isn't zero; 0 before that step
        self.logits: Tensor | None = None  # log w

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weights, above 0, with sum P, and the direction."""
        excess = torch.zeros_like(losses)
        for name, row in rows.items():
            # In float64: the squares of gradients of 1e-25 would be zero in float32.
            square = row.double().square()
            squares = self.begun(self.squares.get(name), square)
            total = self.of_present(squares) + square
            self.squares[name] = self.put(squares, total)
            excess += (square / total.sqrt()).nan_to_num().flatten(1).sum(1)
        self.first, self.logits = self.begun(self.first, excess), self.begun(self.logits, excess)
        first, logits = self.of_present(self.first), self.of_present(self.logits)
        relative = (excess / first).nan_to_num(posinf=0.0)  # 0 in the first step of a task
        moved = logits + self.eta * relative
        self.first = self.put(self.first, torch.where(first > 0, first, excess))
        self.logits = self.put(self.logits, moved - moved.logsumexp(0) + logits.logsumexp(0))
        weights = len(losses) * moved.softmax(0)
        return weights, {name: torch.tensordot(weights.to(row), row, dims=1) for name, row in rows.items()}
