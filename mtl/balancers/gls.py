"""GLS: the geometric mean of the losses."""

import torch
from torch import Tensor

from mtl.balancers.balancer import TINY, Balancer, inverse


class GLS(Balancer):
    """Weights for the gradient of the geometric mean of the losses, (Π L_t^p_t)^(1/Σp), where p are the task weights.

    w_t = p_t/Σp · (Π L^p)^(1/Σp) / L_t. Needs the losses of the step.

    Source: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning", arXiv 1904.08492.
    """

    needs = "losses"
    preference = "steer"

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0; a loss of zero is left out of the mean, a negative loss gives NaN."""
        inverses = inverse(losses)
        preferences = self.preferences(len(losses)).to(losses.device) * (inverses != 0)
        share = preferences / preferences.sum().clamp(min=TINY)
        mean = -(share * torch.where(inverses == 0, 1.0, inverses).log()).sum()
        return share * mean.exp() * inverses
