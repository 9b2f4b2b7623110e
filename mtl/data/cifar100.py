"""CIFAR-100, loaded with torchvision: each picture has one of 100 fine classes and one of 20 coarse classes."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl.data.fields import Fields, Splits
from mtl.data.public import files_of
from mtl.data.splitting import held_out

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of the training images' pixels, scaled to [0, 1]
PADDING = 4  # the largest shift in pixels by augmentation, in each direction


def cifar100(
    *, root: str = "data", download: bool = False, augment: bool = False, validation: float = 0.1, seed: int = 0
) -> Splits:
    """Returns pictures with the fields image (N, 3, 32, 32), standardised, fine (N,) and coarse (N,).

    `fine` is one of 100 classes and `coarse` one of 20. The fact `targets` has the names of the classes.

    Args:
        root: torchvision's data folder, which contains `cifar-100-python`.
        download: Whether to download missing files.
        augment: Whether training pictures are randomly shifted by up to 4 pixels and mirrored.
        validation: The share of the training images that is held out for validation.
        seed: The seed for choosing the held-out images.

    Raises:
        UserError: If files are missing or damaged.
    """
    from torchvision.datasets import CIFAR100

    folder = Path(root) / CIFAR100.base_folder
    with files_of("CIFAR-100", folder, "the files train, test and meta", PAGE, download=download):
        train = _fields(CIFAR100(root, train=True, download=download), folder / "train")
        test = _fields(CIFAR100(root, train=False), folder / "test")
        names = _names(folder / "meta")
    remaining, chosen = held_out(len(train), validation, seed)
    training = Fields(train.take(remaining))
    return Splits(
        Shifted(training) if augment else training,
        Fields(train.take(chosen)),
        test,
        name=f"CIFAR-100 in {folder}",
        facts={"targets": {name: {"kind": "class", "vocabulary": classes} for name, classes in names.items()}},
    )


class Shifted(Dataset[dict[str, Tensor]]):
    """Samples with augmented images: randomly shifted by up to 4 pixels, padded with zeros, and randomly mirrored."""

    def __init__(self, data: Fields) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.data[index]
        image = sample["image"]
        top, left = torch.randint(2 * PADDING + 1, (2,)).tolist()
        padded = torch.nn.functional.pad(image, (PADDING,) * 4)
        image = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        return {**sample, "image": image.flip(2) if torch.rand(()) < 0.5 else image}


def _fields(dataset: Any, path: Path) -> Fields:
    with path.open("rb") as file:  # torchvision ignores the coarse classes, but has verified the file's checksum
        coarse: list[int] = pickle.load(file, encoding="latin1")["coarse_labels"]
    if len(set(zip(dataset.targets, coarse, strict=True))) != len(set(dataset.targets)):
        raise ValueError("a fine class has pictures of several coarse ones")
    pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    image = pixels.sub_(mean).div_(std)
    return Fields({"image": image, "fine": torch.tensor(dataset.targets), "coarse": torch.tensor(coarse)})


def _names(path: Path) -> dict[str, list[str]]:
    with path.open("rb") as file:
        meta = pickle.load(file, encoding="latin1")
    return {"fine": list(meta["fine_label_names"]), "coarse": list(meta["coarse_label_names"])}
