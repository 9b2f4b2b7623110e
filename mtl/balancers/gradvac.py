"""GradVac: each gradient turned towards the others until their cosines are what they have been on average."""

import math

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, generator, parameters_of

LARGEST = 1 - 1e-6  # target: to reach a cosine of 1 it would take infinitely much of the other gradient
VANISHED = 1e-6  # of a gradient's parts: what is left of it has no direction but that of rounding


class GradVac(Balancer):
    """The sum of the gradients, each turned towards those with which its cosine is below an average of earlier steps'.

    Each g_i, in turn with every other original g_j in random order, has the cosine φ with it and the target φ̂_ij. Where
    φ < φ̂ it gains ‖g_i‖(φ̂√(1−φ²) − φ√(1−φ̂²)) / (‖g_j‖√(1−φ̂²)) g_j, which makes the cosine φ̂. Then, whether it gained
    or not, φ̂ ← (1−β)φ̂ + βφ. The targets begin at 0, so that the first step is PCGrad's. It is carried out on the
    coefficients of the gradients, for which the Gramian is enough.

    A gained gradient is 1/√(1−φ̂²) times as long at most; targets count as no more than 1 − 1e-6. The paper has targets
    by layer as well; here they are of all shared parameters together. A pair's target moves in steps that have both.

    Args:
        beta: of the averages, in [0, 1].
        seed: The seed of the random order.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. In the paper all parameters are
            shared; LibMTL has the shared ones.

    Source: Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
    Multilingual Models", arXiv 2010.05874.
    """

    kept = ("generator", "targets")

    def __init__(self, *, beta: float = 0.01, seed: int = 0, over: str = "shared") -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta}; it must be in [0, 1]")
        self.beta = beta
        self.over, self.scope = parameters_of(over)
        self.generator = generator(seed)
        self.targets: Tensor | None = None  # φ̂, (T, T)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, of either sign."""
        assert gramian is not None
        count = len(gramian)
        matrix = gramian.numpy()
        norms = gramian.diagonal().sqrt().numpy()
        total = self.num_tasks or count
        targets = gramian.new_zeros(total, total) if self.targets is None else self.targets.clone()
        present = torch.arange(count) if self.present is None else self.present
        pairs = (present.unsqueeze(1), present)
        aims = targets[pairs].numpy()  # a copy
        turned = torch.eye(count, dtype=torch.float64)
        for i, row in enumerate(turned.numpy()):
            products = matrix[i].copy()  # of what g_i has become with every original gradient
            for j in torch.randperm(count, generator=self.generator).tolist():
                length = math.sqrt(max(row @ products, 0.0))
                if j == i or norms[j] == 0 or length <= VANISHED * (abs(row) @ norms):
                    continue
                cosine = max(-1.0, min(products[j] / (length * norms[j]), 1.0))
                target = min(aims[i, j], LARGEST)
                if cosine < target:
                    turn = target * math.sqrt((1 - cosine**2) / (1 - target**2)) - cosine
                    row[j] += length / norms[j] * turn
                    products += length / norms[j] * turn * matrix[j]
                aims[i, j] += self.beta * (cosine - aims[i, j])
        targets[pairs] = torch.from_numpy(aims)
        self.targets = targets
        return turned.sum(0)
