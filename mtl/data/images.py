"""Reads and transforms pictures from files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl.errors import UserError, describe_error

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = (  # Pillow supports more formats, but starts another program for some of them
    *("AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"),
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(Dataset[dict[str, Tensor]]):
    """A data set of pictures that are opened when they are indexed, with the field `image` and further fields.

    Args:
        files: The paths of the pictures.
        fields: The further fields, with the picture as their first dimension.
        transform: A function from a PIL image to the field `image`.
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


EIGHT_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # the modes of Pillow without transparency
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
AS_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose 16-bit pixels some versions of Pillow read in mode I


def open_image(path: str | Path, mode: str | None = "RGB") -> "Image":
    """Opens the picture in the file, fully decoded and rotated according to the EXIF orientation.

    Args:
        path: The path of the file.
        mode: With `RGB`, 8-bit pixels are converted to mode RGB, and 16-bit grey pixels to mode F, scaled from their
            range to [0, 255]. None leaves the pixels as they are, as needed for the class numbers of a mask.

    Raises:
        UserError: If the picture is missing or damaged, or, with mode `RGB`, if the range of the pixels is unknown or
            some pixels are transparent.
    """
    from PIL import Image, ImageOps

    try:
        Image.init()  # registers all formats of Pillow
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as file:
            image = ImageOps.exif_transpose(file)
            bits, dark = _tag(file, 258, 16), _tag(file, 262, 1) == 0
            return image if mode is None else _colours(image, path, str(file.format), bits, most_is_black=dark)
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except UserError:
        raise
    except Exception as error:  # a decoder may raise any exception
        raise UserError(f"the picture {path} is damaged: {describe_error(error)}") from error


def _tag(image: Any, number: int, otherwise: int) -> int:
    """Returns a tag of a TIFF file, such as the number of bits per pixel; `otherwise` for files of other formats."""
    value = getattr(image, "tag_v2", {}).get(number, otherwise)
    return int(value[0] if isinstance(value, tuple) else value)


def _colours(image: "Image", path: str | Path, kind: str, bits: int, *, most_is_black: bool) -> "Image":
    """Converts the picture to colours, see `open_image`. `most_is_black` inverts 16-bit grey pixels."""
    from PIL import Image

    transparent = image.info.get("transparency")
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and kind in AS_SIXTEEN_BITS):
        pixels = np.asarray(image).astype(np.float32)
        if transparent is not None and (pixels == transparent).any():
            raise _transparent(path)
        grey = pixels * np.float32(255 / (2**bits - 1))
        return Image.fromarray(255 - grey if most_is_black else grey)  # Pillow itself inverts 8-bit pixels
    if image.mode not in (*EIGHT_BITS, *ALPHA):
        raise UserError(
            f"the picture {path} has pixels of Pillow's mode {image.mode}, whose range isn't known; save it with 8 "
            "bits per colour, or as a grey picture with 16 bits"
        )
    if image.mode in ALPHA or transparent is not None:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            raise _transparent(path)
    return image.convert("RGB")


def _transparent(path: str | Path) -> UserError:
    return UserError(
        f"the picture {path} has transparent pixels, whose colours aren't known; put it on a background, for example "
        "with Pillow's Image.alpha_composite, and save it without transparency"
    )


class Transform:
    """Converts a PIL image to a standardised tensor (3, height, width), and optionally its mask to (height, width).

    The image must have mode RGB, or mode F with grey values in [0, 255], as `open_image` returns it.

    Args:
        size: The height and width of the result, as one number or two; pictures of another shape are stretched.
        mean, std: The means and standard deviations of the three colours, for pixels in [0, 1].
        augment: Whether a random crop of at least half the picture's area is used and randomly mirrored.

    Raises:
        UserError: If the size is invalid, or if there aren't three means and three positive standard deviations.
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
        """Returns the tensor of the image, or the tensors of image and mask if there is a mask."""
        from PIL.Image import Resampling
        from torchvision.transforms import RandomResizedCrop

        box, mirrored = (0, 0, image.width, image.height), False
        if self.augment:
            drawn = RandomResizedCrop.get_params(image, scale=[0.5, 1.0], ratio=[3 / 4, 4 / 3])  # type: ignore[arg-type]
            top, left, height, width = drawn
            box, mirrored = (left, top, left + width, top + height), bool(torch.rand(()) < 0.5)

        def shaped(picture: "Image", resampling: Resampling) -> Tensor:
            # Resize image and mask with Pillow: torch's nearest-neighbour interpolation would be half a pixel off.
            pixels = np.array(picture.resize((self.width, self.height), resampling, box))
            return torch.from_numpy(pixels[:, ::-1].copy() if mirrored else pixels)

        colours = shaped(image, Resampling.BILINEAR)
        colours = colours[..., None].expand(-1, -1, 3) if colours.ndim == 2 else colours  # grey
        pixels = (colours.permute(2, 0, 1).float() / 255).sub_(self.mean).div_(self.std)
        return pixels if mask is None else (pixels, shaped(mask, Resampling.NEAREST))
