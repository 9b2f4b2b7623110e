"""A loss for surface normals."""

import torch.nn.functional as F
from torch import Tensor, nn


class CosineDistance(nn.Module):
    """The mean of 1 - cos(prediction, target) over positions, for surface normals.

    Neither has to be of unit length. It is a mean over positions: a task with this loss sets `mean_over="positions"`,
    and positions without a normal are NaN in the target, or excluded by the task's mask.
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Computes the mean over all positions; dimension 1 has the components."""
        return 1 - F.cosine_similarity(prediction, target, dim=1).mean()
