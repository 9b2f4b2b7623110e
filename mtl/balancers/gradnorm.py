"""GradNorm: weights learned so that the tasks' gradients are as long as their training rates ask for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, parameters_of
from mtl.balancers.learned import Learned

SMALLEST = 1e-4  # of w_t/p_t: steps of Adam, each of about the learning rate, would take it below zero


class GradNorm(Balancer):
    """w is learned so that w_t‖g_t‖ becomes Ḡ·r_t^α: longer gradients for tasks whose loss has fallen less than most.

    Ḡ is the mean of the w_t‖g_t‖; r_t is L_t/L_t(0) over its mean, L_t(0) the first step's. Adam goes down the gradient
    of Σ|w_t‖g_t‖ − Ḡr_t^α|, with Ḡr_t^α held fixed; then w is brought back to the sum T. The step itself is made with
    the w from before, which begins at 1. The tasks' own weights p_t over their mean multiply the targets; w begins at p
    and keeps its sum.

    Beyond the paper the gradient is divided by Ḡ, so that its scale makes no difference to Adam; w stays above 0; and a
    task whose gradient is zero is left out of it all for the step: the others' weight would go over to it. Of the tasks
    present, too, the weights keep their sum.

    This is the paper's. LibMTL's is another: equal weights in the first epoch, whose mean loss is then L_t(0); after it
    w = T·softmax of what is learned, which starts at 1 and is in the model's optimizer; heads get the gradients of
    their own losses, a scope of `shared`.

    Args:
        alpha: α, at least 0: how strongly slow tasks are furthered; at 0 all gradients become equally long.
        lr: The learning rate of w, if it is learned by a separate Adam.
        init: what w/p starts from, above 0, for all tasks or for each of them; 1 in the paper and LibMTL. w keeps the
            sum that it begins with.
        optimizer: `own`, Adam at `lr`, or `model`: the model's optimizer moves w/p together with the model, by its
            settings and schedule, and w is brought back to its sum afterwards. In LibMTL it does.
        scope: what the weights multiply: `all` of a task's gradient, as in the paper, or what is `shared`.
        over: whose gradients' norms count: those of the `shared` parameters, or, with a scope of `all`, of `all` of
            them, heads included. The paper has shared parameters, those of the last shared layer to save time.

    Source: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
    arXiv 1711.02257.
    """

    preference = "steer"
    kept = ("learned", "initial")

    def __init__(
        self,
        *,
        alpha: float = 1.5,
        lr: float = 0.025,
        scope: str = "all",
        over: str = "shared",
        init: float | Sequence[float] = 1.0,
        optimizer: str = "own",
    ) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha is {alpha}; it must be at least 0")
        self.alpha = alpha
        self.over, self.scope = parameters_of(over, scope)
        self.learned: Learned = Learned(lr=lr, initial=init, optimizer=optimizer)  # w over the own weights
        if not (self.learned.initial > 0).all():
            raise ValueError(f"init is {init}; weights begin above 0")
        self._before: tuple[Tensor, ...] | None = None  # tasks in the step, their own weights, w over these, who moves
        self.initial: Tensor | None = None  # L_t(0); 0 where there is none yet

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weights learned so far, at least 0, with the sum of the tasks' own; then it learns.

        Raises:
            ArithmeticError: for a loss below zero, which has no training rate.
        """
        assert gramian is not None
        if (losses < 0).any():
            raise ArithmeticError(f"training rates are ratios of losses, none of them below 0, but {losses.tolist()}")
        # The rate of a task that began at zero, as with a batch that has nothing for it, is from where it isn't zero.
        self.initial = self.begun(self.initial, losses)
        initial = self.of_present(self.initial)
        initial = torch.where(initial > 0, initial, losses)
        self.initial = self.put(self.initial, initial)
        own = self.preferences(len(losses))
        learned = self.of_present(self.learned.at(self.num_tasks or len(losses), losses.device))
        lengths = own * learned * gramian.diagonal().sqrt()
        rates = torch.where(initial > 0, losses / initial, 1.0)
        moving = lengths > 0
        self._before = None
        if rates[moving].any():
            excess = _relative(lengths, moving) - _relative(rates, moving) ** self.alpha * _relative(own, moving)
            slope = torch.where(moving, excess.sign() * _relative(lengths, moving) / learned, 0.0)
            present = torch.arange(len(losses)) if self.present is None else self.present
            self._before = present, own, learned, moving
            self.learned.step(slope, self.present)
            if not self.learned.by_model:
                self._restore_sum()
        return own * learned

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Brings w back to its sum where the model's optimizer has moved it."""
        if self.learned.by_model:
            self._restore_sum()

    def _restore_sum(self) -> None:
        """Scales the weights that moved to the sum that they had before; the others stay as they were."""
        if self._before is not None:
            present, own, learned, moving = self._before
            values = self.learned.values.cpu().clone()
            moved = values[present].clamp(min=SMALLEST)
            kept = (own * learned)[moving].sum() / (own * moved)[moving].sum()
            values[present] = torch.where(moving, moved * kept, learned)
            self.learned.values = values
            self._before = None


def _relative(values: Tensor, moving: Tensor) -> Tensor:
    relative: Tensor = values / values[moving].mean()
    return relative
