"""Reads large text files of numbers, without a Python loop over their rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl.errors import UserError, first_line

Arrays = dict[str, Any]  # a NumPy array (N,) for each column


class Kind:
    """What the cells of a column must be.

    Args:
        dtype: The data type of the column's array.
        what: A description, which completes "must be …".
        fits: Returns for an array of numbers which of them are allowed.
    """

    def __init__(self, dtype: str, what: str, fits: Callable[[Any], Any]) -> None:
        self.dtype = dtype
        self.what = what
        self.fits = fits

    def reads(self, cell: str) -> bool:
        """Returns whether a cell is a number that is allowed."""
        try:
            value = float(cell)
        except ValueError:
            return False
        whole = self.dtype.startswith("float") or (math.isfinite(value) and value == int(value))
        return whole and bool(self.fits(np.float64(value)))


ID = Kind("int32", "a whole number of at least 0", lambda x: (x >= 0) & (x < 2**31))
TIME = Kind("int64", "a whole number of at least 0", lambda x: (x >= 0) & (x < 2**62))
LABEL = Kind("float32", "0 or 1", lambda x: (x == 0) | (x == 1))
NUMBER = Kind("float32", "a finite number", lambda x: abs(x) <= np.finfo(np.float32).max)


def header(path: Path) -> list[str]:
    """Returns the names of the columns of a CSV file.

    Raises:
        UserError: If the file is empty, or if a name occurs twice.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        names = [name.strip() for name in file.readline().strip("\r\n").split(",")]
    for name in names:
        if not name or names.count(name) > 1:
            raise UserError(f"data: the first line of {path} must have the name of each column once: {','.join(names)}")
    return names


def columns_of(path: Path, kinds: Mapping[str, Kind], *, separator: str = ",") -> Arrays:
    """Returns the columns of a file whose cells are all numbers, as arrays by name.

    Args:
        path: The file. If the separator is a comma, its first line is a header.
        kinds: The kind of each column in the file, in its order.
        separator: `,`, or `::` for a file without a header.

    Raises:
        UserError: If a cell is damaged, or if a row has too few or too many cells. The message names the file and the
            row, counted from 1, without the header.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError(f'data: pandas is needed to read {path.name}: pip install "mtl-train[table]"') from error
    # pandas is fast for separators of one character only. Those of two leave an empty column between two columns.
    empty = [f" {number}" for number in range(len(kinds) - 1)] if separator == "::" else []
    names = list(kinds)
    if empty:
        names = [name for pair in zip(kinds, [*empty, ""], strict=True) for name in pair][:-1]
    try:
        frame = pandas.read_csv(
            path,
            sep=separator[0],
            header=None if empty else 0,
            names=names,
            dtype={name: kind.dtype for name, kind in kinds.items()} | dict.fromkeys(empty, "float32"),
            encoding="latin-1",
            quoting=3,
        )
    except (ValueError, OSError) as error:
        raise _damage(path, kinds, separator) or UserError(f"data: {path} can't be read: {first_line(error)}") from None
    arrays: Arrays = {name: frame[name].to_numpy() for name in kinds}
    right = all(bool(kind.fits(arrays[name]).all()) for name, kind in kinds.items())
    if not right or not isinstance(frame.index, pandas.RangeIndex) or any(frame[name].notna().any() for name in empty):
        raise _damage(path, kinds, separator) or UserError(f"data: {path} can't be read")
    if not len(frame):
        raise UserError(f"data: {path} has no rows")
    for array in arrays.values():
        array.flags.writeable = True  # pandas protects its arrays, and torch warns of those that are protected
    return arrays


def _damage(path: Path, kinds: Mapping[str, Kind], separator: str) -> UserError | None:
    """Returns the error for the first row that is damaged; None if there is none."""
    for number, cells in enumerate(rows_of(path, separator), start=1):
        if len(cells) != len(kinds):
            return wrong_row(path, number, cells, list(kinds))
        for cell, (name, kind) in zip(cells, kinds.items(), strict=True):
            if not kind.reads(cell):
                return wrong_cell(path, number, cell, name, kind.what)
    return None


def rows_of(path: Path, separator: str) -> Any:
    """Yields the cells of each row, by a Python loop; a file with commas has a header, which is left out."""
    with path.open(encoding="latin-1") as file:
        lines = (line.strip("\r\n") for line in file)
        rows = (line.split(separator) for line in lines if line)
        if separator == ",":
            next(rows, None)
        yield from rows


def codes(values: Any, vocabulary: Any) -> Any:
    """Returns the positions of the values in a sorted vocabulary, counted from 1, as int32; 0 for other values."""
    if not len(vocabulary):
        return np.zeros(len(values), np.int32)
    place = np.minimum(np.searchsorted(vocabulary, values), len(vocabulary) - 1)
    return np.where(vocabulary[place] == values, place + 1, 0).astype(np.int32)


def wrong_row(path: Path, number: int, cells: Sequence[str], names: Sequence[str]) -> UserError:
    """Returns the error for a row with a wrong number of cells."""
    return UserError(
        f"data: row {number} of {path} has {len(cells)} values; it must have {len(names)}: {', '.join(names)}"
    )


def wrong_cell(path: Path, number: int, cell: str, name: str, what: str) -> UserError:
    """Returns the error for a cell that isn't what it must be."""
    return UserError(f"data: row {number} of {path} has {cell!r} in the column '{name}'; it must be {what}")
