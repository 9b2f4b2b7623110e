"""Aligned-MTL: the mean of gradients that were made orthogonal and equally long."""

import torch
from torch import Tensor

from mtl.balancers.balancer import TINY, Balancer, parameters_of


class AlignedMTL(Balancer):
    """Weights of the mean of aligned gradients: orthogonal vectors whose norm is the smallest singular value of G.

    With M = VΛVᵀ, w = √λ_min · V Λ^(−½) Vᵀ · p/Σp, over the eigenvalues above the tolerance of the rank. The task
    weights p are the paper's preferences. Needs the Gramian M.

    Args:
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper and its authors' code use
            `shared`.

    Raises:
        ValueError: If `over` is neither `shared` nor `all`.

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", arXiv 2305.19000.
    """

    preference = "steer"

    def __init__(self, *, over: str = "shared") -> None:
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, of either sign."""
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
