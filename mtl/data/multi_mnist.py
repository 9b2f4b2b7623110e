"""Multi-MNIST: two digits laid over each other, and which one is the left, which the right?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.data.fields import Fields, Splits
from mtl.data.mnist import read

CHUNK = 1_000  # images made at a time, so that beside the result only some MB are needed


def multi_mnist(*, source: str = "bundled", root: str = "data", seed: int = 0, download: bool = True) -> Splits:
    """Two overlaid handwritten digits with the fields image (N, 1, 28, 28), standardised; left (N,) and right (N,).

    Each image of a split of MNIST is the left one in one pair and the right one in one pair of the same split. The
    pixels are standardised by the mean and the standard deviation of the training pairs' pixels.

    Args:
        source: of the single digits, as for `mtl.data.mnist`: `bundled`, 4,000 / 500 / 500 pairs for training,
            validation and test; or `torchvision`, 55,000 / 5,000 / 10,000.
        root: torchvision's folder, which holds `MNIST/raw` or is where that is downloaded to.
        seed: of the pairs.
        download: whether torchvision downloads what isn't there.

    Raises:
        UserError: for another source, or where torchvision can neither find nor download the files.

    Source: Sener and Koltun, arXiv 1810.04650, after Sabour et al., arXiv 1710.09829. The layout is that of Sener and
    Koltun's code, which differs in two things: it draws the right digits with replacement, and resizes to the nearest
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
    """The pairs of uint8 images (N, 28, 28) with digits (N,), in [0, 1]: each image with a drawn one at its right."""
    partner = torch.randperm(len(image), generator=generator)
    pixels = torch.empty(len(image), 1, 28, 28)
    for chunk in torch.split(torch.arange(len(image)), CHUNK):
        pixels[chunk] = overlay(image[chunk], image[partner[chunk]])
    return Fields({"image": pixels, "left": digit.long(), "right": digit[partner].long()})


def overlay(left: Tensor, right: Tensor) -> Tensor:
    """Pairs of uint8 images (N, 28, 28) in one image each, (N, 1, 28, 28) in [0, 1].

    The left one is at the upper left of a canvas of 36×36, the right one 6 pixels further right and down; the brighter
    pixel of both is taken, and the canvas resized to 28×28.
    """
    canvas = torch.maximum(F.pad(left, (0, 8, 0, 8)), F.pad(right, (6, 2, 6, 2)))
    return F.interpolate(canvas[:, None].float().div_(255), size=(28, 28), mode="bilinear", antialias=True)
