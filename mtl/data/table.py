"""Tables: one sample a row, from CSV or Parquet files."""

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

Columns = dict[str, dict[str, Tensor]]  # by split, then by name
Facts = dict[str, dict[str, Any]]  # by name
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
        split: of one file, the shares of training, validation and test; see `random_parts`. With `trained_on` None is
            possible: then nothing is drawn, and all rows are in each split.
        seed: of the draw.
        trained_on: the facts of the data that a model was trained on. Columns are then encoded by its vocabularies,
            means and deviations, and the splits have these facts; an unknown category is 0, an unknown class an error.

    Raises:
        UserError: for a file that can't be read, a column that isn't there, a cell that isn't a number among numbers,
            a class that the training split doesn't have, and for columns that aren't those of `trained_on`.
    """
    check_names({"inputs": inputs, "targets": targets}, {"categories": categories, "classes": classes})
    check_split(split, trained_on)
    for name in targets:
        if name in inputs:
            raise UserError(f"data.targets: '{name}' is in data.inputs too")
    parts = read_parts(path, {"inputs": inputs, "targets": targets}, split, seed)
    given, columns = input_columns(parts, inputs, categories, trained_on)
    wanted, facts = target_columns(parts, targets, classes, standardize_targets, trained_on)
    data = {name: Fields({**given[name], **wanted[name]}) for name in parts}
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
    """What is said of the rows of one file."""
    return ", all of its rows" if split is None else f", split at random (data.seed={seed})"


def doubts(parts: Mapping[str, Part], facts: Facts, chosen: Sequence[str]) -> list[str]:
    """A sentence for each column that was taken for categories or classes, and may be meant as numbers."""
    found = []
    for name, fact in facts.items():
        cell = None if name in chosen else cells.written_otherwise(fact.get("vocabulary", ()))
        if cell is not None:
            key, what, listed = KINDS[fact["kind"]]
            found.append(
                f"data.{key}: the column '{name}' of {parts['train'].file} is taken for {what}, though all of its "
                f"cells look like numbers, such as {cell!r}. Write plain numbers (1.5, without units and commas), or "
                f"list '{name}' in data.{listed} if they are {what}"
            )
    return found


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
    path: str | Mapping[str, str], wanted: Mapping[str, Sequence[str]], split: Sequence[float] | None, seed: int
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


def at_random(whole: Part, split: Sequence[float] | None, seed: int) -> dict[str, Part]:
    """The rows of each split, drawn, see `random_parts`; or all rows for each of them."""
    if split is None:
        return dict.fromkeys(NAMES, whole)
    return {name: whole.take(indices) for name, indices in random_parts(len(whole.rows), split, seed).items()}


def check_split(split: Sequence[float] | None, trained_on: Mapping[str, Any] | None) -> None:
    """Raises a UserError for a training without a split: it would validate on what it was trained on."""
    if split is None and trained_on is None:
        raise UserError("data.split is null; a training needs three shares that sum to 1, such as [0.8, 0.1, 0.1]")


def input_columns(
    parts: dict[str, Part], names: Sequence[str], categories: Sequence[str], trained_on: Mapping[str, Any] | None = None
) -> tuple[Columns, Facts]:
    """Input columns of each split as fields, and what is known of them; see `table`."""
    columns: Columns = {part: {} for part in parts}
    facts: Facts = {}
    for name in names:
        known = _known(trained_on, "columns", name, "inputs")
        if _of_numbers(parts, name, "inputs", categories, known):
            values = {part: cells.numbers(rows, name, "inputs") for part, rows in parts.items()}
            facts[name] = known or _statistics(parts, values["train"], name, "inputs")
            found = {part: torch.from_numpy(each.astype(np.float64)) for part, each in values.items()}
        else:
            texts = {part: cells.texts(rows, name) for part, rows in parts.items()}
            facts[name] = known or {
                "kind": "category",
                "vocabulary": _vocabulary(parts, texts["train"], name, "inputs"),
            }
            found = {part: codes(each, facts[name]["vocabulary"]) for part, each in texts.items()}
        for part, tensor in found.items():
            columns[part][name] = tensor
    return columns, facts


def target_columns(
    parts: dict[str, Part],
    names: Sequence[str],
    classes: Sequence[str],
    standardize: Sequence[str],
    trained_on: Mapping[str, Any] | None = None,
) -> tuple[Columns, Facts]:
    """Target columns of each split as fields, and what is known of them; see `table`."""
    check_names({"targets": names}, {"classes": classes, "standardize_targets": standardize})
    columns: Columns = {part: {} for part in parts}
    facts: Facts = {}
    for name in names:
        known = _known(trained_on, "targets", name, "targets")
        if _of_numbers(parts, name, "targets", classes, known):
            values = {part: cells.numbers(rows, name, "targets") for part, rows in parts.items()}
            if known is not None:
                facts[name] = known
                if ("mean" in known) != (name in standardize):
                    raise _otherwise(f"standardize_targets: '{name}'", "mean" in known)
            else:
                statistics = _statistics(parts, values["train"], name, "targets")
                facts[name] = statistics if name in standardize else {"kind": "number"}
            mean, std = facts[name].get("mean", 0.0), facts[name].get("std", 1.0)
            found = {part: torch.from_numpy(((v - mean) / std).astype(np.float32)) for part, v in values.items()}
        elif name in standardize:
            hint = _hint(_vocabulary(parts, cells.texts(parts["train"], name), name, "targets"))
            raise UserError(f"data.standardize_targets: '{name}' is of classes, which have no mean{hint}")
        else:
            texts = {part: cells.texts(rows, name) for part, rows in parts.items()}
            facts[name] = known or {
                "kind": "class",
                "vocabulary": _vocabulary(parts, texts["train"], name, "targets"),
            }
            for part, each in texts.items():
                _check_classes(parts[part], each, name, facts[name]["vocabulary"], part, of_a_run=known is not None)
            found = {part: _classes(each, facts[name]["vocabulary"]) for part, each in texts.items()}
        for part, tensor in found.items():
            columns[part][name] = tensor
    return columns, facts


def _known(trained_on: Mapping[str, Any] | None, fact: str, name: str, key: str) -> dict[str, Any] | None:
    """What the training knew of the column; None where there was none."""
    if trained_on is None:
        return None
    known = trained_on.get(fact) or {}
    if name not in known:
        there = ", ".join(known) or "none"
        raise UserError(f"data.{key}: the model was trained without the column '{name}'; its {key} are: {there}")
    return dict(known[name])


def _of_numbers(
    parts: dict[str, Part], name: str, key: str, chosen: Sequence[str], known: Mapping[str, Any] | None
) -> bool:
    """Whether the column is of numbers, as the training had it or as the training split's cells are."""
    if known is None:
        return name not in chosen and cells.is_numeric(parts["train"], name, key)
    if known["kind"] == "number" and name in chosen:
        raise _otherwise(f"{'categories' if key == 'inputs' else 'classes'}: '{name}'", False)
    return bool(known["kind"] == "number")


