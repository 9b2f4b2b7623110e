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

FORMATS = (  # Pillow knows more, for some of which it starts another program
    *("AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"),
)
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


EIGHT_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # Pillow's modes without transparency
ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
AS_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose pixels of 16 bits some versions of Pillow give in the mode I


def open_image(path: str | Path, mode: str | None = "RGB") -> "Image":
    """The picture in the file, whole and turned as its EXIF orientation says.

    Args:
        path: of the file.
        mode: `RGB` for colours: pixels of 8 bits a colour in the mode RGB; grey ones of 16 bits in the mode F, scaled
            from their range to 0 … 255. None leaves the pixels, such as the class numbers of a mask.

    Raises:
        UserError: where there is no such picture, or it is damaged; for colours also where pixels have no known range,
            or are transparent.
    """
    from PIL import Image, ImageOps

    try:
        Image.init()  # or Pillow doesn't know of all formats yet
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as file:
            image = ImageOps.exif_transpose(file)
            bits, dark = _tag(file, 258, 16), _tag(file, 262, 1) == 0
            return image if mode is None else _colours(image, path, str(file.format), bits, most_is_black=dark)
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except UserError:
        raise
    except Exception as error:  # a decoder may fail in any way
        raise UserError(f"the picture {path} is damaged: {told(error)}") from error


def _tag(image: Any, number: int, otherwise: int) -> int:
    """A tag of a TIFF file, such as the bits of a pixel that it uses of 16; the other number for other files."""
    value = getattr(image, "tag_v2", {}).get(number, otherwise)
    return int(value[0] if isinstance(value, tuple) else value)


def _colours(image: "Image", path: str | Path, kind: str, bits: int, *, most_is_black: bool) -> "Image":
    """The picture as colours, see `open_image`; grey of 16 bits may be told to be black where its number is highest."""
    from PIL import Image

    transparent = image.info.get("transparency")
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and kind in AS_SIXTEEN_BITS):
        pixels = np.asarray(image).astype(np.float32)
        if transparent is not None and (pixels == transparent).any():
            raise _transparent(path)
        grey = pixels * np.float32(255 / (2**bits - 1))
        return Image.fromarray(255 - grey if most_is_black else grey)  # of 8 bits Pillow itself turns them round
    if image.mode not in (*EIGHT_BITS, *ALPHA):
        raise UserError(
            f"the picture {path} has pixels of Pillow's mode {image.mode}, whose range isn't known; save it with 8 "
            "bits a colour, or in grey with 16"
        )
    if image.mode in ALPHA or transparent is not None:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            raise _transparent(path)
    return image.convert("RGB")


def _transparent(path: str | Path) -> UserError:
    return UserError(
        f"the picture {path} has transparent pixels, whose colours aren't known; lay it over a background, such as "
        "with Pillow's Image.alpha_composite, and save it without transparency"
    )


class Transform:
    """Makes a standardised tensor (3, height, width) of a PIL image, and of its mask, if there is one, (height, width).

    The image is of the mode RGB, or of the mode F with grey values in 0 … 255, as `open_image` gives it.

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

        colours = shaped(image, Resampling.BILINEAR)
        colours = colours[..., None].expand(-1, -1, 3) if colours.ndim == 2 else colours  # grey
        pixels = (colours.permute(2, 0, 1).float() / 255).sub_(self.mean).div_(self.std)
        return pixels if mask is None else (pixels, shaped(mask, Resampling.NEAREST))
