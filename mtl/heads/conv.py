"""The head that predicts for each pixel."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Conv2d):
    """A linear head at each position: maps (N, in_features, h, w) to (N, out_features, H, W), or to (N, H, W) for one.

    Args:
        in_features: channels of the maps.
        out_features: numbers a pixel.
        size: H and W, or one number for both; the predictions at the maps' positions are interpolated to it.
        squeeze: whether one output loses its dimension, as a target (N, H, W) has none.
    """

    def __init__(self, in_features: int, out_features: int, *, size: int | Sequence[int], squeeze: bool = True) -> None:
        super().__init__(in_features, out_features, kernel_size=1)
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.squeeze = squeeze and out_features == 1

    def forward(self, features: Tensor) -> Tensor:
        """The prediction, (N, out_features, H, W) or (N, H, W)."""
        prediction = F.interpolate(super().forward(features), size=self.size, mode="bilinear")
        return prediction.squeeze(1) if self.squeeze else prediction
