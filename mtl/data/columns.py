"""Encodes the cells of a table as numbers and integer codes, for data sets and for raw values passed to a model."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.errors import UserError

EMPTY = ("", "na", "n/a", "nan", "null", "none", "<na>")  # texts of empty cells, in lower case


def number(cell: Any) -> float:
    """Returns the cell's number, or NaN if the cell is empty.

    Raises:
        ValueError: If the cell is neither a finite number nor empty.
    """
    if cell is None or str(cell).strip().lower() in EMPTY:
        return math.nan
    value = float(cell)
    if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
        raise ValueError(f"{cell!r} is not a finite number")
    return value


def category(cell: Any) -> str:
    """Returns the cell's category as text, or `""` if the cell is empty.

    3 and 3.0 are the same category `3`, because pandas turns integers into floats in columns with empty cells.
    """
    if cell is None or (not isinstance(cell, str) and str(cell) in ("nan", "<NA>")):
        return ""
    text = str(cell).strip()
    whole, _, rest = text.partition(".")
    return whole if whole.removeprefix("-").isdecimal() and not rest.strip("0") else text


def numbers(cells: Iterable[Any], name: str) -> Tensor:
    """Returns a column's numbers, (N,) float64, with NaN for empty cells.

    Raises:
        UserError: If a cell is neither a finite number nor empty.
    """
    values = []
    for cell in cells:
        try:
            values.append(number(cell))
        except (TypeError, ValueError):
            raise UserError(f"'{name}': {cell!r} is not a finite number") from None
    return torch.tensor(values, dtype=torch.float64)


def codes(cells: Iterable[Any], vocabulary: Sequence[str] | int) -> Tensor:
    """Returns a column's categories as codes, (N,) int64; 0 stands for empty cells and for unknown categories.

    The code of a category is its position in the vocabulary, counted from 1. If the vocabulary is a number n, the cells
    must be codes from 1 to n already.
    """
    if isinstance(vocabulary, int):
        texts = [category(cell) for cell in cells]
        ids = [int(text) if text.isdecimal() else 0 for text in texts]
        return torch.tensor([each if each <= vocabulary else 0 for each in ids], dtype=torch.int64)
    places = {text: place for place, text in enumerate(vocabulary, start=1)}
    return torch.tensor([places.get(category(cell), 0) for cell in cells], dtype=torch.int64)
