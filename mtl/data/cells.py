"""Reads CSV and Parquet files into columns of cells, and converts the cells to numbers and categories."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.data.columns import EMPTY, category
from mtl.errors import UserError, first_line, suggest

# A number that Python's float() rejects: with a currency or a unit, a decimal comma, or a thousands separator.
NUMBER = re.compile(
    r"\(?[+\-−]?\s?(?P<before>[^\w\s.,+−()\-]{0,2}|[A-Z]{1,2}\$|EUR|USD|GBP|CHF|JPY|CNY|INR|Rs\.?|kr\.?)\s?[+\-−]?"
    r"((\d{1,3}([.,'’ \u00a0\u202f]\d{3})+|\d{1,2}(,\d{2})+,\d{3}|\d+)([.,]\d+)?|[.,]\d+)([eE][+\-]?\d+)?"
    r"\s?(?P<after>[^\d\s()]{0,8})\)?"
)
PLACEHOLDERS = (*EMPTY, "-", "--", "–", "—", ".", "?", "n.a.")  # texts that mean "no number"
UNITS = (
    "% ‰ ° °C °F € $ £ k K M bn nm µm mm cm m km in ft mi µg mg g kg t lb oz ml cl l L ns µs ms s min h d yr V A W kW "
    "kWh Hz kHz MHz GHz B kB MB GB TB"
)


@dataclass(frozen=True)
class Part:
    """Some rows of a file, as a pandas frame; the frame's index has the row numbers in the file, which begin at 1."""

    rows: Any
    file: str

    def take(self, indices: Tensor) -> "Part":
        """Returns the rows at the given positions of this part, counted from 0."""
        return Part(self.rows.iloc[indices.numpy()], self.file)


def read(path: Any, wanted: Mapping[str, Sequence[str]]) -> Part:
    """Reads the wanted columns of a CSV or Parquet file. All cells of a CSV file are read as text.

    Args:
        path: The file; a name that ends in `.parquet` or `.pq` is read as Parquet, any other name as CSV.
        wanted: For each config key, the columns that it names.

    Raises:
        UserError: If the file is missing, damaged or empty, or if a column is missing or occurs twice.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"data: {path!r} is not the name of a file")
    if not Path(path).is_file():
        raise UserError(f"data: there is no file {Path(path).resolve()}")
    file = Path(path).name
    try:
        import pandas

        whole = Path(path).resolve()  # an absolute path, which pandas doesn't take for a URL
        frame = _read_parquet(whole) if file.endswith((".parquet", ".pq")) else _read_csv(whole)
    except ImportError as error:
        raise UserError(f'data: {error.name} is needed to read {file}: pip install "mtl-train[table]"') from error
    except pandas.errors.EmptyDataError:
        raise UserError(f"data: {Path(path).resolve()} is empty") from None
    except (ValueError, OSError) as error:  # the errors of pandas and pyarrow are subclasses of these two
        raise UserError(f"data: {Path(path).resolve()} can't be read: {first_line(error)}") from error
    present = list(frame.columns)
    for key, names in wanted.items():
        for name in names:
            if name not in present:
                raise UserError(f"data.{key}: there is no column '{name}' in {file}" + suggest(name, map(str, present)))
            if present.count(name) > 1:
                raise UserError(f"data.{key}: {file} has {present.count(name)} columns of the name '{name}'")
    if not len(frame):
        raise UserError(f"data: {file} has no rows")
    return Part(frame[list(dict.fromkeys(name for names in wanted.values() for name in names))], file)


def _read_csv(path: str | Path) -> Any:
    import pandas

    # Read all cells as text: pandas would treat texts such as NA as empty, and a number column with one typo as text.
    frame = pandas.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    frame.columns = [str(name).strip() for name in frame.iloc[0]]
    return frame.iloc[1:]  # without the header, so that the index begins at 1


def _read_parquet(path: str | Path) -> Any:
    import pandas

    frame = pandas.read_parquet(path, dtype_backend="numpy_nullable")  # preserves integers in columns with empty cells
    return frame.set_axis(range(1, len(frame) + 1))


def is_numeric(part: Part, name: str, key: str) -> bool:
    """Returns whether the column has numbers (True) or categories (False).

    Raises:
        UserError: If the column has both numbers and texts, has only empty cells, or has values of another type.
    """
    from pandas.api import types

    cells = part.rows[name]
    kind = types.infer_dtype(cells, skipna=True)
    if kind in ("boolean", "categorical"):
        return False
    if types.is_numeric_dtype(cells):
        return True
    if kind not in ("string", "empty"):
        raise UserError(f"data.{key}: the column '{name}' of {part.file} contains {kind}, not numbers or texts")
    values, empty = _parsed(cells)
    if empty.all():
        return False
    wrong = values.isna() & ~empty
    if wrong.any() and not wrong[~empty].all():
        raise _not_a_number(part, name, key, wrong)
    return not wrong.any()


def numbers(part: Part, name: str, key: str) -> Any:
    """Returns the column's numbers as a float64 array, with NaN for empty cells.

    Raises:
        UserError: If a cell is neither a finite number nor empty.
    """
    values, empty = _parsed(part.rows[name])
    wrong = ~empty & ~(values.abs() <= torch.finfo(torch.float32).max)
    if wrong.any():
        raise _not_a_number(part, name, key, wrong)
    return values.to_numpy()


def texts(part: Part, name: str) -> list[str]:
    """Returns the column's categories, with `""` for empty cells."""
    return [category(cell) for cell in part.rows[name].tolist()]


def vocabulary(cells: Sequence[str]) -> list[str]:
    """Returns the distinct categories, sorted as numbers if all of them are numbers, and alphabetically otherwise."""
    categories = sorted(set(cells) - {""})
    try:
        return sorted(categories, key=float)
    except ValueError:
        return categories


def written_otherwise(vocabulary: Sequence[str]) -> str | None:
    """Returns an example of a number that can't be parsed, such as `12%`, `1,5` or `$1`, if all texts look like one.

    All texts must have the same suffix after the digits (apart from a plural s), or each must have a unit; otherwise
    the texts are treated as names, and the result is None. Placeholders for empty cells are ignored.
    """
    texts = [text for text in vocabulary if text.lower() not in PLACEHOLDERS]
    matches = [NUMBER.fullmatch(text) for text in texts]
    if not texts or not all(matches):
        return None
    ends = {match["after"] for match in matches if match}
    same = len({end.removesuffix("s") if len(end) > 2 else end for end in ends}) == 1
    return texts[0] if same or ends <= {"", *UNITS.split()} else None


def _parsed(cells: Any) -> tuple[Any, Any]:
    """Returns the cells as float64, with NaN for cells that aren't numbers, and a mask of the empty cells."""
    import pandas

    values = pandas.to_numeric(cells, errors="coerce").to_numpy(dtype=float, na_value=float("nan"))
    values = pandas.Series(values, index=cells.index)
    empty = values.isna()
    empty[empty] = cells[empty].isna() | cells[empty].astype(str).str.strip().str.lower().isin(EMPTY)
    return values, empty


def _not_a_number(part: Part, name: str, key: str, wrong: Any) -> UserError:
    row = wrong.index[wrong][0]
    listed = {"inputs": "categories", "targets": "classes"}[key]
    return UserError(
        f"data.{key}: row {row} of {part.file} has {part.rows[name][row]!r} in the column '{name}', which is not a "
        f"finite number; correct it, or list '{name}' in data.{listed}"
    )
