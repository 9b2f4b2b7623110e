"""SI: the sum of the logarithms of the losses, whose gradient is invariant to their scale."""

from torch import Tensor

from mtl.balancers.balancer import Balancer, inverse


class SI(Balancer):
    """Weights for the gradient of Σ p_t log L_t, where p are the task weights: w_t = p_t/L_t.

    Needs the losses of the step.

    Source: the scale-invariant baseline of Navon et al., arXiv 2202.01017, and Liu et al., arXiv 2306.03792.
    """

    needs = "losses"
    preference = "steer"

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0; NaN for a negative loss."""
        return self.preferences(len(losses)).to(losses.device) * inverse(losses)
