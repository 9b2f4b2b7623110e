"""UW-SO: weights from the inverse losses."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer


class UWSO(Balancer):
    """The analytic optimum of uncertainty weighting, 1/L_t, through a softmax: w = p·softmax((1/L)/τ).

    The losses count without the tasks' own weights p, which multiply the result.

    Args:
        temperature: τ, above 0. It has the unit of 1/L and is to be tuned.

    Source: Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning", arXiv 2408.07985.
    """

    needs = "losses"
    preference = "steer"

    def __init__(self, *, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.temperature = temperature

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0; their sum is 1 with own weights of 1. Needs losses of at least 0."""
        inverse = (1 / losses / self.temperature).clamp(max=torch.finfo(losses.dtype).max)
        weights = self.preferences(len(losses)).to(losses.device) * inverse.softmax(0)
        return torch.where(losses < 0, torch.nan, weights)
