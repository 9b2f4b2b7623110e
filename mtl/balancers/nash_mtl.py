"""Nash-MTL: the Nash bargaining solution of the tasks."""

from torch import Tensor

from mtl.balancers.balancer import Balancer, parameters_of
from mtl.balancers.fairgrad import solve


class NashMTL(Balancer):
    """The Nash bargaining solution: weights α > 0 with Mα = 1/α, so that the gain d·g_t of each task is 1/α_t.

    α minimises the strictly convex ½αᵀMα − Σ log α, which a damped Newton method solves. ‖Gᵀα‖ = √T for all gradients;
    `max_norm` then reduces the norm. At a Pareto-stationary point there is no finite α; a ridge of 1e-12, relative to
    each gradient's squared norm, bounds it. With task weights p the solution is the weighted bargaining solution
    Mα = p/α, with ‖Gᵀα‖ = √Σp. Needs the Gramian M.

    `max_norm` scales the weights, so that with a scope of `all` it scales the gradients of the heads as well. The
    authors' code clips only the gradient over the shared parameters, and multiplies the gradients of the heads by the
    unscaled α: `max_norm=None`, `scope="all"`, and `clip_shared_norm=1.0` of `mtl.Step`, `trainer.clip_shared_norm=1`
    in a config.

    Args:
        max_norm: The largest norm of d, above 0; None for no bound.
        scope: What the weights multiply: the gradients over the `shared` parameters, or `all` of a task's gradient,
            heads included, as in the authors' code, where they multiply the losses. The paper has only shared
            parameters.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones or, with a scope
            of `all`, `all` of them, heads included. The paper and its authors' code use `shared`.

    Raises:
        ValueError: If `max_norm` is not above 0, or if `scope` or `over` is invalid.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", arXiv 2202.01017.
    """

    preference = "steer"

    def __init__(self, *, max_norm: float | None = 1.0, scope: str = "shared", over: str = "shared") -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm}; it must be above 0")
        self.max_norm = max_norm
        self.over, self.scope = parameters_of(over, scope)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, above 0; 0 for a task whose gradient or task weight is zero.

        Raises:
            ArithmeticError: If Newton's method doesn't converge.
        """
        assert gramian is not None
        weights = solve(gramian, alpha=1.0, preferences=self.preferences(len(gramian)))
        if self.max_norm is not None:
            length = (weights @ gramian @ weights).clamp(min=0).sqrt()
            weights = weights * (self.max_norm / length.clamp(min=self.max_norm))
        return weights
