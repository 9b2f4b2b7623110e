"""UW: weights from learned uncertainties of the tasks."""

from collections.abc import Sequence

from torch import Tensor

from mtl.balancers.balancer import Balancer
from mtl.balancers.learned import Learned


class UW(Balancer):
    """Weights w = ½p e^(−s), where s is learned with the model to minimise Σ p_t (½e^(−s_t) L_t + ½s_t).

    s_t is log σ_t² for a homoscedastic uncertainty σ_t. At the minimum over s every e^(−s_t) L_t is 1, whatever the
    scale of the losses. Therefore the task weights p multiply the whole term of a task. With `init=0` the weights start
    at ½p. Needs the losses of earlier steps only.

    Args:
        lr: The learning rate of s, if it is learned by a separate Adam.
        init: The initial value of s, one for all tasks or one for each of them; MTAN and LibMTL use −0.5, Kendall's
            notebook and nash-mtl 0.
        optimizer: `own`, Adam at `lr`, or `model`: the model's optimizer updates s together with the model, with its
            settings and schedule, as in MTAN, LibMTL and Kendall's notebook.

    Raises:
        ValueError: If an argument is out of range.

    Source: Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses", arXiv 1705.07115.
    """

    needs = "past"
    preference = "steer"
    state_names = ("learned",)

    def __init__(self, *, lr: float = 0.01, init: float | Sequence[float] = 0.0, optimizer: str = "own") -> None:
        self.learned: Learned = Learned(lr=lr, initial=init, optimizer=optimizer)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, above 0."""
        s = self.of_present(self.learned.at(self.num_tasks or len(losses), losses.device))
        return 0.5 * self.preferences(len(losses)).to(losses.device) * (-s).exp()

    def learn(self, losses: Tensor) -> None:
        """Sets the gradient of s, ½p(1 − e^(−s) L), for the model's optimizer."""
        if self.learned.by_model:
            self._descend(losses)

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Updates s by a step of gradient descent."""
        if not self.learned.by_model:
            self._descend(losses)

    def _descend(self, losses: Tensor) -> None:
        s = self.of_present(self.learned.at(self.num_tasks or len(losses), losses.device))
        own = self.preferences(len(losses)).to(losses.device)
        self.learned.step(0.5 * own * (1 - (-s).exp() * losses), self.present)
