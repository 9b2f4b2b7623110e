"""Tables: the encoding of each column, against values by hand and pandas; and messages about wrong files."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

import mtl
from mtl.data import cells, table

PEOPLE = """\
age,city,zip,income,smoker,stage
31,Bern,3000,52000.5,yes,2
,Basel,4000,,no,10
45,,3000,61000,,2
28,Bern,,48000,yes,
60,NA,8000,70000,no,1
"""
INPUTS, TARGETS = ["age", "city", "zip"], ["income", "smoker", "stage"]
ALL = {"inputs": INPUTS, "targets": TARGETS, "categories": ["zip"], "classes": ["stage"]}


def write(folder: Path, text: str, name: str = "people.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def fields(dataset: Any) -> dict[str, Tensor]:
    return dataset.fields


def values(tensor: Tensor) -> list[float | None]:
    return [None if value != value else value for value in tensor.tolist()]


def test_columns_become_fields(tmp_path: Path) -> None:
    splits = table(write(tmp_path, PEOPLE), **ALL, split=[1.0, 0, 0])
    assert splits.val is None
    assert splits.test is None
    given = fields(splits.train)
    assert list(given) == [*INPUTS, *TARGETS]
    assert values(given["age"]) == [31, None, 45, 28, 60]
    assert given["city"].tolist() == [2, 1, 0, 2, 3]  # Basel, Bern, and NA, which isn't an empty cell in a text column
    assert given["zip"].tolist() == [1, 2, 1, 0, 3]
    assert values(given["income"]) == [52000.5, None, 61000, 48000, 70000]
    assert given["smoker"].tolist() == [1, 0, -100, 1, 0]
    assert given["stage"].tolist() == [1, 2, 1, -100, 0]  # 1, 2, 10 are in the order of numbers
    assert {name: tensor.dtype for name, tensor in given.items()} == {
        "age": torch.float64,
        "income": torch.float32,
        **dict.fromkeys(("city", "zip", "smoker", "stage"), torch.int64),
    }
    ages = [31, 45, 28, 60]
    mean = sum(ages) / 4
    std = math.sqrt(sum((age - mean) ** 2 for age in ages) / 4)
    assert splits.facts["columns"] == {
        "age": {"kind": "number", "mean": pytest.approx(mean), "std": pytest.approx(std)},
        "city": {"kind": "category", "vocabulary": ["Basel", "Bern", "NA"]},
        "zip": {"kind": "category", "vocabulary": ["3000", "4000", "8000"]},
    }
    assert splits.facts["targets"] == {
        "income": {"kind": "number"},
        "smoker": {"kind": "class", "vocabulary": ["no", "yes"]},
        "stage": {"kind": "class", "vocabulary": ["1", "2", "10"]},
    }


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    frame = pandas.DataFrame(
        {
            "age": pandas.array([31, None, 45, 28, 60], dtype="Int64"),
            "city": pandas.Categorical(["Bern", "Basel", None, "Bern", "NA"]),
            "zip": [3000, 4000, 3000, None, 8000],  # float64, as pandas has whole numbers beside empty cells
            "income": [52000.5, None, 61000, 48000, 70000],
            "smoker": ["yes", "no", None, "yes", "no"],
            "stage": pandas.array([2, 10, 2, None, 1], dtype="Int8"),
            "unused": pandas.Timestamp("2020-01-01"),
        }
    )
    frame.to_parquet(tmp_path / "people.parquet")
    read = table(str(tmp_path / "people.parquet"), **ALL, split=[1, 0, 0])
    expected = table(write(tmp_path, PEOPLE), **ALL, split=[1, 0, 0])
    assert read.facts == expected.facts
    for (_, one), (_, other) in zip(read.items(), expected.items(), strict=True):
        for name in other.fields:
            torch.testing.assert_close(one.fields[name], other.fields[name], rtol=0, atol=0, equal_nan=True)


def test_truth_values_are_classes_in_both_formats(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"x": [1.0, 2.0, 3.0], "y": [True, False, True]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    for name in ("t.parquet", "t.csv"):
        splits = table(str(tmp_path / name), inputs=["x"], targets=["y"], split=[1, 0, 0])
        assert fields(splits.train)["y"].tolist() == [1, 0, 1]
        assert splits.facts["targets"]["y"]["vocabulary"] == ["False", "True"]


def big(folder: Path, rows: int = 200) -> tuple[str, pandas.DataFrame]:
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "id": range(rows),
            "x": np.where(rng.random(rows) < 0.2, np.nan, rng.normal(5, 3, rows)),
            "word": rng.choice(["a", "b", "c", "d"], rows),
            "y": rng.normal(100, 20, rows),
        }
    )
    frame.to_csv(folder / "big.csv", index=False)
    return str(folder / "big.csv"), pandas.read_csv(folder / "big.csv")


def test_random_splits_depend_on_the_seed_alone_and_statistics_on_training(tmp_path: Path) -> None:
    path, frame = big(tmp_path)
    options: dict[str, Any] = {"inputs": ["id", "x", "word"], "targets": ["y"], "standardize_targets": ["y"]}
    state = torch.get_rng_state()
    splits = table(path, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again, other = table(path, **options), table(path, **options, seed=1)
    rows = {name: [int(i) for i in d.fields["id"]] for name, d in splits.items()}
    assert {name: len(r) for name, r in rows.items()} == {"train": 160, "val": 20, "test": 20}
    assert sorted(sum(rows.values(), [])) == list(range(200))
    assert rows["train"] == [int(i) for i in fields(again.train)["id"]]
    assert rows["train"] != [int(i) for i in fields(other.train)["id"]]
    train = frame.iloc[rows["train"]]
    assert splits.facts["columns"]["x"]["mean"] == pytest.approx(train["x"].mean())
    assert splits.facts["columns"]["x"]["std"] == pytest.approx(train["x"].std(ddof=0))
    known = splits.facts["targets"]["y"]
    assert known == {
        "kind": "number",
        "mean": pytest.approx(train["y"].mean()),
        "std": pytest.approx(train["y"].std(ddof=0)),
    }
    for name, dataset in splits.items():
        part = frame.iloc[rows[name]]
        np.testing.assert_array_equal(dataset.fields["x"].numpy(), part["x"].to_numpy(np.float64))
        np.testing.assert_allclose(dataset.fields["y"], (part["y"] - known["mean"]) / known["std"], rtol=1e-6)
        assert dataset.fields["word"].tolist() == ["_abcd".index(word) for word in part["word"]]
    assert splits.summary() == (
        "big.csv, split at random (data.seed=0): 160 train, 20 val, 20 test; fields: id, x, word, y"
    )


def test_a_file_for_each_split(tmp_path: Path) -> None:
    train = write(tmp_path, "x,city,y\n1,Bern,a\n2,Basel,b\n", "train.csv")
    test = write(tmp_path, "y,city,x\nb,Atlantis,\n,Bern,7\n", "test.csv")  # another order of columns
    splits = table({"train": train, "val": None, "test": test}, inputs=["x", "city"], targets=["y"])
    assert splits.val is None
    assert values(fields(splits.test)["x"]) == [None, 7]
    assert fields(splits.test)["city"].tolist() == [0, 2]  # what training doesn't have is unknown
    assert fields(splits.test)["y"].tolist() == [1, -100]
    assert splits.name == "train.csv, test.csv"


def test_constant_column_has_deviation_one(tmp_path: Path) -> None:
    splits = table(write(tmp_path, "x,y\n0.1,1\n0.1,2\n0.1,3\n"), inputs=["x"], targets=["y"], split=[1, 0, 0])
    assert splits.facts["columns"]["x"] == {"kind": "number", "mean": pytest.approx(0.1), "std": 1.0}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (PEOPLE, {"inputs": ["agee"]}, "data.inputs: there is no column 'agee' in people.csv; did you mean 'age'?"),
        (PEOPLE, {"targets": ["incom"]}, "data.targets: there is no column 'incom' in people.csv; did you mean 'inc"),
        (PEOPLE, {"inputs": []}, "data.inputs is empty; it must be a list of names"),
        (PEOPLE, {"inputs": "age"}, "data.inputs is 'age'; it must be a list of names of columns"),
        (PEOPLE, {"inputs": ["age", "age"]}, "data.inputs names 'age' twice"),
        (PEOPLE, {"inputs": ["age", "income"]}, "data.targets: 'income' is also in data.inputs"),
        (PEOPLE, {"categories": ["zop"]}, "data.categories: 'zop' isn't in data.inputs; did you mean 'zip'?"),
        (PEOPLE, {"classes": ["age"]}, "data.classes: 'age' isn't in data.targets"),
        (PEOPLE, {"standardize_targets": ["age"]}, "data.standardize_targets: 'age' isn't in data.targets"),
        (PEOPLE, {"standardize_targets": ["smoker"]}, "data.standardize_targets: 'smoker' contains classes, which h"),
        (PEOPLE, {"split": [0.8, 0.1]}, "data.split is [0.8, 0.1]; it must be three shares that sum to 1"),
        (PEOPLE, {"split": [0.8, 0.1, 0.2]}, "data.split is [0.8, 0.1, 0.2]; it must be three shares"),
        (PEOPLE, {"split": [0.98, 0.01, 0.01]}, "data.split: 0.01 of 5 samples leaves none for val"),
        (
            "age,age,zip,income\n1,2,3,4\n",
            {"inputs": ["age"]},
            "data.inputs: people.csv has 2 columns of the name 'age'",
        ),
        ("age,city\n", {}, "data.inputs: there is no column 'zip'"),
        ("age,city,zip,income,smoker,stage\n", {}, "data: people.csv has no rows"),
        (
            PEOPLE + "4x,Bern,3000,1,no,2\n",
            {},
            "data.inputs: row 6 of people.csv has '4x' in the column 'age', which is not a finite number; correct it, or "
            "list 'age' in data.categories",
        ),
        (
            PEOPLE.replace("61000", "inf"),
            {},
            "data.targets: row 3 of people.csv has 'inf' in the column 'income', which is not a finite number; correct "
            "it, or list 'income' in data.classes",
        ),
        (PEOPLE.replace("61000", "1e39"), {}, "data.targets: row 3 of people.csv has '1e39' in the column 'income'"),
        ("age,zip,city,income,smoker,stage\n,,,1,a,1\n", {"inputs": ["age"]}, "data.inputs: all cells of 'age' in the"),
    ],
)
def test_messages(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    path = write(tmp_path, text)
    given = {**ALL, "split": [1, 0, 0], **options}
    given["categories"] = [c for c in given["categories"] if c in given["inputs"] or c != "zip"]
    given["classes"] = [c for c in given["classes"] if c in given["targets"] or c != "stage"]
    with pytest.raises(mtl.UserError) as error:
        table(path, **given)
    assert str(error.value).startswith(message)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    def said(path: Any, content: bytes | None = None) -> str:
        if content is not None:
            Path(path).write_bytes(content)
        with pytest.raises(mtl.UserError) as error:
            table(path, inputs=["x"], targets=["y"])
        return str(error.value)

    csv, parquet = str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")
    assert said(csv) == f"data: there is no file {csv}"
    assert said(csv, b"") == f"data: {csv} is empty"
    assert "a.csv can't be read: Error tokenizing data. C error: Expected 2 fields in line 3" in said(
        csv, b"x,y\n1,2\n1,2,3\n"
    )
    assert "a.csv can't be read: 'utf-8' codec can't decode" in said(csv, b"x,y\n1,\xff\xfe\n")
    assert "a.parquet can't be read: " in said(parquet, b"PAR1 what follows is nothing")
    assert said(3) == "data: 3 is not the name of a file"
    assert said({"val": csv}) == "data.path.train is missing; it must be a file"
    assert said({"trian": csv}).startswith("data.path.trian: there is no such split; did you mean 'train'?")


def test_times_and_lists_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    for cell, kind in ((pandas.Timestamp("2020-01-01"), "datetime64"), ([1, 2], "mixed")):
        pandas.DataFrame({"x": [cell] * 4, "y": [1, 2, 3, 4]}).to_parquet(path)
        with pytest.raises(mtl.UserError, match=rf"'x' of a\.parquet contains {kind}, not numbers or texts"):
            table(path, inputs=["x"], targets=["y"], split=[1, 0, 0])


def test_cells_of_the_other_splits(tmp_path: Path) -> None:
    train = write(tmp_path, "x,y\n1,a\n2,b\n", "train.csv")
    val = write(tmp_path, "x,y\n1,a\n2,lynx\n", "val.csv")
    with pytest.raises(mtl.UserError, match=r"row 2 of val\.csv, in the val split, has the class 'lynx' in the column"):
        table({"train": train, "val": val}, inputs=["x"], targets=["y"])
    val = write(tmp_path, "x,y\n1,a\nmany,b\n", "val.csv")
    with pytest.raises(mtl.UserError, match=r"data\.inputs: row 2 of val\.csv has 'many' in the column 'x'"):
        table({"train": train, "val": val}, inputs=["x"], targets=["y"])


def test_without_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(mtl.UserError, match=r'pandas is needed to read people\.csv: pip install "mtl-train\[table\]"'):
        table(write(tmp_path, PEOPLE), **ALL)


@pytest.mark.parametrize(
    "cells",
    [
        ["12%", "3.5%", ""],
        ["1,5", "-2,25"],
        ["$1", "-$2.50", "$1,000"],
        ["5 kg", "12 kg"],
        ["1.234,5", "7"][:1],
        ["1 000", "2 500"],
        ["10 km", "300 m"],
        ["€ 3", "€ 4"],
        ["EUR 3", "EUR 4"],
        ["(5%)", "6%"],
        ["20°C", "−3°C"],
        ["1,00,000", "12,34,567"],
        [",5", ",75"],
        ["US$5", "US$7"],
        ["1 day", "12 days"],
        ["12%", "NA", "5%", "n/a"],
        ["1,5", "?", "2,5", "-"],
    ],
)
def test_columns_of_numbers_that_are_written_as_text_are_named(tmp_path: Path, cells: list[str]) -> None:
    lines = "".join(f'"{cell}","{cell}",{number}\n' for number, cell in enumerate(cells))
    path = write(tmp_path, f"x,y,z\n{lines}", "a.csv")
    options: dict[str, Any] = {"inputs": ["x"], "targets": ["y", "z"], "split": [1, 0, 0]}
    about_x, about_y = table(path, **options).warnings
    assert about_x.startswith(
        "data.inputs: the column 'x' of a.csv is taken for categories, though all of its cells look like numbers, such as"
    )
    assert "Write plain numbers" in about_x
    assert about_x.endswith("or list 'x' in data.categories if they are categories")
    assert about_y.endswith("or list 'y' in data.classes if they are classes")
    assert table(path, **options, categories=["x"], classes=["y"]).warnings == []


@pytest.mark.parametrize(
    "cells",
    [
        ["1a", "2b"],
        ["Bern", "12%"],
        ["2024-01-05", "2024-02-01"],
        ["12:30", "13:15"],
        ["1st", "2nd"],
        ["A12", "A13"],
        ["1/2", "3/4"],
        ["10-20", "20-30"],
        ["1.2.3", "1.2.4"],
        ["%", "kg"],
        ["+", "-"],
    ],
)
def test_names_are_not_taken_for_numbers(tmp_path: Path, cells: list[str]) -> None:
    path = write(tmp_path, "x,y\n" + "".join(f'"{cell}",1\n' for cell in cells))
    assert table(path, inputs=["x"], targets=["y"], split=[1, 0, 0]).warnings == []


def test_an_empty_target_column_is_told_with_what_helps(tmp_path: Path) -> None:
    path = write(tmp_path, "x,y\n1,\n2,NA\n3,\n", "a.csv")
    for column in ("y", "x"):
        write(tmp_path, "x,y\n,\n,\n,\n" if column == "x" else "x,y\n1,\n2,\n3,\n", "a.csv")
        with pytest.raises(mtl.UserError) as error:
            table(path, inputs=["x"], targets=["y"], split=[1, 0, 0])
        key, remedy = (
            ("inputs", "fill it, or remove 'x' from data.inputs")
            if column == "x"
            else ("targets", "label some of its rows, or remove its task, and 'y' from data.targets")
        )
        start = f"data.{key}: all cells of '{column}' in the training split of a.csv are empty; "
        assert str(error.value) == start + remedy


@pytest.mark.parametrize("options", [{}, {"standardize_targets": ["y"]}, {"classes": ["y"]}])
@pytest.mark.parametrize("word", ["", "NA", "None"])
def test_a_target_of_words_for_empty_cells_alone_is_empty(tmp_path: Path, word: str, options: dict[str, Any]) -> None:
    """And not one class, which everything would be right about."""
    path = write(tmp_path, f"x,y\n1,{word}\n2,\n3,{word}\n", "a.csv")
    with pytest.raises(mtl.UserError, match=r"all cells of 'y' in the training split of a\.csv are empty; label some"):
        table(path, inputs=["x"], targets=["y"], split=[1, 0, 0], **options)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("name", ["http://localhost:9/x", "s3://bucket/x", "file://localhost/x", "~/x", "~root/x"])
def test_a_name_like_an_address_is_that_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ending: str
) -> None:
    """pandas would ask the network, or look in somebody's home folder."""

    def connect(*_: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.chdir(tmp_path)
    path = Path(f"{name}.{ending}")
    path.parent.mkdir(parents=True)
    frame = pandas.DataFrame({"age": [1, 2, 3], "income": [4.0, 5.0, 6.0]})
    frame.to_csv(path.resolve(), index=False) if ending == "csv" else frame.to_parquet(path.resolve())
    part = cells.read(f"{name}.{ending}", {"inputs": ["age"], "targets": ["income"]})
    assert cells.numbers(part, "income", "targets").tolist() == [4.0, 5.0, 6.0]
    path.unlink()
    with pytest.raises(mtl.UserError, match="there is no file"):
        cells.read(f"{name}.{ending}", {"inputs": ["age"]})
