"""SI: the sum of the losses' logarithms, which doesn't see their scale."""

from torch import Tensor

from mtl.balancers.balancer import Balancer, inverse


class SI(Balancer):
    """Weights that make the step go down Σ p_t log L_t, p the tasks' own weights: w_t = p_t/L_t.

    Source: the scale-invariant baseline of Navon et al., arXiv 2202.01017, and Liu et al., arXiv 2306.03792.
    """

    needs = "losses"
    preference = "steer"

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0. Needs losses of at least 0."""
        return self.preferences(len(losses)).to(losses.device) * inverse(losses)
