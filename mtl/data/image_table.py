"""Pictures in a folder, with a table of their labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mtl.data import cells
from mtl.data.cells import Part
from mtl.data.fields import Splits
from mtl.data.images import IMAGENET_MEAN, IMAGENET_STD, Images, Transform
from mtl.data.splitting import NAMES
from mtl.data.table import at_random, check_names, check_split, doubts, how_split, target_columns
from mtl.errors import UserError


def image_table(
    images: str,
    labels: str,
    *,
    targets: Sequence[str],
    file: str = "file",
    classes: Sequence[str] = (),
    standardize_targets: Sequence[str] = (),
    size: int | Sequence[int] = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    split: Sequence[float] | None = (0.8, 0.1, 0.1),
    split_column: str | None = None,
    seed: int = 0,
    trained_on: Mapping[str, Any] | None = None,
) -> Splits:
    """Returns pictures with the field image (N, 3, height, width), standardised, and one field (N,) per target column.

    Args:
        images: The folder of the pictures.
        labels: A CSV or Parquet file with one row per picture.
        targets, classes, standardize_targets: See `mtl.data.table`, which also describes the fact `targets`.
        file: The column with the path of the picture, relative to the folder.
        size, mean, std: See `mtl.data.images.Transform`.
        split, seed, trained_on: See `mtl.data.table`.
        split_column: A column with the values train, val and test. If it is set, no split is drawn at random.

    Raises:
        UserError: If the table is invalid, or if pictures are missing or damaged.
    """
    check_names({"targets": targets}, {"classes": classes, "standardize_targets": standardize_targets})
    check_split(split, trained_on)
    if "image" in targets:
        raise UserError("data.targets: the field 'image' is the picture; give that column another name")
    wanted = {"file": [file], "targets": targets, "split_column": [split_column] if split_column else []}
    whole = cells.read(labels, wanted)
    parts = _by_column(whole, split_column) if split_column else at_random(whole, split, seed)
    fields, facts = target_columns(parts, targets, classes, standardize_targets, trained_on)
    prepare = Transform(size, mean, std)
    data: dict[str, Any] = {
        name: Images(_files(images, part, file), fields[name], prepare) for name, part in parts.items()
    }
    drawn = f", split by '{split_column}'" if split_column else how_split(split, seed)
    return Splits(
        **data,
        name=f"pictures of {whole.file}{drawn}",
        facts={"targets": facts},
        warnings=[] if trained_on is not None else doubts(parts, facts, classes),
    )


def _by_column(whole: Part, column: str) -> dict[str, Part]:
    texts = cells.texts(whole, column)
    for row, text in zip(whole.rows.index, texts, strict=True):
        if text not in NAMES:
            raise UserError(
                f"data.split_column: row {row} of {whole.file} has '{text}' in the column '{column}', not one of "
                + ", ".join(NAMES)
            )
    if "train" not in texts:
        raise UserError(f"data.split_column: no row of {whole.file} has 'train' in the column '{column}'")
    return {
        name: whole.take(torch.tensor([place for place, text in enumerate(texts) if text == name]))
        for name in NAMES
        if name in texts
    }


def _files(folder: str, part: Part, column: str) -> list[str]:
    if not Path(folder).is_dir():
        raise UserError(f"data.images: there is no folder {Path(folder).resolve()}")
    files = []
    for row, cell in zip(part.rows.index, part.rows[column], strict=True):
        path = Path(folder) / str(cell).strip()
        if not path.is_file():
            raise UserError(f"data.labels: row {row} of {part.file} names {str(cell)!r}; there is no file {path}")
        files.append(str(path))
    return files
