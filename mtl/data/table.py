"""Tables: one sample a row, from CSV or Parquet files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.columns import codes
from mtl.data import cells
from mtl.data.cells import Part
from mtl.data.fields import Fields, Splits
from mtl.data.splitting import NAMES, random_parts
from mtl.errors import UserError, suggest

Columns = dict[str, dict[str, Tensor]]  # by split, then by name
Facts = dict[str, dict[str, Any]]  # by name


def table(
    path: str | Mapping[str, str],
    *,
    inputs: Sequence[str],
    targets: Sequence[str],
    categories: Sequence[str] = (),
    classes: Sequence[str] = (),
    standardize_targets: Sequence[str] = (),
    split: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Splits:
    """The rows of a table; each of its named columns is a field of that name, (N,).

    An input is of numbers, float64 as they are in the file, NaN where a cell is empty; or of categories, int64 from 1
    on, 0 where a cell is empty or its category isn't in the training split. A target is of numbers, float32, NaN where
    a cell is empty; or of classes, int64 from 0 on, -100 where a cell is empty. Columns of text are of categories or
    classes. These are numbered in the order of the numbers they are, or of the alphabet.

    The fact `columns` of the splits says of each input its kind, and of numbers mean and std, of categories the
    vocabulary; the fact `targets` says the same of the targets. All are of the training split.

    Args:
        path: one file, of which the splits are drawn; or a file for each: `{train: a.csv, val: b.csv, test: c.csv}`,
            the last two where there are any. A name that ends in `.parquet` or `.pq` is of a Parquet file, any other
            of a CSV file with a header.
        inputs, targets: names of columns.
        categories: inputs that are of categories though they look like numbers.
        classes: targets that are of classes though they look like numbers.
        standardize_targets: targets of numbers whose mean is taken away, and that are then divided by their std.
        split: of one file, the shares of training, validation and test; see `random_parts`.
        seed: of the draw.

    Raises:
        UserError: for a file that can't be read, a column that isn't there, a cell that isn't a number among numbers,
            and a class that the training split doesn't have.
    """
    check_names({"inputs": inputs, "targets": targets}, {"categories": categories, "classes": classes})
    for name in targets:
        if name in inputs:
            raise UserError(f"data.targets: '{name}' is in data.inputs too")
    parts = read_parts(path, {"inputs": inputs, "targets": targets}, split, seed)
    given, columns = input_columns(parts, inputs, categories)
    wanted, facts = target_columns(parts, targets, classes, standardize_targets)
    data = {name: Fields({**given[name], **wanted[name]}) for name in parts}
    files = ", ".join(dict.fromkeys(part.file for part in parts.values()))
    drawn = f", split at random (data.seed={seed})" if not isinstance(path, Mapping) else ""
    return Splits(**data, name=f"{files}{drawn}", facts={"columns": columns, "targets": facts})


def check_names(columns: Mapping[str, Sequence[str]], chosen: Mapping[str, Sequence[str]]) -> None:
    """Looks over lists of columns, and lists of those chosen from them.

    Raises:
        UserError: for what isn't a list of names or names one twice, and for what is chosen from elsewhere.
    """
    for key, names in {**columns, **chosen}.items():
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise UserError(f"data.{key} is {names!r}; it must be a list of names of columns")
        for name in names:
            if list(names).count(name) > 1:
                raise UserError(f"data.{key} names '{name}' twice")
    for key, names in columns.items():
        if not names:
            raise UserError(f"data.{key} is empty; it must be a list of names of columns")
    pairs = {"categories": "inputs", "classes": "targets", "standardize_targets": "targets"}
    for key, names in chosen.items():
        for name in names:
            if name not in columns[pairs[key]]:
                raise UserError(f"data.{key}: '{name}' isn't in data.{pairs[key]}" + suggest(name, columns[pairs[key]]))


def read_parts(
    path: str | Mapping[str, str], wanted: Mapping[str, Sequence[str]], split: Sequence[float], seed: int
) -> dict[str, Part]:
    """The rows of each split, of one file drawn at random, or of a file for each; see `table`."""
    if not isinstance(path, Mapping):
        return at_random(cells.read(path, wanted), split, seed)
    for name in path:
        if name not in NAMES:
            raise UserError(f"data.path.{name}: there is no such split" + suggest(str(name), NAMES))
    if not path.get("train"):
        raise UserError("data.path.train: a file is needed here; none is given")
    return {name: cells.read(path[name], wanted) for name in NAMES if path.get(name)}


def at_random(whole: Part, split: Sequence[float], seed: int) -> dict[str, Part]:
    """The rows of each split, drawn; see `random_parts`."""
    return {name: whole.take(indices) for name, indices in random_parts(len(whole.rows), split, seed).items()}


def input_columns(parts: dict[str, Part], names: Sequence[str], categories: Sequence[str]) -> tuple[Columns, Facts]:
    """Input columns of each split as fields, and what is known of them; see `table`."""
    columns: Columns = {part: {} for part in parts}
    facts: Facts = {}
    for name in names:
        if name not in categories and cells.is_numeric(parts["train"], name, "inputs"):
            values, facts[name] = _numbers(parts, name, "inputs")
            found = {part: torch.from_numpy(each.astype(np.float64)) for part, each in values.items()}
        else:
            texts = {part: cells.texts(rows, name) for part, rows in parts.items()}
            facts[name] = {"kind": "category", "vocabulary": _vocabulary(parts, texts["train"], name, "inputs")}
            found = {part: codes(each, facts[name]["vocabulary"]) for part, each in texts.items()}
        for part, tensor in found.items():
            columns[part][name] = tensor
    return columns, facts


def target_columns(
    parts: dict[str, Part], names: Sequence[str], classes: Sequence[str], standardize: Sequence[str]
) -> tuple[Columns, Facts]:
    """Target columns of each split as fields, and what is known of them; see `table`."""
    check_names({"targets": names}, {"classes": classes, "standardize_targets": standardize})
    columns: Columns = {part: {} for part in parts}
    facts: Facts = {}
    for name in names:
        if name not in classes and cells.is_numeric(parts["train"], name, "targets"):
            values, known = _numbers(parts, name, "targets")
            scaled = name in standardize
            facts[name] = known if scaled else {"kind": "number"}
            mean, std = (known["mean"], known["std"]) if scaled else (0.0, 1.0)
            found = {part: torch.from_numpy(((v - mean) / std).astype(np.float32)) for part, v in values.items()}
        elif name in standardize:
            raise UserError(f"data.standardize_targets: '{name}' is of classes, which have no mean")
        else:
            texts = {part: cells.texts(rows, name) for part, rows in parts.items()}
            facts[name] = {"kind": "class", "vocabulary": _vocabulary(parts, texts["train"], name, "targets")}
            for part, each in texts.items():
                _check_classes(parts[part], each, name, facts[name]["vocabulary"], part)
            found = {part: _classes(each, facts[name]["vocabulary"]) for part, each in texts.items()}
        for part, tensor in found.items():
            columns[part][name] = tensor
    return columns, facts


def _numbers(parts: dict[str, Part], name: str, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    values = {part: cells.numbers(rows, name, key) for part, rows in parts.items()}
    there = values["train"][~np.isnan(values["train"])]
    if not len(there):
        raise _nothing(parts, name, key)
    std = float(there.std()) if (there != there[0]).any() else 1.0  # what is constant is only shifted
    return values, {"kind": "number", "mean": float(there.mean()), "std": std}


def _vocabulary(parts: dict[str, Part], texts: list[str], name: str, key: str) -> list[str]:
    found = cells.vocabulary(texts)
    if not found:
        raise _nothing(parts, name, key)
    return found


def _nothing(parts: dict[str, Part], name: str, key: str) -> UserError:
    return UserError(f"data.{key}: all cells of '{name}' in the training split of {parts['train'].file} are empty")


def _classes(texts: list[str], vocabulary: list[str]) -> Tensor:
    known = codes(texts, vocabulary)
    return torch.where(known > 0, known - 1, -100)


def _check_classes(part: Part, texts: list[str], name: str, vocabulary: list[str], split: str) -> None:
    known = {"", *vocabulary}
    for row, text in zip(part.rows.index, texts, strict=True):
        if text not in known:
            raise UserError(
                f"data.targets: row {row} of {part.file}, in the {split} split, has the class '{text}' in the column "
                f"'{name}', which no row for training has; it has: {', '.join(vocabulary)}. Take such rows out, or "
                "draw other splits with data.seed"
            )
