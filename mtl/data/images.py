"""Pictures in files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
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


def open_image(path: str | Path, mode: str | None = "RGB") -> "Image":
    """The picture in the file, whole, its pixels of the mode that PIL calls so; None leaves them.

    Raises:
        UserError: where there is none, or it is damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert(mode) if mode else image.copy()
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except Exception as error:  # a decoder may fail in any way
        raise UserError(f"the picture {path} is damaged: {told(error)}") from error


class Transform:
    """Makes a standardised tensor (3, height, width) of a PIL image, and of its mask, if there is one, (height, width).

    Args:
        size: of the result: one number for height and width, or both; a picture of another shape is stretched.
        mean, std: of the three colours, for pixels in [0, 1].
        augment: whether a part of the picture is drawn, at least half of it, and whether it is mirrored.

    Raises:
        UserError: for a size that is none, and for other than three means or deviations.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        *,
        augment: bool = False,
    ) -> None:
        sides = [size, size] if isinstance(size, int) else list(size)
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise UserError(f"data.size is {size!r}; it must be a whole number above 0, or two: [height, width]")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError("data.mean and data.std must be three numbers each, the deviations above 0")
        self.height, self.width = sides
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
        self.augment = augment

    def __call__(self, image: "Image", mask: "Image | None" = None) -> Any:
        """The tensor, or two of them if there is a mask."""
        from PIL.Image import Resampling
        from torchvision.transforms import RandomResizedCrop

        box, mirrored = (0, 0, image.width, image.height), False
        if self.augment:
            drawn = RandomResizedCrop.get_params(image, scale=[0.5, 1.0], ratio=[3 / 4, 4 / 3])  # type: ignore[arg-type]
            top, left, height, width = drawn
            box, mirrored = (left, top, left + width, top + height), bool(torch.rand(()) < 0.5)

        def shaped(picture: "Image", resampling: Resampling) -> Tensor:
            # By Pillow, for both alike: torch's nearest neighbours would be half a pixel off.
            pixels = np.array(picture.resize((self.width, self.height), resampling, box))
            return torch.from_numpy(pixels[:, ::-1].copy() if mirrored else pixels)

        pixels = shaped(image, Resampling.BILINEAR).permute(2, 0, 1).float().div_(255).sub_(self.mean).div_(self.std)
        return pixels if mask is None else (pixels, shaped(mask, Resampling.NEAREST))
