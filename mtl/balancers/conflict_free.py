"""ConFIG: the direction that has the same cosine with every gradient."""

import torch
from torch import Tensor

from mtl.balancers._math.bisector import bisector
from mtl.balancers.balancer import Balancer, parameters_of


class ConflictFree(Balancer):
    """The direction at the same angle to every task's gradient, as long as the gradients' projections on it together.

    û ∝ U⁺1 with the unit gradients as rows of U; d = (Σ g_t·û) û. The tasks' own weights p take the place of the ones,
    as the paper's weights do: the cosines are in the ratio of p. A task of weight 0 has d at right angles.

    Args:
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper and its authors' package
            take all parameters of a network; their code for multi-task learning takes the shared ones.

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
