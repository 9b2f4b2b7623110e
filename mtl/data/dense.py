"""Pictures with maps of the same size, such as depths and normals, from folders of `.npy` files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl.data.fields import Splits
from mtl.data.splitting import held_out
from mtl.errors import FOREIGN, UserError, describe_error, suggest

MISSING_CLASS = -100
KINDS = ("classes", "depth", "inverse_depth", "normals", "values")
NYUV2 = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv", "wall"),
    "window",
)
CITYSCAPES = {  # the names of the classes by their number
    7: ("flat", "construction", "object", "nature", "sky", "human", "vehicle"),
    19: (
        *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
        *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
    ),
}
Augment = Callable[[dict[str, Any]], dict[str, Any]] | Sequence[Callable[[dict[str, Any]], dict[str, Any]]]


class Maps(Dataset[dict[str, Tensor]]):
    """A data set of pictures and their maps: the files `{folder}/{number}.npy` below a folder.

    Args:
        root: The folder that contains the folders of pictures and maps.
        maps: The kind of each map, one of KINDS, by the name of its folder, which is also the name of its field.
        numbers: The numbers of the samples; None for all files of the folder `image`.
        augment: A transform of the sample, or several; see `dense`.

    Raises:
        UserError: If a folder has no files, or if the folders have different files.
    """

    def __init__(
        self,
        root: Path,
        maps: Mapping[str, str],
        numbers: Sequence[int] | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.root = root
        self.kinds = {"image": "image", **maps}
        for name, kind in maps.items():
            if kind not in KINDS:
                raise UserError(f"data.maps.{name}: there is no kind '{kind}'" + suggest(str(kind), KINDS))
        files = {name: _numbers(root / name) for name in self.kinds}
        for name, found in files.items():
            if different := sorted(found ^ files["image"]):
                raise UserError(
                    f"data.root: {root / name} and {root / 'image'} must have the same files; only one of them has "
                    f"{different[0]}.npy"
                )
        self.numbers = sorted(files["image"]) if numbers is None else list(numbers)
        self.augment = [augment] if callable(augment) else list(augment or ())

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {name: self._read(name, self.numbers[index]) for name in self.kinds}
        sizes = {name: tuple(value.shape[-2:]) for name, value in sample.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f"picture and maps {self.numbers[index]}.npy in {self.root} have unlike sizes: {sizes}")
        if self.augment:
            sample = self._augmented(sample)
        # Where nothing was moved the missing values are set here as well, so that no transform meets NaN or -100.
        return {name: _marked(value, self.kinds.get(name, "values")) for name, value in sample.items()}

    def _read(self, name: str, number: int) -> Tensor:
        path = self.root / name / f"{number}.npy"
        try:
            values = np.load(path, allow_pickle=False)
            tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        except FOREIGN as error:
            raise UserError(f"{path} can't be read: {describe_error(error)}") from error
        channels = {"image": 3, "normals": 3}.get(self.kinds[name])
        tensor = tensor[..., None] if tensor.ndim == 2 else tensor
        if tensor.ndim != 3 or (channels is not None and tensor.shape[2] != channels):
            wanted = f"(H, W, {channels})" if channels else "(H, W) or (H, W, channels)"
            raise UserError(f"{path} is of shape {tuple(values.shape)}; it must be {wanted}")
        return tensor.movedim(2, 0)

    def _augmented(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        from mtl.data.augment import KINDS as TYPES  # takes seconds

        # Transforms fill what lies outside with 0. A channel of ones tells it from class 0, and from a value of 0.
        marked = [name for name, kind in self.kinds.items() if kind in ("classes", "values")]
        for name in marked:
            sample[name] = torch.cat([sample[name], torch.ones_like(sample[name][:1])])
        sample = {name: TYPES[self.kinds[name]](value) for name, value in sample.items()}
        for transform in self.augment:
            sample = transform(sample)
        sample = {name: value.as_subclass(Tensor) for name, value in sample.items()}
        for name in marked:
            sample[name] = sample[name][:-1].masked_fill(sample[name][-1:] == 0, torch.nan)
        return sample


def _numbers(folder: Path) -> set[int]:
    numbers = {int(path.stem) for path in folder.glob("*.npy") if path.stem.isdigit()}
    if not numbers:
        raise UserError(f"data.root: there are no files {folder / '0.npy'}, {folder / '1.npy'}, …")
    return numbers


def _marked(value: Tensor, kind: str) -> Tensor:
    """Returns a map with its missing values as NaN, or class numbers (H, W) with -100 for missing ones."""
    match kind:
        case "classes":
            number = value[0].nan_to_num(-1).round().long()
            return number.masked_fill(number < 0, MISSING_CLASS)
        case "depth" | "inverse_depth":
            value = value.masked_fill(~(value > 0), torch.nan)
        case "normals":
            value = value.masked_fill(~(value.norm(dim=0, keepdim=True) > 0), torch.nan)
    return value[0] if len(value) == 1 else value


def dense(
    *,
    root: str,
    maps: Mapping[str, str],
    validation: float = 0.1,
    augment: Augment | None = None,
    seed: int = 0,
    names: Mapping[str, Sequence[str]] | None = None,
    of: str = "Pictures with maps",
) -> Splits:
    """Returns pictures and their maps from the files `{root}/{train,val}/{folder}/{number}.npy`.

    This is the layout of the preprocessed data of MTAN and LibMTL. The folder `image` has pictures (H, W, 3) of any
    floating-point values, which become the field `image` (N, 3, H, W). Each other folder is a map, whose field has the
    same name: (N, H, W) for a map of one channel, else (N, channels, H, W). The kinds of maps are

    - `classes`: class numbers; negative ones are missing, and become -100;
    - `depth` and `inverse_depth`: missing where they aren't above zero, and then NaN;
    - `normals`: surface normals of three components, missing where all are zero, and then NaN;
    - `values`: any other numbers; NaN is missing.

    The fact `size` is [H, W].

    Args:
        root: The folder that contains `train` and `val`.
        maps: The kind of each map by its folder, such as `{label: classes, depth: depth, normal: normals}`.
        validation: The share of `train` that is held out for validation; `val` is then the test split. With 0, `val` is
            the validation split, and there is no test split.
        augment: A transform of the training samples, or several, such as those of `torchvision.transforms.v2` or
            `mtl.data.augment.RandomScaleCrop`. A transform gets a dict of torchvision's tensors.
        seed: The seed for choosing the held-out samples.
        names: The names of the classes, by map.
        of: The name of the data.

    Raises:
        UserError: If files are missing or damaged, or if a kind is unknown.
    """
    train, last = Path(root) / "train", Path(root) / "val"
    everything = Maps(train, maps)
    first = everything[0]["image"]
    facts: dict[str, Any] = {"size": list(first.shape[1:])}
    facts["targets"] = {name: {"kind": "class", "vocabulary": list(each)} for name, each in (names or {}).items()}
    facts["names"] = [name for each in (names or {}).values() for name in each]
    where = f"{of} in {root}"
    if validation == 0:
        warning = "data.validation=0: best.pt is chosen on val, whose figures at best.pt are therefore too good"
        splits = Maps(train, maps, None, augment), Maps(last, maps)
        return Splits(*splits, name=where, facts=facts, warnings=[warning])
    rest, chosen = ([everything.numbers[i] for i in part] for part in held_out(len(everything), validation, seed))
    return Splits(
        Maps(train, maps, rest, augment), Maps(train, maps, chosen), Maps(last, maps), name=where, facts=facts
    )


def nyuv2(
    *, root: str = "data/nyuv2", validation: float = 0.1, augment: Augment | None = None, seed: int = 0
) -> Splits:
    """Returns NYUv2 as MTAN and LibMTL preprocessed it: 13 classes, depths in metres, and surface normals.

    The fields are image (N, 3, H, W), label (N, H, W), depth (N, H, W) and normal (N, 3, H, W); see `dense`, also for
    the arguments. The files have 288 x 384 pixels.
    """
    maps = {"label": "classes", "depth": "depth", "normal": "normals"}
    return dense(
        root=root,
        maps=maps,
        validation=validation,
        augment=augment,
        seed=seed,
        names={"label": NYUV2},
        of="NYUv2",
    )


def cityscapes(
    *,
    root: str = "data/cityscapes",
    classes: int = 7,
    label: str = "label",
    inverse: bool = True,
    validation: float = 0.1,
    augment: Augment | None = None,
    seed: int = 0,
) -> Splits:
    """Returns Cityscapes as MTAN and LibMTL preprocessed it: 7 or 19 classes, and inverse depths.

    The fields are image (N, 3, H, W), the label (N, H, W), which has the name of its folder, and depth (N, H, W); see
    `dense`, also for the other arguments.

    Args:
        classes: The number of classes, 7 or 19.
        label: The folder of the labels with this number of classes.
        inverse: Whether augmentation treats the maps as inverse depths, as they are, so that an enlargement multiplies
            them. The published code of CAGrad and FAMO divides them, as if they were depths.

    Raises:
        UserError: If the number of classes isn't 7 or 19, or for the reasons of `dense`.
    """
    if classes not in CITYSCAPES:
        raise UserError(f"data.classes is {classes!r}; it must be 7 or 19")
    return dense(
        root=root,
        maps={label: "classes", "depth": "inverse_depth" if inverse else "depth"},
        validation=validation,
        augment=augment,
        seed=seed,
        names={label: CITYSCAPES[classes]},
        of="Cityscapes",
    )
