"""MNIST: the 5,000 images bundled with the package, or all 70,000 images loaded with torchvision."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtl.data.fields import Fields, Splits
from mtl.errors import UserError, first_line

BUNDLED = Path(__file__).with_name("mnist_5k.npz")
VALIDATION = 5_000  # the number of training images used for validation, the last ones
MEAN, STD = 0.1307, 0.3081  # of the pixels of MNIST's 60,000 training images, scaled to [0, 1]

Part = tuple[Tensor, Tensor]  # uint8 images (N, 28, 28), digits (N,)


def mnist(*, source: str = "bundled", root: str = "data", download: bool = True, disjoint: bool = False) -> Splits:
    """Returns digits with the fields image (N, 1, 28, 28), standardised; digit (N,); parity (N,), 1 for odd digits.

    Args:
        source: `bundled`: 4,000 / 500 / 500 stratified images for training, validation and test; or `torchvision`:
            55,000 / 5,000 / 10,000 images.
        root: torchvision's data folder, which contains `MNIST/raw` or receives the download.
        download: Whether torchvision downloads missing files.
        disjoint: Whether training images have alternately only a digit or only a parity; missing labels are -100.
            Validation and test images have both labels.

    Raises:
        UserError: If the source is unknown, or if torchvision can neither find nor download the files.
    """
    parts, name = read(source, root, download)
    train, val, test = (fields(image, digit) for image, digit in parts)
    if disjoint:
        train.fields["digit"][1::2] = -100
        train.fields["parity"][::2] = -100
    return Splits(train, val, test, name=name)


def read(source: str, root: str, download: bool) -> tuple[list[Part], str]:
    """Returns the raw training, validation and test images and digits, and a description of the data; see `mnist`.

    Raises:
        UserError: If the source is unknown, or if torchvision can neither find nor download the files.
    """
    if source == "bundled":
        return bundled()
    if source == "torchvision":
        return from_torchvision(root, download)
    raise UserError(f"data.source: '{source}' is not one of bundled, torchvision")


def bundled() -> tuple[list[Part], str]:
    """Reads the images bundled with the package; mnist_5k.md in the same folder describes them."""
    with np.load(BUNDLED) as arrays:
        image, digit, split = (torch.from_numpy(arrays[name]) for name in ("image", "digit", "split"))
    parts = [(image[split == part], digit[split == part]) for part in range(3)]
    return parts, "MNIST, the 5,000 images bundled with mtl (data.source=bundled)"


def from_torchvision(root: str, download: bool) -> tuple[list[Part], str]:
    """Reads the whole of MNIST with torchvision; the last 5,000 training images are used for validation."""
    from torchvision.datasets import MNIST  # a slow import that the bundled images don't need

    try:
        train, test = (MNIST(root, train=part, download=download) for part in (True, False))
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        folder = Path(root).resolve() / "MNIST" / "raw"
        raise UserError(
            f"data.source=torchvision: MNIST's files could be neither read in {folder} nor downloaded to it "
            f"({first_line(error) if download else 'data.download is false'}). Put train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte there (or the .gz files), name "
            "another folder with data.root=…, or use data.source=bundled"
        ) from error
    held_out = min(VALIDATION, len(train.data) // 2)
    parts = [
        (train.data[:-held_out], train.targets[:-held_out]),
        (train.data[-held_out:], train.targets[-held_out:]),
        (test.data, test.targets),
    ]
    return parts, f"MNIST, the whole data set, from {Path(root).resolve()} (data.source=torchvision)"


def fields(image: Tensor, digit: Tensor) -> Fields:
    """Returns a data set of uint8 images (N, 28, 28) and their digits (N,)."""
    pixels = image[:, None].float().div_(255).sub_(MEAN).div_(STD)
    return Fields({"image": pixels, "digit": digit.long(), "parity": digit.long() % 2})
