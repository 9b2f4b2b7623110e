"""GLS: the geometric mean of the losses."""

import torch
from torch import Tensor

from mtl.balancers.balancer import TINY, Balancer, inverse


class GLS(Balancer):
    """Weights that make the step go down the geometric mean (Π L_t^p_t)^(1/Σp), p the tasks' own weights.

    w_t = p_t/Σp · (Π L^p)^(1/Σp) / L_t.

    Source: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning", arXiv 1904.08492.
    """

    needs = "losses"
    preference = "steer"

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0. Needs losses of at least 0; one of zero is left out of the mean."""
        inverses = inverse(losses)
        preferences = self.preferences(len(losses)).to(losses.device) * (inverses != 0)
        share = preferences / preferences.sum().clamp(min=TINY)
        mean = -(share * torch.where(inverses == 0, 1.0, inverses).log()).sum()
        return share * mean.exp() * inverses
