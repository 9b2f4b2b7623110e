"""A head for predictions for each pixel."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Conv2d):
    """A linear head at each position, from maps (N, in_features, h, w) to a prediction (N, out_features, H, W).

    Args:
        in_features: The number of channels of the maps.
        out_features: The number of outputs for each pixel.
        size: H and W, or one number for both. The predictions at the positions of the maps are interpolated to it.
        squeeze: Whether to remove the dimension of a single output, so that the prediction is (N, H, W).
    """

    def __init__(self, in_features: int, out_features: int, *, size: int | Sequence[int], squeeze: bool = True) -> None:
        super().__init__(in_features, out_features, kernel_size=1)
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.squeeze = squeeze and out_features == 1

    def forward(self, features: Tensor) -> Tensor:
        """Computes the prediction, (N, out_features, H, W) or (N, H, W)."""
        prediction = F.interpolate(super().forward(features), size=self.size, mode="bilinear")
        return prediction.squeeze(1) if self.squeeze else prediction
