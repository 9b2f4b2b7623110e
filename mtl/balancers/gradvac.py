"""GradVac: each gradient is turned towards the others until their cosines reach the averages of earlier steps."""

import math

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, generator, parameters_of

LARGEST = 1 - 1e-6  # the largest target: for a cosine of 1 the coefficient of the other gradient would be infinite
VANISHED = 1e-6  # a combination shorter than this, relative to the norms of its terms, consists of rounding errors


class GradVac(Balancer):
    """Weights equivalent to summing the gradients after turning each towards gradients whose cosine with it is too low.

    The target φ̂_ij of two tasks is an exponential moving average of their cosine. Each g_i is compared with every other
    original g_j in random order. If their cosine φ is below φ̂, ‖g_i‖(φ̂√(1−φ²) − φ√(1−φ̂²)) / (‖g_j‖√(1−φ̂²)) g_j is
    added to g_i, so that the cosine becomes φ̂. In either case φ̂ ← (1−β)φ̂ + βφ. The targets start at 0, so that the
    first step is that of PCGrad. Needs the Gramian, with which the coefficients of the gradients are computed.

    The addition makes a gradient at most 1/√(1−φ̂²) times as long; targets are bounded by 1 − 1e-6. The paper also has a
    target for each layer; here there is one for all shared parameters. The target of two tasks is updated in steps in
    which both are present.

    Args:
        beta: β, the weight of the current cosine in the averages, in [0, 1].
        seed: The seed of the random order.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. In the paper all parameters are
            shared; LibMTL uses `shared`.

    Raises:
        ValueError: If `beta` is not in [0, 1], or if `over` is neither `shared` nor `all`.

    Source: Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
    Multilingual Models", arXiv 2010.05874.
    """

    state_names = ("generator", "targets")

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
            products = matrix[i].copy()  # of the turned g_i with every original gradient
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
