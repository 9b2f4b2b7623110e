"""A head whose prediction is an image."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.heads.linear import averaged_maps


class Decoder(nn.Module):
    """A decoder from features (N, in_features) to images (N, channels, H, W).

    A linear layer makes a small map, whose height and width each transposed convolution doubles. Features that are maps
    are averaged over their positions first.

    Args:
        in_features: The number of features.
        channels: The number of channels of the images.
        size: H and W, or one number for both.
        widths: The number of channels before each doubling, at least one number.
    """

    def __init__(
        self, in_features: int, *, channels: int, size: int | Sequence[int], widths: Sequence[int] = (32, 16)
    ) -> None:
        super().__init__()
        self.height, self.width = (size, size) if isinstance(size, int) else size
        small = tuple(-(-side // 2 ** len(widths)) for side in (self.height, self.width))  # rounded up, cut at the end
        layers: list[nn.Module] = [nn.Linear(in_features, widths[0] * small[0] * small[1])]
        layers += [nn.Unflatten(1, (widths[0], *small))]
        for width, narrower in zip(widths, (*widths[1:], channels), strict=True):
            layers += [nn.ReLU(), nn.ConvTranspose2d(width, narrower, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Computes the images, whose pixels are unbounded."""
        image: Tensor = self.layers(averaged_maps(features))
        return image[:, :, : self.height, : self.width]
