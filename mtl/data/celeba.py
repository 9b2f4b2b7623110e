"""CelebA, loaded with torchvision: pictures of faces with 40 binary attributes each."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mtl.data.fields import Splits
from mtl.data.images import IMAGENET_MEAN, IMAGENET_STD, Images, Transform
from mtl.data.public import files_of

PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
FILES = (
    "the folder img_align_celeba and list_attr_celeba.txt, identity_CelebA.txt, list_bbox_celeba.txt, "
    "list_landmarks_align_celeba.txt, list_eval_partition.txt"
)


def celeba(
    *,
    root: str = "data",
    download: bool = False,
    size: int = 64,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: bool = False,
) -> Splits:
    """Returns faces with the field image (N, 3, size, size), standardised, and one field (N,) of 0 and 1 per attribute.

    The attributes are floats and keep the names that CelebA gives them, from 5_o_Clock_Shadow to Young. The splits are
    the official ones.

    Args:
        root: torchvision's data folder, which contains `celeba`.
        download: Whether to download missing files; torchvision needs the package gdown for the download.
        size, mean, std, augment: See `mtl.data.images.Transform`; only training pictures are augmented.

    Raises:
        UserError: If files are missing or damaged.
    """
    from torchvision.datasets import CelebA

    folder = Path(root) / CelebA.base_folder
    with files_of("CelebA", folder, FILES, PAGE, download=download):
        whole = CelebA(root, split="all", download=download)
        lines = (folder / "list_eval_partition.txt").read_text().split("\n")
        part = torch.tensor([int(line.split()[1]) for line in lines if line.strip()])
    names = [name for name in whole.attr_names if name]  # the header's line ends with a space
    files = [str(folder / "img_align_celeba" / name) for name in whole.filename]

    def split(number: int, augment: bool = False) -> Images:
        chosen = (part == number).nonzero().flatten()
        fields: dict[str, Tensor] = {name: whole.attr[chosen, place].float() for place, name in enumerate(names)}
        return Images([files[index] for index in chosen], fields, Transform(size, mean, std, augment=augment))

    return Splits(split(0, augment), split(1), split(2), name=f"CelebA in {folder}")
