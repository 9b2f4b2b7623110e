"""Aligned-MTL: the gradients made orthogonal and equally long."""

import torch
from torch import Tensor

from mtl.balancers.balancer import TINY, Balancer


class AlignedMTL(Balancer):
    """The mean of the gradients after the nearest orthogonal system, of the smallest singular value, takes their place.

    With M = VΛVᵀ, w = √λ_min · V Λ^(−½) Vᵀ · p/Σp, over the eigenvalues above the rank's tolerance; p, the tasks'
    own weights, are the paper's preferences.

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", arXiv 2305.19000.
    """

    preference = "steer"

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weights, of either sign."""
        assert gramian is not None
        values, vectors = torch.linalg.eigh(gramian)
        kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
        if not kept.any():
            return torch.zeros_like(values)
        values, vectors = values[kept], vectors[:, kept]
        preferences = self.preferences(len(gramian))
        mean = (vectors * preferences.unsqueeze(1)).sum(0) / preferences.sum().clamp(min=TINY)
        weights: Tensor = vectors @ ((values.min() / values).sqrt() * mean)
        return weights
