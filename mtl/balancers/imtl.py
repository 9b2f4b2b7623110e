"""IMTL: invariant to the scales of the losses and of the gradients, in the complete form of the paper."""

from collections.abc import Sequence

from torch import Tensor

from mtl.balancers.balancer import parameters_of
from mtl.balancers.imtl_g import impartial
from mtl.balancers.imtl_l import IMTLL


class IMTL(IMTLL):
    """IMTL-L for the losses combined with IMTL-G for the shared parameters.

    Each loss is scaled to e^(s_t) L_t, where s is learned as in `IMTLL`. Over the shared parameters the gradients of
    the scaled losses are combined as in `IMTLG`; heads get the gradients of their scaled losses. With task weights p,
    the projections on the gradients are proportional to p, and p multiplies the terms of the tasks in the objective of
    s and of the heads. Needs the Gramian and the losses.

    Args:
        lr: The learning rate of s, if it is learned by a separate Adam.
        init: The initial value of s, one for all tasks or one for each of them; 0 in the paper and LibMTL.
        optimizer: `own`, Adam at `lr`, or `model`: the model's optimizer updates s together with the model, with its
            settings and schedule, as in LibMTL.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, as in the paper
            and LibMTL, or `all`, heads included; the weights then multiply the gradients of the heads as well.

    Raises:
        ValueError: If an argument is out of range.

    Source: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, openreview IMPnRXEWpvr.
    """

    needs = "gramian"

    def __init__(
        self,
        *,
        lr: float = 0.01,
        init: float | Sequence[float] = 0.0,
        optimizer: str = "own",
        over: str = "shared",
    ) -> None:
        super().__init__(lr=lr, init=init, optimizer=optimizer)
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights of the unscaled gradients, of either sign; 0 for a gradient that is zero."""
        assert gramian is not None
        scales = self.scales(losses)
        return scales * impartial(gramian * scales.outer(scales), self.preferences(len(gramian)))

    def alone(self, losses: Tensor) -> Tensor:
        """Returns e^s, (P,), since heads minimise the scaled losses."""
        return self.scales(losses)
