"""DB-MTL: logarithms of the losses, and gradients of equal norm."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, inverse

SMALL = 1e-25  # an average gradient shorter than this, relative to the longest, counts as zero


class DBMTL(Balancer):
    """The sum of the log-losses' gradients, averaged over steps and scaled to the norm of the longest.

    g_t is the gradient of log L_t; ĝ ← g + β_k(ĝ − g), where β_k = β/k^σ in the k-th step in which the task is present;
    d = Σ p_t (max‖ĝ‖/‖ĝ_t‖) ĝ_t, where p are the task weights. Heads get the gradient of log L_t. The averages start at
    zero and take as much memory as the gradients. Needs the gradient of each task (the rows).

    Args:
        beta: β, in [0, 1); at 0 nothing is averaged.
        sigma: σ, at least 0; the higher, the faster β_k falls.

    Raises:
        ValueError: If `beta` or `sigma` is out of range.

    Source: Lin et al., "Dual-Balancing for Multi-Task Learning", arXiv 2308.12029.
    """

    needs = "rows"
    preference = "steer"
    state_names = ("averages", "steps")

    def __init__(self, *, beta: float = 0.9, sigma: float = 0.0) -> None:
        if not 0 <= beta < 1 or not sigma >= 0:
            raise ValueError(f"beta {beta} must be in [0, 1), sigma {sigma} at least 0")
        self.beta = beta
        self.sigma = sigma
        self.averages: dict[str, Tensor] = {}
        self.steps: Tensor | None = None  # the number of steps in which each task was present

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the factor of each task's gradient before the averaging, (P,), and the direction.

        Raises:
            ArithmeticError: If a loss is negative or NaN.
        """
        if not (losses >= 0).all():
            raise ArithmeticError(f"the logarithm needs losses of at least 0, but the losses are {losses.tolist()}")
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
        """Returns 1/L, (P,), since heads minimise the log-losses as well."""
        return inverse(losses)
