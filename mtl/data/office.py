"""Office-31 and Office-Home: pictures of the same classes of objects from several domains."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mtl.data.fields import Splits
from mtl.data.images import Images, Transform
from mtl.data.splitting import random_parts
from mtl.errors import UserError

KINDS = {
    "office31": (
        "Office-31",
        ("amazon", "dslr", "webcam"),
        "https://faculty.cc.gatech.edu/~judy/domainadapt/",
    ),
    "office_home": (
        "Office-Home",
        ("Art", "Clipart", "Product", "Real World"),
        "https://www.hemanthdv.org/officeHomeDataset.html",
    ),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


def office_domain(
    *,
    kind: str,
    domain: str,
    root: str = "data",
    size: int | Sequence[int] = 224,
    augment: bool = False,
    split: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
) -> Splits:
    """Returns one domain's pictures with the fields image (N, 3, size, size), standardised, and label (N,).

    A class has the same number in every domain: its position among the sorted names of all domains' classes. The fact
    `targets` has the names of the classes.

    Args:
        kind: office31 or office_home.
        domain: amazon, dslr or webcam; or Art, Clipart, Product or Real World.
        root: The folder with one folder per domain, which has (directly or in `images`) one folder per class.
        size, augment: See `mtl.data.images.Transform`; only training pictures are augmented.
        split, seed: The shares of training, validation and test, and the seed of the random split; see `random_parts`.

    Raises:
        UserError: If kind or domain is unknown, or if folders are missing or empty.
    """
    if kind not in KINDS:
        raise UserError(f"data.kind: '{kind}' is not one of {', '.join(KINDS)}")
    name, domains, page = KINDS[kind]
    if domain not in domains:
        raise UserError(f"data.domain: '{domain}' is not one of {', '.join(domains)}")
    pictures = {each: _pictures(Path(root) / each) for each in domains}
    if not pictures[domain]:
        raise UserError(
            f"{name}: there are no pictures in {(Path(root) / domain).resolve()}. This folder must contain a folder "
            f"for each class: get the data set from {page}, or name another folder with data.root=… (or "
            "data.sources.NAME.root=…)"
        )
    classes = sorted({path.parent.name for paths in pictures.values() for path in paths})
    files = [str(path) for path in pictures[domain]]
    label = torch.tensor([classes.index(path.parent.name) for path in pictures[domain]])
    parts = {
        part: Images(
            [files[index] for index in chosen],
            {"label": label[chosen]},
            Transform(size, augment=augment and part == "train"),
        )
        for part, chosen in random_parts(len(files), split, seed).items()
    }
    return Splits(
        **parts,
        name=f"{name}, {domain}, split at random (data.seed={seed})",
        facts={"targets": {"label": {"kind": "class", "vocabulary": classes}}},
        warnings=(),
        epoch=None,
        readers=None,
    )


def _pictures(folder: Path) -> list[Path]:
    inner = folder / "images"  # the layout in which Office-31 is published
    paths = (inner if inner.is_dir() else folder).glob("*/*")
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
