"""CIFAR-100, through torchvision: each picture has one of 100 fine classes, and one of 20 coarse ones."""

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
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of the training images, pixels in [0, 1]
PADDING = 4  # augmentation shifts a picture by up to this, in each direction


def cifar100(
    *, root: str = "data", download: bool = False, augment: bool = False, validation: float = 0.1, seed: int = 0
) -> Splits:
    """Pictures with the fields image (N, 3, 32, 32), standardised; fine (N,), of 100 classes; coarse (N,), of 20.

    The fact `targets` has the classes' names.

    Args:
        root: torchvision's folder, which holds `cifar-100-python`.
        download: whether what isn't there is downloaded.
        augment: whether training pictures are shifted by up to 4 pixels, and turned to their mirror image.
        validation: the share of the training images that is held out for validation.
        seed: of that draw.

    Raises:
        UserError: for files that are missing or damaged.
    """
    from torchvision.datasets import CIFAR100

    folder = Path(root) / CIFAR100.base_folder
    with files_of("CIFAR-100", folder, "the files train, test and meta", PAGE, download=download):
        train = _fields(CIFAR100(root, train=True, download=download), folder / "train")
        test = _fields(CIFAR100(root, train=False), folder / "test")
        names = _names(folder / "meta")
    kept, chosen = held_out(len(train), validation, seed)
    training = Fields(train.take(kept))
    return Splits(
        Shifted(training) if augment else training,
        Fields(train.take(chosen)),
        test,
        name=f"CIFAR-100 in {folder}",
        facts={"targets": {name: {"kind": "class", "vocabulary": classes} for name, classes in names.items()}},
    )


class Shifted(Dataset[dict[str, Tensor]]):
    """Samples whose images are drawn anew each time: shifted by up to 4 pixels, zeros at the edges, and mirrored."""

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
    with path.open("rb") as file:  # torchvision leaves the coarse classes out; it has compared the file's checksum
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
