"""ConFIG: the direction that has the same cosine with every gradient."""

import torch
from torch import Tensor

from mtl.balancers._math.bisector import bisector
from mtl.balancers.balancer import Balancer, parameters_of


class ConflictFree(Balancer):
    """Weights of the direction with the same cosine to every gradient; its norm is the sum of their projections on it.

    û ∝ U⁺1, where the unit gradients are the rows of U; d = (Σ g_t·û) û. The task weights p replace the ones, as in the
    paper: the cosines are proportional to p, and d is orthogonal to the gradient of a task with weight 0. Needs the
    Gramian.

    Args:
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper and its authors' package
            use all parameters of a network; their code for multi-task learning uses `shared`.

    Raises:
        ValueError: If `over` is neither `shared` nor `all`.

    Source: Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", arXiv 2408.11104.
    """

    preference = "steer"

    def __init__(self, *, over: str = "shared") -> None:
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, of either sign. Gradients that are zero get the weight 0."""
        assert gramian is not None
        raw = bisector(gramian, self.preferences(len(gramian)))
        square = raw @ gramian @ raw
        return raw * (gramian @ raw).sum() / square if square > 0 else torch.zeros_like(raw)
