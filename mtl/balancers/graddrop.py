"""GradDrop: a random sign for each element of the gradient for which the tasks' signs differ."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, generator


class GradDrop(Balancer):
    """The sum of the gradients in which each element includes either only the positive or only the negative values.

    P = ½(1 + Σg/Σ|g|) and U ~ U(0, 1) for each element: positive values are included where P > U, negative values where
    P < U. The paper also has a form for activations; this is the form for parameters. Needs the gradient of each task
    (the rows).

    Args:
        seed: The seed of the random numbers.

    Source: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
    arXiv 2010.06808.
    """

    needs = "rows"
    state_names = ("generator",)

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self.generator = generator(seed)

    def combine(self, losses: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the direction, and as weights the fraction of each gradient's squared norm that it includes.

        The fraction of a gradient that is zero is 0.
        """
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
