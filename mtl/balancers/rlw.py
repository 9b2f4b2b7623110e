"""RLW: random weights."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, generator


class RLW(Balancer):
    """Weights drawn at random in each step: w = P·softmax(z), z ~ N(0, I), for the P present tasks.

    Needs neither losses nor gradients.

    Args:
        seed: The seed of the random numbers.

    Source: Lin et al., "Reasonable Effectiveness of Random Weighting", arXiv 2111.10603.
    """

    needs = "past"
    state_names = ("generator", "drawn")

    def __init__(self, *, seed: int = 0) -> None:
        self.generator = generator(seed)
        self.drawn: Tensor | None = None  # z of the current step

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, above 0; their sum is P."""
        if self.drawn is None or len(self.drawn) != len(losses):  # a skipped step may have had other tasks
            self.drawn = torch.randn(len(losses), generator=self.generator, dtype=torch.float64)
        return len(losses) * self.drawn.softmax(0).to(losses.device)

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Discards the weights, so that the next step draws new ones."""
        self.drawn = None
