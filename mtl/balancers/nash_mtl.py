"""Nash-MTL: the bargaining solution between the tasks."""

from torch import Tensor

from mtl.balancers.balancer import Balancer
from mtl.balancers.fairgrad import solve


class NashMTL(Balancer):
    """The Nash bargaining solution: weights α > 0 with Mα = 1/α, so that every task gains alike, d·g_t = 1/α_t.

    α minimises the strictly convex ½αᵀMα − Σ log α; damped Newton finds it. Whatever the gradients, ‖Gᵀα‖ = √T, and
    `max_norm` then shortens the step. At a Pareto-stationary point there is no finite α; a ridge of 1e-12 of each
    gradient's square bounds it.

    Args:
        max_norm: the combined gradient is no longer than this; null leaves it √T long.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", arXiv 2202.01017.
    """

    def __init__(self, *, max_norm: float | None = 1.0) -> None:
        self.max_norm = max_norm

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weights, above 0; 0 where a gradient is zero."""
        assert gramian is not None
        weights = solve(gramian, alpha=1.0)
        if self.max_norm is not None:
            length = (weights @ gramian @ weights).clamp(min=0).sqrt()
            weights = weights * (self.max_norm / length.clamp(min=self.max_norm))
        return weights
