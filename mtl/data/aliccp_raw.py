"""The original files of Ali-CCP, whose rows refer to features that many rows have in common."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mtl.data import numeric
from mtl.errors import UserError, first_line

OF_COMMON = ("101", "121", "122", "124", "125", "126", "127", "128", "129")  # the user, mostly
OF_ROWS = ("205", "206", "207", "210", "216", "508", "509", "702", "853", "301")  # item, combinations, position
VALUES = ("508", "509", "702", "853")  # fields whose values are numbers of interest: D508, …
IDS = (*OF_COMMON, *OF_ROWS)
BLOCK = 1 << 26  # bytes that are read at once
SKELETON = ("sample", "click", "purchase", "common", "count", "features")
COMMON = ("common", "count", "features")


def file_names(split: str) -> list[str]:
    """Returns the names of the two files of a split."""
    return [f"sample_skeleton_{split}.csv", f"common_features_{split}.csv"]


def read(folder: Path, split: str) -> numeric.Arrays:
    """Returns click and purchase, and the ids and values of the features of each row, from the files of a split.

    The columns of ids have the numbers in the files, and 0 where a row has no such feature. Rows with a purchase but
    without a click are left out, as in published work.

    Raises:
        UserError: If a file is damaged.
    """
    skeleton, common = (folder / name for name in file_names(split))
    keys: list[Any] = []
    parts: list[numeric.Arrays] = []
    for first, table in _tables(common, COMMON):
        keys.append(table["common"])
        parts.append(_features(table["features"], common, first))
    import pyarrow

    of_keys = pyarrow.concat_arrays(keys)
    shared = _joined(parts)
    rows = [_rows(table, of_keys, shared, skeleton, first) for first, table in _tables(skeleton, SKELETON)]
    return _joined(rows)


def encode(splits: dict[str, numeric.Arrays], rare: int) -> None:
    """Replaces ids in place by codes from 1 on, and ids with fewer than `rare` training rows by 0."""
    for name in IDS:
        present, counts = np.unique(splits["train"][name], return_counts=True)
        vocabulary = present[(counts >= rare) & (present > 0)]
        for arrays in splits.values():
            arrays[name] = numeric.codes(arrays[name], vocabulary)


def _joined(parts: list[numeric.Arrays]) -> numeric.Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _tables(path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """Yields blocks of a file, as columns of texts by name, each with the number of its first row."""
    try:
        import pyarrow
        from pyarrow import csv
    except ImportError as error:
        raise UserError(f'data: pyarrow is needed to read {path.name}: pip install "mtl-train[table]"') from error
    row = 1
    try:
        reader = csv.open_csv(
            path,
            read_options=csv.ReadOptions(column_names=names, block_size=BLOCK, use_threads=False),
            parse_options=csv.ParseOptions(quote_char=False),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string())),
        )
        for batch in reader:
            yield row, {name: batch.column(name) for name in names}
            row += len(batch)
    except (pyarrow.ArrowInvalid, OSError) as error:  # the message has the number of the row
        raise UserError(f"data: {path} can't be read: {first_line(error)}") from None
    if row == 1:
        raise UserError(f"data: {path} has no rows")


def _rows(table: Any, keys: Any, shared: numeric.Arrays, path: Path, first: int) -> numeric.Arrays:
    """Returns the columns of a block of the skeleton, with the features that the rows have in common with others."""
    from pyarrow import compute

    events = {}
    for name in ("click", "purchase"):
        is_one = compute.equal(table[name], "1").to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(~(is_one | compute.equal(table[name], "0").to_numpy(zero_copy_only=False)))
        if len(wrong):
            cell = table[name][int(wrong[0])].as_py()
            raise numeric.wrong_cell(path, first + int(wrong[0]), cell, name, numeric.LABEL.what)
        events[name] = is_one.astype(np.float32)
    place = compute.fill_null(compute.index_in(table["common"], value_set=keys), -1).to_numpy(zero_copy_only=False)
    unknown = np.flatnonzero(place < 0)
    if len(unknown):
        key = table["common"][int(unknown[0])].as_py()
        raise UserError(
            f"data: row {first + int(unknown[0])} of {path}: {path.name.replace('sample_skeleton', 'common_features')} "
            f"has no features {key!r}"
        )
    own = _features(table["features"], path, first)
    merged = {name: np.where(own[name] != 0, own[name], shared[name][place]) for name in own}
    possible = events["click"] >= events["purchase"]
    return {name: values[possible] for name, values in (events | merged).items()}


def _features(texts: Any, path: Path, first: int) -> numeric.Arrays:
    """Returns the ids, int32, and some values, float32, of each field, 0 where it is missing.

    A text is a list of features, separated by character 1, each of them a field, an id and a value, separated by the
    characters 2 and 3. Only fields of one id are read, not the histories of users. If such a field occurs
    several times in a text, the last of its ids counts, as in Torch-RecHub's script.
    """
    import pyarrow
    from pyarrow import compute

    lists = compute.split_pattern(texts, "\x01")
    row = compute.list_parent_indices(lists).to_numpy()
    triples = compute.split_pattern_regex(compute.list_flatten(lists), "[\x02\x03]")
    wrong = np.flatnonzero(compute.list_value_length(triples).to_numpy() != 3)
    if len(wrong):
        raise _damaged(path, first + int(row[wrong[0]]))
    field, number, value = (compute.list_element(triples, place) for place in range(3))
    wanted = compute.index_in(field, value_set=pyarrow.array(IDS))
    known = compute.is_valid(wanted)
    row = row[known.to_numpy(zero_copy_only=False)]
    try:
        numbers = compute.cast(compute.filter(number, known), pyarrow.int32()).to_numpy()
        values = compute.cast(compute.filter(value, known), pyarrow.float32()).to_numpy()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data: a feature of {path}, in row {first} or later, is no number: {error}") from None
    places = compute.filter(wanted, known).to_numpy()
    arrays: numeric.Arrays = {}
    for place, name in enumerate(IDS):
        here = places == place
        arrays[name] = np.zeros(len(texts), np.int32)
        arrays[name][row[here]] = numbers[here]
        if name in VALUES:
            arrays[f"D{name}"] = np.zeros(len(texts), np.float32)
            arrays[f"D{name}"][row[here]] = values[here]
    return arrays


def _damaged(path: Path, row: int) -> UserError:
    return UserError(
        f"data: row {row} of {path} has a feature that isn't a field, an id and a value, separated by the characters "
        "2 and 3"
    )
