"""Ali-CCP, a log of clicks and purchases, in the CSV files that libraries of recommenders use."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.data import numeric
from mtl.data.fields import Fields, Splits
from mtl.data.splitting import NAMES
from mtl.errors import UserError

EVENTS = ("click", "purchase")


def aliccp(*, root: str = "data/ali-ccp", files: str = "ali_ccp_{split}.csv") -> Splits:
    """Returns Ali-CCP as Torch-RecHub and others preprocess it, with its own training, validation and test splits.

    Each split is a CSV file with the columns `click` and `purchase`, of 0 and 1. The other columns are inputs, and
    become fields of the same names, (N,): columns whose name begins with D are numbers, float32, such as `D508`; all
    others are ids, int32, such as `101` for the user and `205` for the item, with 0 for missing and rare ones. Ids that
    are larger than any in the training split become 0 too.

    The fields `click` and `purchase` are float32. A purchase without a click doesn't occur: the label is 0 for all rows
    without a click, as models of chains of events need it. The field `conversion` is the purchase after a click, and
    NaN without a click.

    The fact `columns` has the largest id of each column of ids, and mean and std of each column of numbers, both of the
    training split.

    Args:
        root: The folder of the files.
        files: The names of the files, with `{split}` for train, val and test.

    Raises:
        UserError: If a file is missing or damaged, or if the files have different columns.
    """
    paths = {split: Path(root) / files.replace("{split}", split) for split in NAMES}
    for path in paths.values():
        if not path.is_file():
            raise UserError(
                f"Ali-CCP: there is no file {path.resolve()}. The folder data.root must contain "
                f"{', '.join(each.name for each in paths.values())}, which the script preprocess_ali_ccp.py of "
                "https://github.com/datawhalechina/torch-rechub makes from the files of "
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
    inputs = [name for name in kinds if name not in EVENTS]
    read = {split: numeric.columns_of(path, kinds) for split, path in paths.items()}
    columns = {name: _column(read["train"][name]) for name in inputs}
    data: dict[str, Any] = {
        split: Fields({name: _known(arrays[name], columns[name]) for name in inputs} | _events(arrays, paths[split]))
        for split, arrays in read.items()
    }
    return Splits(**data, name=f"Ali-CCP in {root}", facts={"columns": columns})


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


def _events(arrays: numeric.Arrays, path: Path) -> dict[str, Tensor]:
    """Returns the labels of the events.

    Raises:
        UserError: If there is a purchase without a click.
    """
    click, purchase = (torch.from_numpy(arrays[event]) for event in EVENTS)
    wrong = (purchase > click).nonzero()
    if len(wrong):
        raise UserError(f"data: row {int(wrong[0]) + 1} of {path} has a purchase without a click; leave such rows out")
    return {"click": click, "purchase": purchase, "conversion": purchase.masked_fill(click == 0, torch.nan)}
