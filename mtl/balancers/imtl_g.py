"""IMTL-G: the direction that has the same projection on every gradient."""

import torch
from torch import Tensor

from mtl.balancers._math.bisector import bisector
from mtl.balancers.balancer import Balancer, parameters_of


class IMTLG(Balancer):
    """Weights α of the combination d with equal projections on all gradients: d·g_t/‖g_t‖ is the same for every t.

    α ∝ M⁺n, where n are the norms of the gradients, and Σα = 1 in the paper. With three or more tasks, the common
    projection may then be negative, so that every task's loss would rise; in this case −d is used, and Σα is −1. In
    addition, d may be many times longer than any gradient; here it is not longer than the longest. With task weights p,
    the projections are proportional to p, and d is orthogonal to the gradient of a task with weight 0. Needs the
    Gramian M. The paper combines the method with `IMTLL` for the losses, as `IMTL` does.

    Args:
        scope: What the weights multiply: the gradients over the `shared` parameters, as in the paper, or `all` of a
            task's gradient, heads included, as in nash-mtl, where they multiply the losses. A weight may be negative;
            with `all`, the head then maximises its loss.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones or, with a scope
            of `all`, `all` of them, heads included. The paper uses `shared`.

    Raises:
        ValueError: If `scope` or `over` is invalid.

    Source: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, openreview IMPnRXEWpvr.
    """

    preference = "steer"

    def __init__(self, *, scope: str = "shared", over: str = "shared") -> None:
        self.over, self.scope = parameters_of(over, scope)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, with sum ±1 unless d was shortened; 0 for a gradient that is zero."""
        assert gramian is not None
        return impartial(gramian, self.preferences(len(gramian)))


def impartial(gramian: Tensor, preferences: Tensor) -> Tensor:
    """Returns the weights of `IMTLG`, (T,).

    Args:
        gramian: The Gramian, (T, T).
        preferences: The task weights, (T,).
    """
    raw = bisector(gramian, preferences)
    length = (raw @ gramian @ raw).clamp(min=0).sqrt()
    longest = gramian.diagonal().max().sqrt()
    # Σα = 1 requires a division by the sum; if the sum is near zero, the bound on the norm is a larger divisor.
    divisor = torch.maximum(raw.sum().abs(), length / longest)
    return raw / divisor if divisor > 0 else torch.zeros_like(raw)
