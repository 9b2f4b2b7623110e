"""A table's cells as numbers and codes: one way for a data set's columns and for raw values given to a model."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.errors import UserError

EMPTY = ("", "na", "n/a", "nan", "null", "none", "<na>")  # cells without a number, in any case of letters


def number(cell: Any) -> float:
    """The cell's number, NaN where it is empty.

    Raises:
        ValueError: where it is neither a finite number nor empty.
    """
    if cell is None or str(cell).strip().lower() in EMPTY:
        return math.nan
    value = float(cell)
    if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
        raise ValueError(f"{cell!r} is not a finite number")
    return value


def category(cell: Any) -> str:
    """The cell's category: its text, `""` where it is empty; 3 and 3.0 are the text 3, as 3 is in a gappy column."""
    if cell is None or (not isinstance(cell, str) and str(cell) in ("nan", "<NA>")):
        return ""
    text = str(cell).strip()
    whole, _, rest = text.partition(".")
    return whole if whole.removeprefix("-").isdecimal() and not rest.strip("0") else text


def numbers(cells: Iterable[Any], name: str) -> Tensor:
    """A column's numbers, (N,) float64, NaN where a cell is empty.

    Raises:
        UserError: for a cell that is neither a finite number nor empty.
    """
    values = []
    for cell in cells:
        try:
            values.append(number(cell))
        except (TypeError, ValueError):
            raise UserError(f"'{name}': {cell!r} is not a finite number") from None
    return torch.tensor(values, dtype=torch.float64)


def codes(cells: Iterable[Any], vocabulary: Sequence[str] | int) -> Tensor:
    """A column's categories, (N,) int64: 1 for the vocabulary's first; 0 where a cell is empty or not in it.

    A number n stands for the vocabulary 1, 2, …, n, of ids that are codes already.
    """
    if isinstance(vocabulary, int):
        texts = [category(cell) for cell in cells]
        ids = [int(text) if text.isdecimal() else 0 for text in texts]
        return torch.tensor([each if each <= vocabulary else 0 for each in ids], dtype=torch.int64)
    places = {text: place for place, text in enumerate(vocabulary, start=1)}
    return torch.tensor([places.get(category(cell), 0) for cell in cells], dtype=torch.int64)
