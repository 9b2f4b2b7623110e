"""Multi-MNIST: pictures of two overlaid digits; the tasks are to recognise the left and the right digit."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.data.fields import Fields, Splits
from mtl.data.mnist import read

CHUNK = 1_000  # images made at a time, which limits the temporary memory to a few MB


def multi_mnist(*, source: str = "bundled", root: str = "data", seed: int = 0, download: bool = True) -> Splits:
    """Returns pairs of overlaid digits with the fields image (N, 1, 28, 28), standardised; left (N,); right (N,).

    Each image of a split of MNIST is once the left and once the right image of a pair of the same split. The
    pixels are standardised by the mean and the standard deviation of the training pairs' pixels.

    Args:
        source: The source of the single digits, see `mtl.data.mnist`: `bundled`, 4,000 / 500 / 500 pairs for training,
            validation and test; or `torchvision`, 55,000 / 5,000 / 10,000 pairs.
        root: torchvision's data folder, which contains `MNIST/raw` or receives the download.
        seed: The seed for drawing the pairs.
        download: Whether torchvision downloads missing files.

    Raises:
        UserError: If the source is unknown, or if torchvision can neither find nor download the files.

    Source: Sener and Koltun, arXiv 1810.04650, after Sabour et al., arXiv 1710.09829. The layout is that of Sener and
    Koltun's code, which differs in two details: it draws the right digits with replacement, and resizes by nearest
    neighbour.
    """
    parts, name = read(source, root, download)
    generator = torch.Generator().manual_seed(seed)
    train, val, test = (pairs(image, digit, generator) for image, digit in parts)
    std, mean = torch.std_mean(train.fields["image"])
    for split in (train, val, test):
        split.fields["image"].sub_(mean).div_(std)
    return Splits(train, val, test, name=f"Multi-MNIST, pairs (data.seed={seed}) of {name}")


def pairs(image: Tensor, digit: Tensor, generator: torch.Generator) -> Fields:
    """Pairs each uint8 image (N, 28, 28) with a randomly drawn right image; returns pixels in [0, 1] and digits."""
    partner = torch.randperm(len(image), generator=generator)
    pixels = torch.empty(len(image), 1, 28, 28)
    for chunk in torch.split(torch.arange(len(image)), CHUNK):
        pixels[chunk] = overlay(image[chunk], image[partner[chunk]])
    return Fields({"image": pixels, "left": digit.long(), "right": digit[partner].long()})


def overlay(left: Tensor, right: Tensor) -> Tensor:
    """Overlays pairs of uint8 images (N, 28, 28) and returns one image per pair, (N, 1, 28, 28) in [0, 1].

    The left image is at the upper left of a canvas of 36×36 pixels, the right image 6 pixels further right and down.
    The brighter pixel of both images is used, and the canvas is resized to 28×28.
    """
    canvas = torch.maximum(F.pad(left, (0, 8, 0, 8)), F.pad(right, (6, 2, 6, 2)))
    return F.interpolate(canvas[:, None].float().div_(255), size=(28, 28), mode="bilinear", antialias=True)
