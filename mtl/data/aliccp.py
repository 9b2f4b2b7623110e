"""Ali-CCP, a log of clicks and purchases, in its original files or in the CSV files of libraries of recommenders."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.data import aliccp_raw, numeric
from mtl.data.fields import Fields, Splits
from mtl.data.splitting import NAMES, held_out
from mtl.errors import UserError

EVENTS = ("click", "purchase")


def aliccp(
    *,
    root: str = "data/ali-ccp",
    files: str = "ali_ccp_{split}.csv",
    validation: float = 0.1,
    rare: int = 10,
    seed: int = 0,
) -> Splits:
    """Returns Ali-CCP as Torch-RecHub and others preprocess it, or from its original files.

    A preprocessed split is a CSV file with the columns `click` and `purchase`, of 0 and 1. The other columns are
    inputs, and become fields of the same names, (N,): columns whose name begins with D are numbers, float32, such as
    `D508`; all others are ids, int32, such as `101` for the user and `205` for the item, with 0 for missing and rare
    ones. Ids that are larger than any in the training split become 0 too.

    Without these files, `sample_skeleton_{train,test}.csv` and `common_features_{train,test}.csv` are read. Their
    fields are the columns of ids and `D508`, `D509`, `D702` and `D853`, which are not scaled; the users' histories,
    `109_14` and others, are left out. Their rows with a purchase without a click are left out, as in published work.

    The fields `click` and `purchase` are float32. The label of a purchase is 0 for all rows without a click, as models
    of chains of events need it. The field `conversion` is the purchase after a click, and NaN without a click.

    The fact `columns` has the largest id of each column of ids, and mean and std of each column of numbers, both of the
    training split.

    Args:
        root: The folder of the files.
        files: The names of the preprocessed files, with `{split}` for train, val and test.
        validation: For the original files, the share of the training rows that are held out for validation.
        rare: For the original files, ids with fewer training rows become 0.
        seed: For the original files, the seed for choosing the held-out rows.

    Raises:
        UserError: If a file is missing or damaged, or if the files have different columns.
    """
    folder = Path(root)
    paths = {split: folder / files.replace("{split}", split) for split in NAMES}
    original = [name for split in ("train", "test") for name in aliccp_raw.file_names(split)]
    if not any(path.is_file() for path in paths.values()) and all((folder / name).is_file() for name in original):
        read = _original(folder, validation, rare, seed)
    else:
        read = _preprocessed(paths, original)
    inputs = [name for name in read["train"] if name not in EVENTS]
    columns = {name: _column(read["train"][name]) for name in inputs}
    data: dict[str, Any] = {
        split: Fields({name: _known(arrays[name], columns[name]) for name in inputs} | _events(arrays))
        for split, arrays in read.items()
    }
    return Splits(**data, name=f"Ali-CCP in {root}", facts={"columns": columns})


def _preprocessed(paths: dict[str, Path], original: list[str]) -> dict[str, numeric.Arrays]:
    """Returns the columns of each split from the preprocessed files."""
    for path in paths.values():
        if not path.is_file():
            raise UserError(
                f"Ali-CCP: there is no file {path.resolve()}. The folder data.root must contain either "
                f"{', '.join(each.name for each in paths.values())}, which the script preprocess_ali_ccp.py of "
                f"https://github.com/datawhalechina/torch-rechub makes, or the original files {', '.join(original)} of "
                "https://tianchi.aliyun.com/dataset/408"
            )
    names = {split: numeric.header(path) for split, path in paths.items()}
    kinds = {name: _kind(name) for name in names["train"]}
    for split, path in paths.items():
        if names[split] != names["train"]:
            raise UserError(f"data: {path} and {paths['train']} have different columns")
        for event in EVENTS:
            if event not in kinds:
                raise UserError(f"data: {path} has no column '{event}'; its columns are {', '.join(names[split])}")
    read = {split: numeric.columns_of(path, kinds) for split, path in paths.items()}
    for split, arrays in read.items():
        wrong = np.flatnonzero(arrays["purchase"] > arrays["click"])
        if len(wrong):
            where = f"row {int(wrong[0]) + 1} of {paths[split]}"
            raise UserError(f"data: {where} has a purchase without a click; leave such rows out")
    return read


def _original(folder: Path, validation: float, rare: int, seed: int) -> dict[str, numeric.Arrays]:
    """Returns the columns of each split from the original files."""
    if type(rare) is not int or rare < 1:
        raise UserError(f"data.rare is {rare!r}; it must be a whole number of at least 1")
    whole, test = (aliccp_raw.read(folder, split) for split in ("train", "test"))
    rest, chosen = (indices.numpy() for indices in held_out(len(whole["click"]), validation, seed))
    read = {
        "train": {name: values[rest] for name, values in whole.items()},
        "val": {name: values[chosen] for name, values in whole.items()},
        "test": test,
    }
    aliccp_raw.encode(read, rare)
    return read


def _kind(name: str) -> numeric.Kind:
    if name in EVENTS:
        return numeric.LABEL
    return numeric.NUMBER if name.startswith("D") else numeric.ID


def _column(values: Any) -> dict[str, Any]:
    """Returns the fact about a column of the training split."""
    if values.dtype == np.int32:
        return {"kind": "category", "size": max(1, int(values.max()))}
    std = float(values.std(dtype=np.float64)) if (values != values[0]).any() else 1.0  # a constant is only shifted
    return {"kind": "number", "mean": float(values.mean(dtype=np.float64)), "std": std}


def _known(values: Any, column: dict[str, Any]) -> Tensor:
    """Returns a column as a tensor, with 0 for ids that the training split can't have."""
    tensor = torch.from_numpy(values)
    return tensor if column["kind"] == "number" else tensor.masked_fill(tensor > column["size"], 0)


def _events(arrays: numeric.Arrays) -> dict[str, Tensor]:
    """Returns the labels of the events."""
    click, purchase = (torch.from_numpy(arrays[event]) for event in EVENTS)
    return {"click": click, "purchase": purchase, "conversion": purchase.masked_fill(click == 0, torch.nan)}
