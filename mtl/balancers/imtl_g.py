"""IMTL-G: the direction that has the same projection on every gradient."""

import torch
from torch import Tensor

from mtl.balancers._math.bisector import bisector
from mtl.balancers.balancer import Balancer, parameters_of


class IMTLG(Balancer):
    """The combination whose projections on all the tasks' gradients are equal: d·g_t/‖g_t‖ is the same for every t.

    α ∝ M⁺n, with n the gradients' norms, and Σα = 1 in the paper. With three or more tasks the common projection can
    then be negative, and every task's loss would rise: here −d is taken, so Σα is −1. And d can be many times longer
    than any gradient: here it is no longer than the longest. With weights p of the tasks' own the projections are in
    the ratio of p; a task of weight 0 has d at right angles.

    Args:
        scope: what the weights multiply: what is `shared`, as in the paper, or `all` of a task's gradient, as in
            nash-mtl, where they multiply the losses. A weight may be negative: a head then goes up its loss.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones or, with a scope
            of `all`, `all` of them, heads included. The paper has the shared ones.

    The paper combines it with `IMTLL` for the losses: that is `IMTL`.

    Source: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, openreview IMPnRXEWpvr.
    """

    preference = "steer"

    def __init__(self, *, scope: str = "shared", over: str = "shared") -> None:
        self.over, self.scope = parameters_of(over, scope)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """The weights; their sum is ±1 unless the direction was shortened. Gradients that are zero get the weight 0."""
        assert gramian is not None
        return impartial(gramian, self.preferences(len(gramian)))


def impartial(gramian: Tensor, preferences: Tensor) -> Tensor:
    """The weights of `IMTLG`, (T,), from a Gramian, (T, T), and the tasks' preferences, (T,)."""
    raw = bisector(gramian, preferences)
    length = (raw @ gramian @ raw).clamp(min=0).sqrt()
    longest = gramian.diagonal().max().sqrt()
    # Σα = 1 divides by the sum; the bound on the length divides by more where the sum is near zero.
    divisor = torch.maximum(raw.sum().abs(), length / longest)
    return raw / divisor if divisor > 0 else torch.zeros_like(raw)
