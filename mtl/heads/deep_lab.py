"""The head of DeepLab for predictions for each pixel."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.heads.conv import Conv


class DeepLab(nn.Module):
    """Atrous spatial pyramid pooling, from maps (N, in_features, h, w) to a prediction (N, out_features, H, W).

    Convolutions of several dilations and the mean of the maps are computed side by side, see Chen et al., "Rethinking
    Atrous Convolution for Semantic Image Segmentation", arXiv:1706.05587. A linear head at each position follows.

    Args:
        in_features: The number of channels of the maps.
        out_features: The number of outputs for each pixel.
        size: H and W, or one number for both. The predictions at the positions of the maps are interpolated to it.
        channels: The number of channels of each convolution.
        rates: The dilations of the 3x3 convolutions.
        dropout: The dropout probability of the pyramid's output.
        squeeze: Whether to remove the dimension of a single output, so that the prediction is (N, H, W).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        size: int | Sequence[int],
        channels: int = 256,
        rates: Sequence[int] = (12, 24, 36),
        dropout: float = 0.5,
        squeeze: bool = True,
    ) -> None:
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import ASPP  # takes seconds

        pyramid = ASPP(in_features, list(rates), channels)
        pyramid.project[-1] = nn.Dropout(dropout)
        self.layers = nn.Sequential(
            pyramid,
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            Conv(channels, out_features, size=size, squeeze=squeeze),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Computes the prediction, (N, out_features, H, W) or (N, H, W)."""
        prediction: Tensor = self.layers(features)
        return prediction
