"""UW-SO: weights from the inverse losses."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer


class UWSO(Balancer):
    """Weights w = p·softmax((1/L)/τ), where 1/L_t is the analytic optimum of uncertainty weighting.

    The task weights p multiply the result, not the losses L. Needs the losses of the step.

    Args:
        temperature: τ, above 0. It has the unit of 1/L and must be tuned.

    Raises:
        ValueError: If `temperature` is not above 0.

    Source: Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning", arXiv 2408.07985.
    """

    needs = "losses"
    preference = "steer"

    def __init__(self, *, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.temperature = temperature

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0, with sum 1 if the task weights are 1; NaN for a negative loss."""
        inverse = (1 / losses / self.temperature).clamp(max=torch.finfo(losses.dtype).max)
        weights = self.preferences(len(losses)).to(losses.device) * inverse.softmax(0)
        return torch.where(losses < 0, torch.nan, weights)
