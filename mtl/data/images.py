"""Pictures in files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from mtl.errors import UserError, told

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(Dataset[dict[str, Tensor]]):
    """Pictures, opened when they are asked for, with what is known of them: the field image, and others.

    Args:
        files: the pictures' paths.
        fields: the others, each with the picture as first dimension.
        transform: from a PIL image to the field image.
    """

    def __init__(
        self, files: Sequence[str], fields: Mapping[str, Tensor], transform: "Callable[[Image], Tensor]"
    ) -> None:
        self.files = list(files)
        self.fields = dict(fields)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.transform(open_image(self.files[index]))
        return {"image": image, **{name: field[index] for name, field in self.fields.items()}}


def open_image(path: str | Path, mode: str = "RGB") -> "Image":
    """The picture in the file, whole.

    Raises:
        UserError: where there is none, or it is damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except Exception as error:  # a decoder may fail in any way
        raise UserError(f"the picture {path} is damaged: {told(error)}") from error


def transform(
    size: int | Sequence[int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    augment: bool = False,
) -> "Callable[[Any], Tensor]":
    """What makes of a PIL image a standardised tensor (3, height, width).

    Args:
        size: of the result: one number for height and width, or both; a picture of another shape is stretched.
        mean, std: of the three colours, for pixels in [0, 1].
        augment: whether a part of the picture is drawn, at least half of it, and whether it is turned to its mirror
            image.

    Raises:
        UserError: for a size that is none, and for other than three means or deviations.
    """
    from torchvision.transforms import v2

    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"data.size is {size!r}; it must be a whole number above 0, or two: [height, width]")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError("data.mean and data.std must be three numbers each, the deviations above 0")
    shape = (
        [v2.RandomResizedCrop(sides, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()] if augment else [v2.Resize(sides)]
    )
    return v2.Compose([*shape, *standardise(mean, std)])


def standardise(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    """The last transforms: from a PIL image to a standardised tensor."""
    import torch
    from torchvision.transforms import v2

    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]
