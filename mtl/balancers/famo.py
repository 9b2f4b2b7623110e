"""FAMO: weights with which all log-losses fall at the same rate, learned from the changes of the losses."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mtl.balancers.balancer import TINY, Balancer, inverse
from mtl.balancers.learned import Learned


class FAMO(Balancer):
    """Weights z = softmax(ξ) for the log-losses, where ξ is learned from the changes of the log-losses in each step.

    w_t = c·z_t/L_t, where c = 1/Σ(z_t/L_t); the paper subtracts a lower bound b from the losses, which is 0 here. After
    the step, the losses of the same batch are computed again without gradients, and Adam updates ξ with the gradient
    Jᵀ(log L − log L'), where J is the Jacobian of the softmax. The softmax is over the present tasks. The method is
    invariant to the scale of the losses, and has no preferences, so task weights other than 1 are an error. Needs the
    losses of the step.

    The authors' code also clips the gradient over the shared parameters, without the heads, at a norm of 1:
    `clip_shared_norm=1.0` of `mtl.Step`, `trainer.clip_shared_norm=1` in a config. The model's optimizer can't train ξ,
    since the gradient of ξ is known only after the model's update.

    Args:
        lr: The learning rate of ξ, above 0.
        weight_decay: The weight decay of ξ, at least 0; γ in the paper.
        init: The initial value of ξ, one for all tasks or one for each of them; 0 in the authors' code. A value for all
            tasks has an effect only through the weight decay.

    Raises:
        ValueError: If an argument is out of range.

    Source: Liu et al., "FAMO: Fast Adaptive Multitask Optimization", arXiv 2306.03792.
    """

    needs = "losses"
    preference = "none"
    needs_losses_after = True
    state_names: ClassVar[tuple[str, ...]] = ("learned",)

    def __init__(self, *, lr: float = 0.025, weight_decay: float = 1e-3, init: float | Sequence[float] = 0.0) -> None:
        self.learned: Learned = Learned(lr=lr, weight_decay=weight_decay, initial=init)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0, with sum 1; NaN if a loss is negative."""
        ratios = self._shares(losses) * inverse(losses)
        return ratios / ratios.sum().clamp(min=TINY)

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Updates ξ from the change of the log-losses."""
        assert again is not None
        z = self._shares(losses)
        change = losses.clamp(min=TINY).log() - again.clamp(min=TINY).log()
        self.learned.step(z * (change - z @ change), self.present)

    def _shares(self, losses: Tensor) -> Tensor:
        return self.of_present(self.learned.at(self.num_tasks or len(losses), losses.device)).softmax(0)