def _otherwise(where: str, listed: bool) -> UserError:
    was = "is listed there in" if listed else "isn't listed there in"
    return UserError(f"data.{where} {was} the config that the model was trained with; give the same")


def _statistics(parts: dict[str, Part], numbers: Any, name: str, key: str) -> dict[str, Any]:
    there = numbers[~np.isnan(numbers)]
    if not len(there):
        raise _nothing(parts, name, key)
    std = float(there.std()) if (there != there[0]).any() else 1.0  # what is constant is only shifted
    return {"kind": "number", "mean": float(there.mean()), "std": std}


def _vocabulary(parts: dict[str, Part], texts: list[str], name: str, key: str) -> list[str]:
    found = cells.vocabulary(texts)
    if all(text.lower() in EMPTY for text in found):
        raise _nothing(parts, name, key)
    return found


def _nothing(parts: dict[str, Part], name: str, key: str) -> UserError:
    remedy = "label some of its rows, or take it and its task out" if key == "targets" else "fill it, or take it out"
    return UserError(
        f"data.{key}: all cells of '{name}' in the training split of {parts['train'].file} are empty; {remedy}: "
        f"data.{key} without '{name}'"
    )


def _classes(texts: list[str], vocabulary: list[str]) -> Tensor:
    known = codes(texts, vocabulary)
    return torch.where(known > 0, known - 1, -100)


def _check_classes(
    part: Part, texts: list[str], name: str, vocabulary: list[str], split: str, *, of_a_run: bool
) -> None:
    known = {"", *vocabulary}
    for row, text in zip(part.rows.index, texts, strict=True):
        if text not in known:
            where = "" if of_a_run else f", in the {split} split,"
            who = "the model was not trained on" if of_a_run else "no row for training has"
            way = "" if of_a_run else ", or draw other splits with data.seed"
            raise UserError(
                f"data.targets: row {row} of {part.file}{where} has the class '{text}' in the column '{name}', which "
                f"{who}; it has: {', '.join(vocabulary)}. Take such rows out{way}{_hint(vocabulary)}"
            )


def _hint(texts: Sequence[str]) -> str:
    """What is added to a message about classes where they may be meant as numbers."""
    cell = cells.written_otherwise(cells.vocabulary(texts))
    return f". If {cell!r} is meant as a number, write plain numbers (1.5, without units and commas)" if cell else ""
