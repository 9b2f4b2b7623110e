"""DB-MTL: logarithms balance the losses, and equal lengths the gradients."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, inverse

SMALL = 1e-25  # an average shorter than this, over the longest, is zero


class DBMTL(Balancer):
    """The gradients of the log-losses, averaged over steps and brought to the length of the longest one.

    g_t of log L_t; ĝ ← g + β_k(ĝ − g), β_k = β/k^σ in the k-th step that has the task; d = Σ p_t (max‖ĝ‖/‖ĝ_t‖) ĝ_t, p
    the tasks' own weights. Heads go down log L_t. The averages begin at zero, and take as much memory as the gradients.

    Args:
        beta: of the averages, in [0, 1).
        sigma: how fast it falls.

    Source: Lin et al., "Dual-Balancing for Multi-Task Learning", arXiv 2308.12029.
    """

    needs = "rows"
    preference = "steer"
    kept = ("averages", "steps")

    def __init__(self, *, beta: float = 0.9, sigma: float = 0.0) -> None:
        if not 0 <= beta < 1 or not sigma >= 0:
            raise ValueError(f"beta {beta} must be in [0, 1), sigma {sigma} at least 0")
        self.beta = beta
        self.sigma = sigma
        self.averages: dict[str, Tensor] = {}
        self.steps: Tensor | None = None  # that each task was present in

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What each gradient counts with before it is averaged, and the direction. Needs losses of at least 0."""
        if not (losses >= 0).all():
            raise ArithmeticError(f"it takes the logarithm of the losses, which are {losses.tolist()}")
        self.steps = self.begun(self.steps, losses)
        steps = self.of_present(self.steps) + 1
        self.steps = self.put(self.steps, steps)
        beta = self.beta / steps**self.sigma
        squares = torch.zeros_like(losses)
        for name, row in rows.items():
            each = (-1, *[1] * (row.ndim - 1))
            row *= inverse(losses).to(row).view(each)
            average = self.begun(self.averages.get(name), row)
            rows[name] = self.of_present(average).lerp_(row, (1 - beta).to(row).view(each))
            self.averages[name] = self.put(average, rows[name])
            squares += rows[name].flatten(1).double().square().sum(1)
        norms = squares.sqrt()
        ratios = torch.where(norms > SMALL * norms.max(), norms.max() / norms, 0.0)
        factors = self.preferences(len(losses)).to(losses.device) * ratios
        direction = {name: torch.tensordot(factors.to(average), average, dims=1) for name, average in rows.items()}
        return factors * inverse(losses), direction

    def alone(self, losses: Tensor) -> Tensor:
        """1/L: heads go down the log-losses too."""
        return inverse(losses)
