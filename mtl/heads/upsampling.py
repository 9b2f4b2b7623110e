"""A head that enlarges maps step by step."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.heads.conv import Conv


class Upsampling(nn.Sequential):
    """Convolutions, each after a doubling of height and width, and a linear head at each position.

    It converts maps (N, in_features, h, w) to a prediction (N, out_features, H, W).

    Args:
        in_features: The number of channels of the maps.
        out_features: The number of outputs for each pixel.
        size: H and W, or one number for both. The last predictions are interpolated to it.
        widths: The number of channels after each doubling.
        squeeze: Whether to remove the dimension of a single output, so that the prediction is (N, H, W).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        size: int | Sequence[int],
        widths: Sequence[int] = (128, 64),
        squeeze: bool = True,
    ) -> None:
        super().__init__()
        for width in widths:
            self.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.extend([nn.Conv2d(in_features, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()])
            in_features = width
        self.append(Conv(in_features, out_features, size=size, squeeze=squeeze))

    def forward(self, features: Tensor) -> Tensor:
        """Computes the prediction, (N, out_features, H, W) or (N, H, W)."""
        prediction: Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return prediction
