"""Oxford-IIIT Pet, loaded with torchvision: cats and dogs with breed, species and segmentation mask."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl.data.fields import Splits
from mtl.data.images import Transform, open_image
from mtl.data.public import files_of
from mtl.data.splitting import held_out

PAGE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
FILES = "the folders images and annotations (with trainval.txt, test.txt and the folder trimaps)"
MEANING = torch.full((256,), -100)  # from the numbers in a trimap to the classes of the mask
MEANING[1], MEANING[2] = 1, 0


def pets(
    *,
    root: str = "data",
    download: bool = False,
    size: int | Sequence[int] = 224,
    augment: bool = False,
    validation: float = 0.1,
    seed: int = 0,
) -> Splits:
    """Returns pictures with the fields image (N, 3, size, size), standardised, breed, species and mask.

    breed (N,) is one of 37 breeds; species (N,) is 0 for a cat and 1 for a dog; mask (N, size, size) is 1 on the
    animal, 0 on the background, and -100 along the border, which has no label. The fact `targets` has the classes'
    names.

    Args:
        root: torchvision's data folder, which contains `oxford-iiit-pet`.
        download: Whether to download missing files.
        size, augment: See `mtl.data.images.Transform`; only training pictures are augmented, together with their masks.
        validation: The share of the training images that is held out for validation.
        seed: The seed for choosing the held-out images.

    Raises:
        UserError: If files are missing or damaged.
    """
    from torchvision.datasets import OxfordIIITPet

    folder = Path(root) / "oxford-iiit-pet"
    with files_of("Oxford-IIIT Pet", folder, FILES, PAGE, download=download):
        train, test = (OxfordIIITPet(root, split=split, download=download) for split in ("trainval", "test"))
    remaining, chosen = held_out(len(train), validation, seed)
    plain = Transform(size)
    return Splits(
        Pets(train, remaining, Transform(size, augment=augment)),
        Pets(train, chosen, plain),
        Pets(test, torch.arange(len(test)), plain),
        name=f"Oxford-IIIT Pet in {folder}",
        facts={
            "targets": {
                "breed": {"kind": "class", "vocabulary": list(train.classes)},
                "species": {"kind": "class", "vocabulary": list(train.bin_classes)},
                "mask": {"kind": "class", "vocabulary": ["Background", "Animal"]},
            }
        },
    )


class Pets(Dataset[dict[str, Tensor]]):
    """A subset of the pictures, with breed, species and mask.

    Args:
        dataset: torchvision's data set.
        indices: The indices of the pictures to use.
        transform: The transform of a picture together with its mask.
    """

    def __init__(self, dataset: Any, indices: Tensor, transform: Transform) -> None:
        chosen = indices.tolist()
        self.images, self.trimaps = ([paths[i] for i in chosen] for paths in (dataset._images, dataset._segs))
        self.breeds, self.species = (torch.tensor(labels)[indices] for labels in (dataset._labels, dataset._bin_labels))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, trimap = self.transform(open_image(self.images[index]), open_image(self.trimaps[index], mode=None))
        mask = MEANING[trimap.long()]
        return {"image": image, "breed": self.breeds[index], "species": self.species[index], "mask": mask}
