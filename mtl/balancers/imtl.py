"""IMTL: impartial to the losses' scales and to the gradients' lengths, as published."""

from collections.abc import Sequence

from torch import Tensor

from mtl.balancers.balancer import parameters_of
from mtl.balancers.imtl_g import impartial
from mtl.balancers.imtl_l import IMTLL


class IMTL(IMTLL):
    """IMTL-L for the losses, and on top of it IMTL-G for the shared parameters.

    Each loss is scaled to e^(s_t) L_t, s learned as in `IMTLL`. The gradients of the scaled losses are combined over
    the shared parameters as in `IMTLG`; heads get those of their scaled loss. With weights p of the tasks' own, the
    projections on the gradients are in the ratio of p, and p weighs each task's term in the objective of s and heads.

    Args:
        lr: The learning rate of s, if it is learned by a separate Adam.
        init: The initial value of s, one for all tasks or one for each of them; 0 in the paper and LibMTL.
        optimizer: `own`, Adam at `lr`, or `model`: the model's optimizer moves s together with the model, by its
            settings and schedule, as in LibMTL.
        over: whose gradients the inner products are of: the `shared` parameters, as in the paper and LibMTL, or `all`,
            heads included, which the weights then multiply too.

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
        """The weights of the unscaled gradients. Gradients that are zero get the weight 0."""
        assert gramian is not None
        scales = self.scales(losses)
        return scales * impartial(gramian * scales.outer(scales), self.preferences(len(gramian)))

    def alone(self, losses: Tensor) -> Tensor:
        """e^s: heads go down their scaled loss."""
        return self.scales(losses)
