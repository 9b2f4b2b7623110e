"""GradNorm: weights learned so that the norms of the tasks' gradients follow the tasks' training rates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, parameters_of
from mtl.balancers.learned import Learned

SMALLEST = 1e-4  # the lower bound of w_t/p_t, which steps of Adam, of about the learning rate each, could make negative


class GradNorm(Balancer):
    """Weights w learned so that w_t‖g_t‖ approaches Ḡ·r_t^α: tasks whose losses have fallen less get longer gradients.

    Ḡ is the mean of w_t‖g_t‖; r_t is L_t/L_t(0) divided by its mean over the tasks, where L_t(0) is the loss of the
    first step. A step uses the current w, which starts at 1. Then Adam minimises Σ|w_t‖g_t‖ − Ḡr_t^α|, in which Ḡr_t^α
    is constant, and w is scaled back to the sum T. With task weights p, the targets are multiplied by p_t over the mean
    of p, and w starts at p and preserves its sum. Needs the Gramian and the losses.

    In addition to the paper, the gradient of w is divided by Ḡ, so that the scale of the gradients doesn't matter to
    Adam; w stays above 0; and a task whose gradient is zero doesn't take part in a step's update, since it would gain
    the weight of the other tasks. In a step without some tasks, the weights of the present tasks preserve their sum.

    LibMTL's method of this name is different: it has equal weights in the first epoch, whose mean losses are L_t(0);
    afterwards w is T·softmax of learned numbers, which start at 1 and belong to the model's optimizer; the weights
    don't multiply the gradients of heads, a scope of `shared`.

    Args:
        alpha: α, at least 0: how strongly slow tasks are favoured; at 0 all gradients become equally long.
        lr: The learning rate of w, if it is learned by a separate Adam.
        scope: What the weights multiply: `all` of a task's gradient, heads included, as in the paper, or the gradients
            over the `shared` parameters.
        over: The parameters over which the norms of gradients are computed: the `shared` ones or, with a scope of
            `all`, `all` of them, heads included. The paper uses the shared parameters of the last shared layer, to
            save time.
        init: The initial value of w/p, above 0, one for all tasks or one for each of them; 1 in the paper and LibMTL. w
            preserves its initial sum.
        optimizer: `own`, Adam at `lr`, or `model`: the model's optimizer updates w/p together with the model, with its
            settings and schedule, as in LibMTL; w is scaled back to its sum afterwards.

    Raises:
        ValueError: If an argument is out of range.

    Source: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
    arXiv 1711.02257.
    """

    preference = "steer"
    state_names = ("learned", "initial")

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
        self.learned: Learned = Learned(lr=lr, initial=init, optimizer=optimizer)  # w/p
        if not (self.learned.initial > 0).all():
            raise ValueError(f"init is {init}; it must be above 0")
        # Before the update: the present tasks, their p and w/p, and which of them are updated.
        self._before: tuple[Tensor, ...] | None = None
        self.initial: Tensor | None = None  # L_t(0); 0 for tasks without a positive loss so far

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Returns the current weights, at least 0, with the sum of the task weights, and updates them.

        Raises:
            ArithmeticError: If a loss is negative, since then the training rate is undefined.
        """
        assert gramian is not None
        if (losses < 0).any():
            raise ArithmeticError(f"training rates need losses of at least 0, but the losses are {losses.tolist()}")
        # L_t(0) is the first loss of a task that isn't zero, since the rate is a ratio.
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
        """Scales w back to its sum if the model's optimizer has updated it."""
        if self.learned.by_model:
            self._restore_sum()

    def _restore_sum(self) -> None:
        """Scales the updated weights to the sum that they had before, and resets the other weights."""
        if self._before is not None:
            present, own, learned, moving = self._before
            values = self.learned.values.cpu().clone()
            moved = values[present].clamp(min=SMALLEST)
            factor = (own * learned)[moving].sum() / (own * moved)[moving].sum()
            values[present] = torch.where(moving, moved * factor, learned)
            self.learned.values = values
            self._before = None


def _relative(values: Tensor, moving: Tensor) -> Tensor:
    relative: Tensor = values / values[moving].mean()
    return relative
