"""The head that draws an image."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.heads.linear import averaged


class Decoder(nn.Module):
    """Features (N, in_features) to images (N, channels, H, W): a small map, made twice as large by each layer.

    Maps are averaged over their positions first.

    Args:
        in_features: width of the features.
        channels: of the images.
        size: H and W, or one number for both.
        widths: channels before each doubling, at least one.
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
        """The images, whose pixels may be any number."""
        image: Tensor = self.layers(averaged(features))
        return image[:, :, : self.height, : self.width]
