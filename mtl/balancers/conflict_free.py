"""ConFIG: the direction that has the same cosine with every gradient."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer


class ConflictFree(Balancer):
    """The direction at the same angle to every task's gradient, as long as the gradients' projections on it together.

    û ∝ U⁺1 with the unit gradients as rows of U; d = (Σ g_t·û) û.

    Source: Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", arXiv 2408.11104.
    """

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weights, of either sign. Gradients that are zero get the weight 0."""
        assert gramian is not None
        norms = gramian.diagonal().sqrt()
        weights = torch.zeros_like(norms)
        moving = norms > 0
        if not moving.any():
            return weights
        lengths = norms[moving]
        products = gramian[moving][:, moving]
        cosines = products / torch.outer(lengths, lengths)
        raw = (torch.linalg.pinv(cosines, rtol=1e-12, hermitian=True) @ torch.ones_like(lengths)) / lengths
        square = raw @ products @ raw
        if square > 0:
            weights[moving] = raw * (products @ raw).sum() / square
        return weights
