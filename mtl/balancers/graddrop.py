"""GradDrop: where the tasks disagree about a sign, one of the two is drawn."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, generator


class GradDrop(Balancer):
    """Per element either the positive or the negative gradients are kept, drawn by their share.

    P = ½(1 + Σg/Σ|g|), U ~ U(0, 1): the positive ones stay where P > U, the negative ones where P < U. The paper also
    has a form for activations; this is the one for parameters.

    Args:
        seed: The seed of the random numbers.

    Source: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
    arXiv 2010.06808.
    """

    needs = "rows"
    kept = ("generator",)

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self.generator = generator(seed)

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The direction; as weights, the share of each gradient's squared norm that was kept (0 of a zero gradient)."""
        if self.generator.device != losses.device:
            self.generator = generator(self.seed, losses.device)
        kept, whole = torch.zeros_like(losses), torch.zeros_like(losses)
        direction = {}
        for name, row in rows.items():
            share = 0.5 * (1 + (row.sum(0) / row.abs().sum(0)).nan_to_num())
            drawn = torch.rand(share.shape, generator=self.generator, dtype=share.dtype, device=share.device)
            whole += _squares(row)
            row *= torch.where(row > 0, share > drawn, share < drawn)
            kept += _squares(row)
            direction[name] = row.sum(0)
        return (kept / whole).nan_to_num(), direction


def _squares(row: Tensor) -> Tensor:
    squares: Tensor = row.flatten(1).double().square().sum(1)
    return squares
