"""FAMO: weights that make all log-losses fall at one rate, from how the losses changed."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mtl.balancers.balancer import TINY, Balancer, inverse
from mtl.balancers.learned import Learned


class FAMO(Balancer):
    """z = softmax(ξ) weighs the log-losses; ξ is learned from what the step changed each of them by.

    w_t = c·z_t/L_t, c = 1/Σ(z_t/L_t); the lower bound b of the losses, which the paper takes off, is 0 here. After the
    step the losses of the same batch are taken once more, without gradients; ξ moves by Adam down Jᵀ(log L − log L'), J
    the softmax's Jacobian. The softmax is over the tasks present. The scale of a task's loss makes no difference, and
    there is no preference in the method. The authors' code also clips the gradient over the shared parameters, without
    the heads, at a norm of 1: `clip_shared_norm=1.0` of `mtl.Step`, `trainer.clip_shared_norm=1` in a config.

    Args:
        lr: learning rate of ξ.
        init: what ξ starts from, for all tasks or for each of them; 0 in the authors' code. What is the same for all
            makes a difference through the weight decay alone.
        weight_decay: of ξ, γ in the paper.

    The model's optimizer can't move ξ: its gradient is known when the model has moved.

    Source: Liu et al., "FAMO: Fast Adaptive Multitask Optimization", arXiv 2306.03792.
    """

    needs = "losses"
    preference = "none"
    looks_back = True
    kept: ClassVar[tuple[str, ...]] = ("learned",)

    def __init__(self, *, lr: float = 0.025, weight_decay: float = 1e-3, init: float | Sequence[float] = 0.0) -> None:
        self.learned: Learned = Learned(lr=lr, weight_decay=weight_decay, initial=init)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0; their sum is 1. Needs losses of at least 0."""
        ratios = self._shares(losses) * inverse(losses)
        return ratios / ratios.sum().clamp(min=TINY)

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Moves ξ by the change of the log-losses."""
        assert again is not None
        z = self._shares(losses)
        change = losses.clamp(min=TINY).log() - again.clamp(min=TINY).log()
        self.learned.step(z * (change - z @ change), self.present)

    def _shares(self, losses: Tensor) -> Tensor:
        return self.of_present(self.learned.at(self.num_tasks or len(losses), losses.device)).softmax(0)
