"""Taskonomy: pictures of buildings and their maps, from the PNG files in which it was released."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.data.dense import Augment, Maps
from mtl.data.fields import Splits
from mtl.data.splitting import NAMES
from mtl.errors import FOREIGN, UserError, describe_error, suggest

CLASSES = (  # by the number of the class, which is the value in the files minus 1
    *("background", "bottle", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "microwave"),
    *("oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"),
)
FILE = re.compile(r"point_(\d+)_view_(\d+)_domain_\w+\.png")
View = tuple[str, int, int]  # building, point and view


def _depth(values: Tensor) -> Tensor:
    """Converts units of 1/512 m to metres; 65535 is missing."""
    return torch.where(values == 65535, 0.0, values / 512)


def _normal(values: Tensor) -> Tensor:
    """Converts bytes around 127.5 to unit vectors; a pixel without direction, of 128 or 0 only, is missing."""
    vectors = values[:3] / 127.5 - 1
    length = vectors.norm(dim=0, keepdim=True)
    return torch.where((length - 1).abs() > 0.5, 0.0, vectors / length.clamp(min=0.01))


def _curvature(values: Tensor) -> Tensor:
    return (values[:2] - 127) / 128


# By folder: the kind of the map, see mtl.data.dense, the conversion, and whether it was computed from the building's
# mesh, so that the pixels without depth are missing.
FOLDERS: dict[str, tuple[str, Callable[[Tensor], Tensor], bool]] = {
    "depth_euclidean": ("depth", _depth, True),
    "depth_zbuffer": ("depth", _depth, True),
    "edge_occlusion": ("values", lambda values: values[:1] / 65535, True),
    "edge_texture": ("values", lambda values: values[:1] / 65535, False),
    "keypoints2d": ("values", lambda values: values[:1] / 65535, False),
    "keypoints3d": ("values", lambda values: values[:1] / 65535, True),
    "normal": ("normals", _normal, True),
    "principal_curvature": ("values", _curvature, True),
    "reshading": ("values", lambda values: values[:1] / 255, True),
    "segment_semantic": ("classes", lambda values: values[:1] - 1, False),
}
MASKS: dict[str, Callable[[Tensor], Tensor]] = {  # whether a pixel is missing
    "depth_euclidean": lambda values: values[:1] == 65535,
    "depth_zbuffer": lambda values: values[:1] == 65535,
    "mask_valid": lambda values: values[:1] == 0,
}


class Views(Maps):
    """A data set of views of buildings.

    Args:
        files: The file of each view, by folder.
        views: The views that belong to this split.
        size: The height and width to which pictures and maps are resized.
        mask: The folder that says which pixels are missing in the maps of the mesh; None for no mask.
        augment: A transform of the sample, or several; see `dense`.
    """

    def __init__(
        self,
        files: Mapping[str, Mapping[View, Path]],
        views: Sequence[View],
        size: Sequence[int],
        mask: str | None,
        augment: Augment | None = None,
    ) -> None:
        self.files, self.views, self.size, self.mask = files, list(views), list(size), mask
        self.kinds = {"image": "image", **{name: FOLDERS[name][0] for name in files if name in FOLDERS}}
        self.root, self.numbers = Path(), list(range(len(self.views)))
        self.augment = [augment] if callable(augment) else list(augment or ())
        self._of_mask: tuple[int, Tensor] | None = None  # the last sample's number and values in the folder of the mask

    def _read(self, name: str, number: int) -> Tensor:
        if name == "image":
            return self._values("rgb", number)[:3] / 255
        kind, convert, of_mesh = FOLDERS[name]
        values = convert(self._values(name, number))
        if of_mesh and self.mask is not None:
            missing = MASKS[self.mask](self._values(self.mask, number))
            values = values.masked_fill(missing, torch.nan if kind == "values" else 0.0)
        return values

    def _values(self, folder: str, number: int) -> Tensor:
        """Returns the values of a file, (channels, H, W). That of the mask is read once for all maps of a sample."""
        if folder != self.mask:
            return self._decoded(folder, number)
        if self._of_mask is None or self._of_mask[0] != number:
            self._of_mask = number, self._decoded(folder, number)
        return self._of_mask[1]

    def _decoded(self, folder: str, number: int) -> Tensor:
        """Reads a file in the size of the data; maps take the nearest value."""
        from PIL import Image

        path = self.files[folder][self.views[number]]
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGB") if folder == "rgb" else opened
                how = Image.Resampling.BILINEAR if folder == "rgb" else Image.Resampling.NEAREST
                values = np.array(picture.resize((self.size[1], self.size[0]), how), np.float32)
        except FOREIGN as error:
            raise UserError(f"{path} can't be read: {describe_error(error)}") from error
        wanted = {"normal": 3, "principal_curvature": 2}.get(folder, 1)
        tensor = torch.from_numpy(values if values.ndim == 3 else values[..., None]).movedim(2, 0)
        if len(tensor) < wanted:
            raise UserError(f"{path} has {len(tensor)} channel; a file of {folder} must have {wanted}")
        return tensor


def taskonomy(
    *,
    root: str = "data/taskonomy",
    maps: Sequence[str],
    split: str = "data/taskonomy/train_val_test_tiny.csv",
    mask: str | None = "depth_zbuffer",
    size: int | Sequence[int] = 256,
    augment: Augment | None = None,
) -> Splits:
    """Returns views of Taskonomy's buildings, from `{root}/{folder}/{building}/point_{p}_view_{v}_domain_{d}.png`.

    Between folder and building there may be the folder `taskonomy`, as the download tool of Omnidata makes it. The
    pictures of the folder `rgb` become the field `image` (N, 3, H, W) in [0, 1]. Each map becomes a field of the same
    name:

    - `depth_euclidean` and `depth_zbuffer` (N, H, W), in metres; 65535 in the 16 bits of a file is missing, and NaN;
    - `normal` (N, 3, H, W), unit vectors; NaN where the file has no direction;
    - `edge_occlusion`, `edge_texture`, `keypoints2d` and `keypoints3d` (N, H, W), from 0 to 1, of 16 bits;
    - `principal_curvature` (N, 2, H, W), from -1 to 1, and `reshading` (N, H, W), from 0 to 1;
    - `segment_semantic` (N, H, W), class numbers from 0 to 16; pixels whose class is uncertain are -100.

    The fact `size` is [H, W], and `names` has the names of the classes. A view that isn't in all folders is left out.

    Args:
        root: The folder with the folders of pictures and maps.
        maps: The folders of the maps.
        split: A CSV file with the columns id, train, val and test, which Taskonomy has for its partitions: the name of
            a building, and 1 in the column of its split.
        mask: The folder that says which pixels have no surface: `depth_zbuffer`, `depth_euclidean` or `mask_valid`.
            There, depths, normals, curvature, reshading, `edge_occlusion` and `keypoints3d` are missing, and NaN. None
            for no mask.
        size: The height and width to which pictures and maps are resized, as one number or as [height, width].
        augment: A transform of the training samples, or several; see `dense`.

    Raises:
        UserError: If a folder, a building or a file is missing or damaged, or if a map is unknown.
    """
    _check("maps", maps, FOLDERS)
    _check("mask", [mask] if mask else [], MASKS)
    buildings = _buildings(Path(split))
    wanted = [name for names in buildings.values() for name in names]
    folders = dict.fromkeys(["rgb", *maps, *([mask] if mask else [])])
    files = {folder: _files(Path(root) / folder, wanted) for folder in folders}
    views = sorted(set.intersection(*(set(each) for each in files.values())))
    left_out = len(files["rgb"]) - len(views)
    shape = [size, size] if isinstance(size, int) else list(size)
    parts: dict[str, Any] = {
        name: Views(files, [v for v in views if v[0] in names], shape, mask, augment if name == "train" else None)
        for name, names in buildings.items()
        if names
    }
    classes = {"segment_semantic": {"kind": "class", "vocabulary": list(CLASSES)}}
    warning = f"data.maps: pictures that are left out, since some of their maps are missing: {left_out}"
    return Splits(
        **parts,
        name=f"Taskonomy in {root}, split by {split}",
        facts={"size": shape, "targets": classes, "names": list(CLASSES)},
        warnings=[warning] if left_out else [],
    )


def _check(key: str, names: Sequence[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"data.{key}: there is no map '{name}'" + suggest(str(name), known))


def _buildings(path: Path) -> dict[str, set[str]]:
    """Reads the names of the buildings, in small letters, by split."""
    try:
        with path.open() as lines:
            rows = list(csv.DictReader(lines))
        named = {name: {row["id"].lower() for row in rows if row[name] == "1"} for name in NAMES}
    except (OSError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"data.split: {path.resolve()} can't be read ({describe_error(error)}). It must have the columns id, "
            "train, val and test; Taskonomy's own are in https://github.com/StanfordVL/taskonomy/raw/master/data/assets/"
            "splits_taskonomy.zip"
        ) from error
    if not named["train"]:
        raise UserError(f"data.split: no building in {path.resolve()} has 1 in the column train")
    return named


def _files(folder: Path, buildings: Sequence[str]) -> dict[View, Path]:
    """Returns the file of each view of the buildings."""
    where = folder / "taskonomy" if (folder / "taskonomy").is_dir() else folder
    present = {path.name.lower(): path for path in where.iterdir() if path.is_dir()} if where.is_dir() else {}
    files = {}
    for building in buildings:
        if building not in present:
            raise UserError(
                f"data.root: there is no folder {where / building}. Each building of data.split must be in {folder}; "
                "remove its row from that file if you do without it"
            )
        for path in present[building].iterdir():
            if matched := FILE.fullmatch(path.name):
                files[building, int(matched[1]), int(matched[2])] = path
    if not files:
        raise UserError(f"data.root: {where} has no files such as point_0_view_0_domain_{folder.name}.png")
    return files
