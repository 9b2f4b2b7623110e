"""CSV and Parquet files: columns of cells, and what is in them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.data.columns import EMPTY, category
from mtl.errors import UserError, first_line, suggest

# A number that isn't written as Python writes it: with a currency or a unit, a decimal comma, or groups of thousands.
NUMBER = re.compile(
    r"\(?[+\-−]?\s?(?P<before>[^\w\s.,+−()\-]{0,2}|[A-Z]{1,2}\$|EUR|USD|GBP|CHF|JPY|CNY|INR|Rs\.?|kr\.?)\s?[+\-−]?"
    r"((\d{1,3}([.,'’ \u00a0\u202f]\d{3})+|\d{1,2}(,\d{2})+,\d{3}|\d+)([.,]\d+)?|[.,]\d+)([eE][+\-]?\d+)?"
    r"\s?(?P<after>[^\d\s()]{0,8})\)?"
)
PLACEHOLDERS = (*EMPTY, "-", "--", "–", "—", ".", "?", "n.a.")  # what stands for a cell without a number
UNITS = (
    "% ‰ ° °C °F € $ £ k K M bn nm µm mm cm m km in ft mi µg mg g kg t lb oz ml cl l L ns µs ms s min h d yr V A W kW "
    "kWh Hz kHz MHz GHz B kB MB GB TB"
)


@dataclass(frozen=True)
class Part:
    """Some rows of a file: a pandas frame whose index has the rows' numbers in the file, from 1 on."""

    rows: Any
    file: str

    def take(self, indices: Tensor) -> "Part":
        """The part with these of its rows, counted from 0."""
        return Part(self.rows.iloc[indices.numpy()], self.file)


def read(path: Any, wanted: Mapping[str, Sequence[str]]) -> Part:
    """The wanted columns of a CSV file, or of a Parquet file if its name ends so. Cells of CSV files are all texts.

    Args:
        path: the file.
        wanted: lists of columns, by the config's keys that name them.

    Raises:
        UserError: where the file is missing, damaged or without rows, and for columns it doesn't have, or has twice.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"data: {path!r} is not the name of a file")
    if not Path(path).is_file():
        raise UserError(f"data: there is no file {Path(path).resolve()}")
    file = Path(path).name
    try:
        import pandas

        whole = Path(path).resolve()  # which pandas takes for no address in the network
        frame = _read_parquet(whole) if file.endswith((".parquet", ".pq")) else _read_csv(whole)
    except ImportError as error:
        raise UserError(f'data: {error.name} is needed to read {file}: pip install "mtl-train[table]"') from error
    except pandas.errors.EmptyDataError:
        raise UserError(f"data: {Path(path).resolve()} is empty") from None
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own are among them
        raise UserError(f"data: {Path(path).resolve()} can't be read: {first_line(error)}") from error
    there = list(frame.columns)
    for key, names in wanted.items():
        for name in names:
            if name not in there:
                raise UserError(f"data.{key}: there is no column '{name}' in {file}" + suggest(name, map(str, there)))
            if there.count(name) > 1:
                raise UserError(f"data.{key}: {file} has {there.count(name)} columns of the name '{name}'")
    if not len(frame):
        raise UserError(f"data: {file} has no rows")
    return Part(frame[list(dict.fromkeys(name for names in wanted.values() for name in names))], file)


def _read_csv(path: str | Path) -> Any:
    import pandas

    # All as text: pandas would take texts such as NA for empty, and a column of numbers with one typing error for text.
    frame = pandas.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    frame.columns = [str(name).strip() for name in frame.iloc[0]]
    return frame.iloc[1:]  # so the index begins with 1


def _read_parquet(path: str | Path) -> Any:
    import pandas

    frame = pandas.read_parquet(path, dtype_backend="numpy_nullable")  # whole numbers stay whole beside empty cells
    return frame.set_axis(range(1, len(frame) + 1))


def is_numeric(part: Part, name: str, key: str) -> bool:
    """Whether the column holds numbers, not categories.

    Raises:
        UserError: where it holds both, or nothing, or what is neither.
    """
    from pandas.api import types

    cells = part.rows[name]
    kind = types.infer_dtype(cells, skipna=True)
    if kind in ("boolean", "categorical"):
        return False
    if types.is_numeric_dtype(cells):
        return True
    if kind not in ("string", "empty"):
        raise UserError(f"data.{key}: the column '{name}' of {part.file} holds {kind}, not numbers or texts")
    values, empty = _parsed(cells)
    if empty.all():
        return False
    wrong = values.isna() & ~empty
    if wrong.any() and not wrong[~empty].all():
        raise _not_a_number(part, name, key, wrong)
    return not wrong.any()


def numbers(part: Part, name: str, key: str) -> Any:
    """The column's numbers as a float64 array, NaN where a cell is empty.

    Raises:
        UserError: for a cell that is neither a finite number nor empty.
    """
    values, empty = _parsed(part.rows[name])
    wrong = ~empty & ~(values.abs() <= torch.finfo(torch.float32).max)
    if wrong.any():
        raise _not_a_number(part, name, key, wrong)
    return values.to_numpy()


def texts(part: Part, name: str) -> list[str]:
    """The column's categories, `""` where a cell is empty."""
    return [category(cell) for cell in part.rows[name].tolist()]


def vocabulary(cells: Sequence[str]) -> list[str]:
    """The categories that there are, in order: of their numbers, where all are such, else of the alphabet."""
    found = sorted(set(cells) - {""})
    try:
        return sorted(found, key=float)
    except ValueError:
        return found


def written_otherwise(vocabulary: Sequence[str]) -> str | None:
    """A cell, where all of these texts look like numbers that can't be read: `12%`, `1,5`, `$1`; None elsewhere.

    What comes after the digits must be the same in all cells, but for a plural's s, or a unit in each, or the texts are
    taken for names. Words for an empty cell are left out.
    """
    texts = [text for text in vocabulary if text.lower() not in PLACEHOLDERS]
    found = [NUMBER.fullmatch(text) for text in texts]
    if not texts or not all(found):
        return None
    ends = {match["after"] for match in found if match}
    same = len({end.removesuffix("s") if len(end) > 2 else end for end in ends}) == 1
    return texts[0] if same or ends <= {"", *UNITS.split()} else None


def _parsed(cells: Any) -> tuple[Any, Any]:
    """The cells as float64, NaN where they are no numbers; and which are empty."""
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
        f"finite number; mend it, or list '{name}' in data.{listed}"
    )
