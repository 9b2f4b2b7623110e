"""IMTL-L: weights learned so that all weighted losses become equal."""

from collections.abc import Sequence

from torch import Tensor

from mtl.balancers.balancer import Balancer
from mtl.balancers.learned import Learned


class IMTLL(Balancer):
    """Weights w = p e^s, where s is learned with the model to minimise Σ p_t (e^(s_t) L_t − s_t).

    At the minimum over s every e^(s_t) L_t is 1, whatever the scale of the losses. Therefore the task weights p
    multiply the whole term of a task. With `init=0` the weights start at p. Needs the losses of earlier steps only. The
    paper combines the method with `IMTLG` for the shared parameters, as `IMTL` does.

    Args:
        lr: The learning rate of s, if it is learned by a separate Adam.
        init: The initial value of s, one for all tasks or one for each of them; 0 in the paper and LibMTL.
        optimizer: `own`, Adam at `lr`, or `model`: the model's optimizer updates s together with the model, with its
            settings and schedule, as in LibMTL.

    Raises:
        ValueError: If an argument is out of range.

    Source: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, openreview IMPnRXEWpvr.
    """

    needs = "past"
    preference = "steer"
    state_names = ("learned",)

    def __init__(self, *, lr: float = 0.01, init: float | Sequence[float] = 0.0, optimizer: str = "own") -> None:
        self.learned: Learned = Learned(lr=lr, initial=init, optimizer=optimizer)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, above 0."""
        return self.preferences(len(losses)).to(losses.device) * self.scales(losses)

    def scales(self, losses: Tensor) -> Tensor:
        """Returns e^s of the present tasks, (P,), on the device of the losses."""
        return self.of_present(self.learned.at(self.num_tasks or len(losses), losses.device)).exp()

    def learn(self, losses: Tensor) -> None:
        """Sets the gradient of s, p(e^s L − 1), for the model's optimizer."""
        if self.learned.by_model:
            self._descend(losses)

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Updates s by a step of gradient descent."""
        if not self.learned.by_model:
            self._descend(losses)

    def _descend(self, losses: Tensor) -> None:
        own = self.preferences(len(losses)).to(losses.device)
        self.learned.step(own * (self.scales(losses) * losses - 1), self.present)
