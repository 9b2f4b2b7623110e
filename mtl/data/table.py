"""Tables with one sample per row, from CSV or Parquet files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.data import cells
from mtl.data.cells import Part
from mtl.data.columns import EMPTY, codes
from mtl.data.fields import Fields, Splits
from mtl.data.splitting import NAMES, random_parts
from mtl.errors import UserError, suggest

Columns = dict[str, dict[str, Tensor]]  # by split, then by column name
Facts = dict[str, dict[str, Any]]  # by column name
KINDS = {"category": ("inputs", "categories", "categories"), "class": ("targets", "classes", "classes")}


def table(
    path: str | Mapping[str, str],
    *,
    inputs: Sequence[str],
    targets: Sequence[str],
    categories: Sequence[str] = (),
    classes: Sequence[str] = (),
    standardize_targets: Sequence[str] = (),
    split: Sequence[float] | None = (0.8, 0.1, 0.1),
    seed: int = 0,
    trained_on: Mapping[str, Any] | None = None,
) -> Splits:
    """Returns the rows of a table; each column in `inputs` and `targets` becomes a field (N,) of the same name.

    Numeric inputs are float64 and unscaled, with NaN for empty cells. Categorical inputs are int64 from 1 on; 0 stands
    for empty cells and for categories that the training split doesn't have. Numeric targets are float32, with NaN for
    empty cells. Classes are int64 from 0 on, with -100 for empty cells. Columns of text are categories or classes,
    which are numbered in numeric order if all of them are numbers, and in alphabetic order otherwise.

    The fact `columns` has, for each input, the kind, and the mean and std of numbers or the vocabulary of categories.
    The fact `targets` has the same for the targets. Both are computed from the training split.

    Args:
        path: One file, which is split at random; or one file per split: `{train: a.csv, val: b.csv, test: c.csv}`,
            where val and test are optional. Names that end in `.parquet` or `.pq` are Parquet files, all others CSV
            files with a header.
        inputs, targets: Names of columns.
        categories: Inputs that are categories although they look like numbers.
        classes: Targets that are classes although they look like numbers.
        standardize_targets: Numeric targets from which the mean is subtracted, and which are then divided by the std.
        split: The shares of training, validation and test of a single file; see `random_parts`. None is allowed only
            with `trained_on`: then each split has all rows.
        seed: The seed of the random split.
        trained_on: The facts of the data that a model was trained on. Columns are then encoded with these vocabularies,
            means and deviations, and the splits have these facts; an unknown category is 0, an unknown class an error.

    Raises:
        UserError: If a file can't be read, a column is missing, a cell of a numeric column isn't a number, a class
            isn't in the training split, or the columns differ from those of `trained_on`.
    """
    check_names({"inputs": inputs, "targets": targets}, {"categories": categories, "classes": classes})
    check_split(split, trained_on)
    for name in targets:
        if name in inputs:
            raise UserError(f"data.targets: '{name}' is also in data.inputs")
    parts = read_parts(path, {"inputs": inputs, "targets": targets}, split, seed)
    input_fields, columns = input_columns(parts, inputs, categories, trained_on)
    wanted, facts = target_columns(parts, targets, classes, standardize_targets, trained_on)
    data: dict[str, Any] = {name: Fields({**input_fields[name], **wanted[name]}) for name in parts}
    files = ", ".join(dict.fromkeys(part.file for part in parts.values()))
    drawn = "" if isinstance(path, Mapping) else how_split(split, seed)
    return Splits(
        **data,
        name=f"{files}{drawn}",
        facts={"columns": columns, "targets": facts},
        warnings=[]
        if trained_on is not None
        else [*doubts(parts, columns, categories), *doubts(parts, facts, classes)],
    )


def how_split(split: Sequence[float] | None, seed: int) -> str:
    """Describes how the rows of one file are split."""
    return ", all of its rows" if split is None else f", split at random (data.seed={seed})"


def doubts(parts: Mapping[str, Part], facts: Facts, chosen: Sequence[str]) -> list[str]:
    """Returns a warning for each column that is treated as categories or classes but may be meant as numbers."""
    warnings = []
    for name, fact in facts.items():
        cell = None if name in chosen else cells.written_otherwise(fact.get("vocabulary", ()))
        if cell is not None:
            key, what, listed = KINDS[fact["kind"]]
            warnings.append(
                f"data.{key}: the column '{name}' of {parts['train'].file} is taken for {what}, though all of its "
                f"cells look like numbers, such as {cell!r}. Write plain numbers (1.5, without units and commas), or "
                f"list '{name}' in data.{listed} if they are {what}"
            )
    return warnings


def check_names(columns: Mapping[str, Sequence[str]], chosen: Mapping[str, Sequence[str]]) -> None:
    """Checks lists of columns, and lists of columns chosen from them.

    Raises:
        UserError: If a list isn't a list of names, names a column twice, or chooses a column that isn't listed.
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
    path: str | Mapping[str, str], wanted: Mapping[str, Sequence[str]], split: Sequence[float] | None, seed: int
) -> dict[str, Part]:
    """Reads the rows of each split, from one file that is split at random or from one file per split; see `table`."""
    if not isinstance(path, Mapping):
        return at_random(cells.read(path, wanted), split, seed)
    for name in path:
        if name not in NAMES:
            raise UserError(f"data.path.{name}: there is no such split" + suggest(str(name), NAMES))
    if not path.get("train"):
        raise UserError("data.path.train is missing; it must be a file")
    return {name: cells.read(path[name], wanted) for name in NAMES if path.get(name)}


