"""Images of circles, squares and triangles, and a head that predicts a position."""

import torch
from torch import Tensor, nn

SIZE = 32
KINDS = ("circle", "square", "triangle")


class Shapes(torch.utils.data.Dataset):
    """A data set of noisy images, with one shape in each image.

    Args:
        count: The number of images.
        seed: The seed of the images.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_000 + index)
        kind = torch.randint(len(KINDS), (), generator=generator)
        centre = 0.3 + 0.4 * torch.rand(2, generator=generator)  # row and column, as shares of the image
        radius = 0.1 + 0.15 * torch.rand((), generator=generator)
        row, column = torch.meshgrid(*(torch.linspace(0, 1, SIZE),) * 2, indexing="ij")
        row, column = (row - centre[0]) / radius, (column - centre[1]) / radius
        inside = {
            "circle": row.square() + column.square() < 1,
            "square": (row.abs() < 0.8) & (column.abs() < 0.8),
            "triangle": (row < 0.8) & (column.abs() < (row + 1) / 1.8),
        }[KINDS[kind]]
        image = inside.float() + 0.3 * torch.randn(SIZE, SIZE, generator=generator)
        return {"image": image[None], "kind": kind, "centre": centre, "pixels": inside.long()}


class Position(nn.Module):
    """A head that predicts the centre: the mean position under a distribution over the positions of the maps.

    Args:
        in_features: The number of channels of the maps.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(in_features, 1, kernel_size=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Returns the row and the column, (N, 2), from maps (N, in_features, h, w)."""
        share = self.score(maps).flatten(1).softmax(1).view(len(maps), *maps.shape[2:])
        rows, columns = (torch.linspace(0, 1, side, device=maps.device) for side in maps.shape[2:])
        return torch.stack([(share.sum(2) * rows).sum(1), (share.sum(1) * columns).sum(1)], dim=1)
