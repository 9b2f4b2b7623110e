"""The convolutional network."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.errors import UserError


class CNN(nn.Sequential):
    """Convolutions, each with a ReLU and a pooling that halves the image: (N, in_channels, H, W) images to features.

    Args:
        in_channels: of the images.
        widths: channels of the layers; the last one's are the features'.
        kernel_size: of all convolutions.
        batch_norm: whether each convolution is followed by batch norm.
        pooled: whether the features are averaged over positions: (N, widths[-1]). Otherwise they are maps
            (N, widths[-1], h, w), where h and w are H and W halved, and rounded down, for each layer.

    Raises:
        UserError: without widths.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        widths: Sequence[int],
        kernel_size: int = 3,
        batch_norm: bool = False,
        pooled: bool = True,
    ) -> None:
        super().__init__()
        if not widths:
            raise UserError("model.trunk.widths: name the channels of at least one layer")
        self.num_features = widths[-1]
        self.pooled = pooled
        for width in widths:
            self.append(nn.Conv2d(in_channels, width, kernel_size, padding="same", bias=not batch_norm))
            if batch_norm:
                self.append(nn.BatchNorm2d(width))
            self.extend([nn.ReLU(), nn.MaxPool2d(2)])
            in_channels = width

    def forward(self, image: Tensor) -> Tensor:
        """Features, (N, num_features) or maps of so many channels."""
        maps: Tensor = super().forward(image)  # type: ignore[no-untyped-call]
        return maps.mean((2, 3)) if self.pooled else maps
