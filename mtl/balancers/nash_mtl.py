"""Nash-MTL: the bargaining solution between the tasks."""

from torch import Tensor

from mtl.balancers.balancer import Balancer, parameters_of
from mtl.balancers.fairgrad import solve


class NashMTL(Balancer):
    """The Nash bargaining solution: weights α > 0 with Mα = 1/α, so that every task gains alike, d·g_t = 1/α_t.

    α minimises the strictly convex ½αᵀMα − Σ log α; damped Newton finds it. Whatever the gradients, ‖Gᵀα‖ = √T, and
    `max_norm` then shortens the step. At a Pareto-stationary point there is no finite α; a ridge of 1e-12 of each
    gradient's square bounds it. With weights p of the tasks' own it is the weighted bargaining solution, Mα = p/α, with
    ‖Gᵀα‖ = √Σp.

    Args:
        max_norm: the combined gradient is no longer than this; null leaves it √T long.
        scope: what the weights multiply: what is `shared`, or `all` of a task's gradient, as in its authors' code,
            where they multiply the losses. The paper has shared parameters alone.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones or, with a scope
            of `all`, `all` of them, heads included. The paper and its authors' code have the shared ones.

    `max_norm` shortens the weights, so with a scope of `all` the heads' gradients too. The authors' code clips the
    gradient over the shared parameters alone, and its heads get the gradient times α as it is: `max_norm=None`,
    `scope="all"`, and `clip_shared_norm=1.0` of `mtl.Step`, `trainer.clip_shared_norm=1` in a config.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", arXiv 2202.01017.
    """

    preference = "steer"

    def __init__(self, *, max_norm: float | None = 1.0, scope: str = "shared", over: str = "shared") -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}; it must be above 0")
        self.max_norm = max_norm
        self.over, self.scope = parameters_of(over, scope)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, above 0; 0 where a gradient or a task's own weight is zero."""
        assert gramian is not None
        weights = solve(gramian, alpha=1.0, preferences=self.preferences(len(gramian)))
        if self.max_norm is not None:
            length = (weights @ gramian @ weights).clamp(min=0).sqrt()
            weights = weights * (self.max_norm / length.clamp(min=self.max_norm))
        return weights