def at_random(whole: Part, split: Sequence[float] | None, seed: int) -> dict[str, Part]:
    """Splits the rows at random, see `random_parts`; without shares, each split has all rows."""
    if split is None:
        return dict.fromkeys(NAMES, whole)
    return {name: whole.take(indices) for name, indices in random_parts(len(whole.rows), split, seed).items()}


def check_split(split: Sequence[float] | None, trained_on: Mapping[str, Any] | None) -> None:
    """Raises a UserError if training data aren't split, since validation would use the training samples."""
    if split is None and trained_on is None:
        raise UserError("data.split is null; training needs three shares that sum to 1, such as [0.8, 0.1, 0.1]")


def input_columns(
    parts: dict[str, Part], names: Sequence[str], categories: Sequence[str], trained_on: Mapping[str, Any] | None = None
) -> tuple[Columns, Facts]:
    """Converts the input columns of each split to fields, and returns fields and facts; see `table`."""
    columns: Columns = {part: {} for part in parts}
    facts: Facts = {}
    for name in names:
        trained = _known(trained_on, "columns", name, "inputs")
        if _of_numbers(parts, name, "inputs", categories, trained):
            values = {part: cells.numbers(rows, name, "inputs") for part, rows in parts.items()}
            facts[name] = trained or _statistics(parts, values["train"], name, "inputs")
            tensors = {part: torch.from_numpy(each.astype(np.float64)) for part, each in values.items()}
        else:
            texts = {part: cells.texts(rows, name) for part, rows in parts.items()}
            facts[name] = trained or {
                "kind": "category",
                "vocabulary": _vocabulary(parts, texts["train"], name, "inputs"),
            }
            tensors = {part: codes(each, facts[name]["vocabulary"]) for part, each in texts.items()}
        for part, tensor in tensors.items():
            columns[part][name] = tensor
    return columns, facts


def target_columns(
    parts: dict[str, Part],
    names: Sequence[str],
    classes: Sequence[str],
    standardize: Sequence[str],
    trained_on: Mapping[str, Any] | None = None,
) -> tuple[Columns, Facts]:
    """Converts the target columns of each split to fields, and returns fields and facts; see `table`."""
    check_names({"targets": names}, {"classes": classes, "standardize_targets": standardize})
    columns: Columns = {part: {} for part in parts}
    facts: Facts = {}
    for name in names:
        trained = _known(trained_on, "targets", name, "targets")
        if _of_numbers(parts, name, "targets", classes, trained):
            values = {part: cells.numbers(rows, name, "targets") for part, rows in parts.items()}
            if trained is not None:
                facts[name] = trained
                if ("mean" in trained) != (name in standardize):
                    raise _otherwise(f"standardize_targets: '{name}'", "mean" in trained)
            else:
                statistics = _statistics(parts, values["train"], name, "targets")
                facts[name] = statistics if name in standardize else {"kind": "number"}
            mean, std = facts[name].get("mean", 0.0), facts[name].get("std", 1.0)
            tensors = {part: torch.from_numpy(((v - mean) / std).astype(np.float32)) for part, v in values.items()}
        elif name in standardize:
            hint = _hint(_vocabulary(parts, cells.texts(parts["train"], name), name, "targets"))
            raise UserError(f"data.standardize_targets: '{name}' contains classes, which have no mean{hint}")
        else:
            texts = {part: cells.texts(rows, name) for part, rows in parts.items()}
            facts[name] = trained or {
                "kind": "class",
                "vocabulary": _vocabulary(parts, texts["train"], name, "targets"),
            }
            for part, each in texts.items():
                _check_classes(parts[part], each, name, facts[name]["vocabulary"], part, of_a_run=trained is not None)
            tensors = {part: _classes(each, facts[name]["vocabulary"]) for part, each in texts.items()}
        for part, tensor in tensors.items():
            columns[part][name] = tensor
    return columns, facts


