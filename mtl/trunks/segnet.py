"""SegNet: a convolutional encoder and decoder, for predictions at each pixel."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.trunks.parts import Stage
from mtl.trunks.stages import run_stages


class SegNet(nn.Module):
    """An encoder and a decoder of equally many blocks, from images (N, in_channels, H, W) to maps of the same size.

    A block of the encoder ends with a max pooling that halves height and width. A block of the decoder begins with the
    reverse: each value is put back to the position of the maximum, and all other positions are 0. Each convolution is
    3×3, and is followed by batch norm and ReLU. Initial weights are Xavier-normal, and biases 0.

    Args:
        in_channels: The number of channels of the images.
        widths: The number of channels of each block of the encoder. The decoder has the same numbers in reverse order;
            its last block, and so the features, have `widths[0]` channels.
        depths: The number of convolutions in each block, at least 2.

    Raises:
        UserError: If `widths` and `depths` aren't lists of the same length, or if a depth is below 2.

    Source: Badrinarayanan et al., "SegNet", arXiv 1511.00561, in the version of Liu et al., arXiv 1803.10704, which has
    64 channels in the last block.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        depths: Sequence[int] = (2, 2, 3, 3, 3),
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(depths) or min(depths) < 2:
            raise UserError(
                f"model.trunk: widths has {len(widths)} numbers and depths {len(depths)}: give one width and one "
                "depth, of at least 2, for each block"
            )
        self.num_features = widths[0]
        before = [in_channels, *widths[:-1]]
        after = [widths[0], *widths[:-1]]
        self.encoder = nn.ModuleList(map(Encoder, before, widths, depths))
        self.decoder = nn.ModuleList(reversed(list(map(Decoder, widths, after, depths))))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Computes maps (N, num_features, H, W)."""
        maps: Tensor = run_stages(self.stages(), image)
        return maps

    def stages(self) -> list[nn.Module]:
        """Returns the blocks as stages, each of which also passes on the positions of the maxima."""
        return [*self.encoder, *self.decoder]


class Encoder(Stage):
    """A block of the encoder: convolutions and a max pooling."""

    def __init__(self, in_channels: int, width: int, depth: int) -> None:
        super().__init__(
            _convolutions(in_channels, width, 1), _convolutions(width, width, depth - 1), pool=nn.MaxPool2d(2)
        )

    def parts(self, maps: Tensor, *positions: Any) -> tuple[Tensor, Tensor, Any]:
        """Returns the output of the first convolution, that of the last one, and the inputs of the next block."""
        assert self.first is not None
        u = self.first(maps)
        p = self.rest(u)
        pooled, at = F.max_pool2d(p, 2, return_indices=True)
        return u, p, (pooled, *positions, (at, p.shape[2:]))


class Decoder(Stage):
    """A block of the decoder: the reverse of a max pooling, and convolutions."""

    def __init__(self, in_channels: int, width: int, depth: int) -> None:
        super().__init__(None, _convolutions(in_channels, width, depth), decoder=True)

    def parts(self, maps: Tensor, *positions: Any) -> tuple[Tensor, Tensor, Any]:
        """Returns the input of the first convolution, the output of the last one, and the inputs of the next block."""
        *left, (at, size) = positions
        u = F.max_unpool2d(maps, at, [2, 2], output_size=list(size))
        p = self.rest(u)
        return u, p, (p, *left) if left else p


def _convolutions(in_channels: int, width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        in_channels = width
    return nn.Sequential(*layers)
