"""IMTL-L: weights learned so that all weighted losses become alike."""

from torch import Tensor

from mtl.balancers.balancer import Balancer
from mtl.balancers.learned import Learned


class IMTLL(Balancer):
    """s is learned with the model to minimise Σ p_t (e^(s_t) L_t − s_t): at rest every e^(s_t) L_t is 1.

    So w = p e^s, which begins at the tasks' own weights p; these weigh the whole term, since the scale of the losses
    makes no difference at rest. The s are learned by Adam.

    Args:
        lr: learning rate of s.

    Source: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, openreview IMPnRXEWpvr.
    """

    needs = "past"
    preference = "steer"
    kept = ("learned",)

    def __init__(self, *, lr: float = 0.01) -> None:
        self.learned = Learned(lr=lr)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weights, above 0."""
        s = self.of_present(self.learned.at(self.num_tasks or len(losses), losses.device))
        return self.preferences(len(losses)).to(losses.device) * s.exp()

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Moves s down its gradient, p(e^s L − 1)."""
        s = self.of_present(self.learned.at(self.num_tasks or len(losses), losses.device))
        own = self.preferences(len(losses)).to(losses.device)
        self.learned.step(own * (s.exp() * losses - 1), self.present)