def _known(trained_on: Mapping[str, Any] | None, fact: str, name: str, key: str) -> dict[str, Any] | None:
    """Returns the column's fact from training; None if `trained_on` is None."""
    if trained_on is None:
        return None
    columns = trained_on.get(fact) or {}
    if name not in columns:
        names = ", ".join(columns) or "none"
        raise UserError(f"data.{key}: the model was trained without the column '{name}'; its {key} are: {names}")
    return dict(columns[name])


def _of_numbers(
    parts: dict[str, Part], name: str, key: str, chosen: Sequence[str], trained: Mapping[str, Any] | None
) -> bool:
    """Returns whether the column is numeric, according to training or to the cells of the training split."""
    if trained is None:
        return name not in chosen and cells.is_numeric(parts["train"], name, key)
    if trained["kind"] == "number" and name in chosen:
        raise _otherwise(f"{'categories' if key == 'inputs' else 'classes'}: '{name}'", False)
    return bool(trained["kind"] == "number")


def _otherwise(where: str, listed: bool) -> UserError:
    was = "was listed" if listed else "was not listed"
    return UserError(f"data.{where} {was} in the config that the model was trained with; use the same list")


def _statistics(parts: dict[str, Part], numbers: Any, name: str, key: str) -> dict[str, Any]:
    present = numbers[~np.isnan(numbers)]
    if not len(present):
        raise _nothing(parts, name, key)
    std = float(present.std()) if (present != present[0]).any() else 1.0  # a constant column is only shifted
    return {"kind": "number", "mean": float(present.mean()), "std": std}


def _vocabulary(parts: dict[str, Part], texts: list[str], name: str, key: str) -> list[str]:
    categories = cells.vocabulary(texts)
    if all(text.lower() in EMPTY for text in categories):
        raise _nothing(parts, name, key)
    return categories


def _nothing(parts: dict[str, Part], name: str, key: str) -> UserError:
    remedy = "label some of its rows, or remove its task, and" if key == "targets" else "fill it, or remove"
    return UserError(
        f"data.{key}: all cells of '{name}' in the training split of {parts['train'].file} are empty; {remedy} "
        f"'{name}' from data.{key}"
    )


def _classes(texts: list[str], vocabulary: list[str]) -> Tensor:
    encoded = codes(texts, vocabulary)
    return torch.where(encoded > 0, encoded - 1, -100)


def _check_classes(
    part: Part, texts: list[str], name: str, vocabulary: list[str], split: str, *, of_a_run: bool
) -> None:
    allowed = {"", *vocabulary}
    for row, text in zip(part.rows.index, texts, strict=True):
        if text not in allowed:
            where = "" if of_a_run else f", in the {split} split,"
            who = "the model was not trained on" if of_a_run else "no row for training has"
            way = "" if of_a_run else ", or draw other splits with data.seed"
            raise UserError(
                f"data.targets: row {row} of {part.file}{where} has the class '{text}' in the column '{name}', which "
                f"{who}; it has: {', '.join(vocabulary)}. Remove such rows{way}{_hint(vocabulary)}"
            )


def _hint(texts: Sequence[str]) -> str:
    """Returns an addition to an error message about classes that may be meant as numbers."""
    cell = cells.written_otherwise(cells.vocabulary(texts))
    return f". If {cell!r} is meant as a number, write plain numbers (1.5, without units and commas)" if cell else ""
