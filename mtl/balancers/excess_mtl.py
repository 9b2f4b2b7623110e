"""ExcessMTL: more weight for tasks that are far from converged."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer


class ExcessMTL(Balancer):
    """Weights that grow with each task's excess risk, estimated from its gradients.

    e_t = g_tᵀ diag(Σ_steps g_t²)^(−½) g_t, over its value in the first step where that isn't zero; w ← w·exp(η e), with
    the sum P, the number of tasks present; d = Σ w_t g_t. What is kept of them has the sum that it had before: so it
    stays T for all tasks. The sums of squares are kept in float64. The weights multiply the losses, so the heads'
    gradients too.

    Args:
        eta: step size η, above 0.

    Source: He et al., "Robust Multi-Task Learning with Excess Risks", arXiv 2402.02009. As in its authors' code the sum
    is P, where the paper has 1, and the first step leaves the weights alone.
    """

    needs = "rows"
    scope = "all"
    kept = ("squares", "first", "logits")

    def __init__(self, *, eta: float = 0.01) -> None:
        if not eta > 0:
            raise ValueError(f"eta is {eta}; it must be above 0")
        self.eta = eta
        self.squares: dict[str, Tensor] = {}
        self.first: Tensor | None = None  # the first step's e; 0 where there was none yet
        self.logits: Tensor | None = None  # log w

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the weights, above 0, their sum P, and the direction."""
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
        relative = (excess / first).nan_to_num(posinf=0.0)  # 0 where this is the first
        moved = logits + self.eta * relative
        self.first = self.put(self.first, torch.where(first > 0, first, excess))
        self.logits = self.put(self.logits, moved - moved.logsumexp(0) + logits.logsumexp(0))
        weights = len(losses) * moved.softmax(0)
        return weights, {name: torch.tensordot(weights.to(row), row, dims=1) for name, row in rows.items()}
