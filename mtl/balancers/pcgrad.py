"""PCGrad: gradients without their components along conflicting gradients."""

import numpy as np
import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer, generator, parameters_of


class PCGrad(Balancer):
    """Weights equivalent to summing the gradients after their components along conflicting gradients are removed.

    Each g_i is compared with every other original g_j in random order; if g_i·g_j < 0, then (g_i·g_j / ‖g_j‖²) g_j is
    subtracted from g_i. Needs the Gramian, with which the coefficients of the gradients are computed.

    Args:
        seed: The seed of the random order.
        over: The parameters over which the inner products of gradients are computed: the `shared` ones, or `all`, heads
            included; the weights then multiply the gradients of the heads as well. The paper's authors' code and
            Tseng's code in PyTorch use `all`; nash-mtl and LibMTL use `shared`.

    Raises:
        ValueError: If `over` is neither `shared` nor `all`.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782.
    """

    state_names = ("generator",)

    def __init__(self, *, seed: int = 0, over: str = "shared") -> None:
        self.generator = generator(seed)
        self.over, self.scope = parameters_of(over)

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 1."""
        assert gramian is not None
        matrix = gramian.numpy()
        count = len(matrix)
        surgery = np.eye(count)
        for i, row in enumerate(surgery):
            for j in torch.randperm(count, generator=self.generator).tolist():
                product = row @ matrix[j]
                if j != i and product < 0 and matrix[j, j] > 0:
                    row[j] -= product / matrix[j, j]
        return torch.from_numpy(surgery.sum(0))
