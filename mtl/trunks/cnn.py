"""A convolutional network."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.errors import UserError
from mtl.trunks.stages import Applied, averaged


class CNN(nn.Sequential):
    """Layers of convolution, ReLU and a max pooling that halves the size, from images (N, in_channels, H, W).

    Args:
        in_channels: The number of channels of the images.
        widths: The number of channels of each layer; the last number is the number of features.
        kernel_size: The kernel size of all convolutions.
        batch_norm: Whether batch norm follows each convolution.
        pooled: Whether the features are averaged over their positions, to (N, widths[-1]). Otherwise they are maps
            (N, widths[-1], h, w), where h and w are H and W halved and rounded down once for each layer.

    Raises:
        UserError: If `widths` is empty.
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
        """Computes features (N, num_features), or maps with this number of channels."""
        maps: Tensor = super().forward(image)  # type: ignore[no-untyped-call]
        return averaged(maps) if self.pooled else maps

    def stages(self) -> list[nn.Module]:
        """Returns a stage for each convolution; see `mtl.trunks.stages`."""
        layers = list(self.children())
        starts = [number for number, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
        stages = [nn.Sequential(*layers[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)]
        if self.pooled:
            stages[-1].append(Applied(averaged))
        return list(stages)
