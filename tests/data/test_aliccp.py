"""Ali-CCP: the fields of small files in its layout, what is wrong with files, and the problem as a run."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, command

import mtl
from mtl.data import aliccp, aliccp_raw
from mtl.data.splitting import held_out

HEADER = "click,purchase,101,205,109_14,D508\n"
ROWS = {
    "train": "0,0,3,1,0,0.25\n1,0,1,2,0,0.5\n1,1,3,2,0,0.75\n",
    "val": "0,0,4,1,0,0.0\n1,1,2,2,7,1.0\n",
    "test": "1,0,0,1,0,0.125\n",
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for split, rows in ROWS.items():
        (tmp_path / f"ali_ccp_{split}.csv").write_text(HEADER + rows)
    return tmp_path


def test_fields_labels_and_facts(files: Path) -> None:
    splits = aliccp(root=str(files))
    train, val, test = (data.fields for _, data in splits.items())
    assert list(train) == ["101", "205", "109_14", "D508", "click", "purchase", "conversion"]
    assert train["101"].tolist() == [3, 1, 3]
    assert train["101"].dtype == torch.int32
    assert val["101"].tolist() == [0, 2]  # 4 is more than any id of the training split
    assert val["109_14"].tolist() == [0, 0]  # the training split has no id above 0 here, and so row 1 is never trained
    assert test["D508"].tolist() == [0.125]
    assert train["click"].tolist() == [0, 1, 1]
    assert train["purchase"].tolist() == [0, 0, 1]
    assert train["conversion"][0].isnan()
    assert train["conversion"][1:].tolist() == [0, 1]
    assert splits.facts["columns"] == {
        "101": {"kind": "category", "size": 3},
        "205": {"kind": "category", "size": 2},
        "109_14": {"kind": "category", "size": 1},
        "D508": {"kind": "number", "mean": 0.5, "std": pytest.approx(0.25 * (2 / 3) ** 0.5)},
    }


def test_other_names_of_the_files(files: Path) -> None:
    for split in ROWS:
        (files / f"ali_ccp_{split}.csv").rename(files / f"{split}_sample.csv")
    assert len(aliccp(root=str(files), files="{split}_sample.csv").train) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,0,x,1,0,0.5", "row 4 of {file} has 'x' in the column '101'; it must be a whole number of at least 0"),
        ("0,0,1.5,1,0,0.5", "row 4 of {file} has '1.5' in the column '101'; it must be a whole number of at least 0"),
        ("0,0,-1,1,0,0.5", "row 4 of {file} has '-1' in the column '101'; it must be a whole number of at least 0"),
        ("0,0,3000000000,1,0,0", "row 4 of {file} has '3000000000' in the column '101'; it must be a whole number"),
        ("0,0,1,1,0,", "row 4 of {file} has '' in the column 'D508'; it must be a finite number"),
        ("0,0,1,1,0,inf", "row 4 of {file} has 'inf' in the column 'D508'; it must be a finite number"),
        ("2,0,1,1,0,0.5", "row 4 of {file} has '2' in the column 'click'; it must be 0 or 1"),
        ("0,1,1,1,0,0.5", "row 4 of {file} has a purchase without a click"),
        ("0,0,1,1", "row 4 of {file} has 4 values; it must have 6: click, purchase, 101, 205, 109_14, D508"),
        ("0,0,1,1,0,0.5,7", "row 4 of {file} has 7 values; it must have 6"),
    ],
)
def test_a_damaged_row_is_named(files: Path, row: str, message: str) -> None:
    file = files / "ali_ccp_train.csv"
    file.write_text(HEADER + ROWS["train"] + row + "\n" + ROWS["train"])
    with pytest.raises(mtl.UserError) as raised:
        aliccp(root=str(files))
    assert message.format(file=file) in str(raised.value)


def test_a_first_row_with_too_many_values_is_damaged_too(files: Path) -> None:
    (files / "ali_ccp_val.csv").write_text(HEADER + "0,0,1,1,0,0.5,7\n" + ROWS["val"])
    with pytest.raises(mtl.UserError, match=r"row 1 of .*ali_ccp_val\.csv has 7 values; it must have 6"):
        aliccp(root=str(files))


def test_files_that_are_missing_or_unlike(files: Path) -> None:
    (files / "ali_ccp_val.csv").write_text(HEADER.replace("205", "206") + ROWS["val"])
    with pytest.raises(mtl.UserError, match=r"ali_ccp_val\.csv and .*ali_ccp_train\.csv have different columns"):
        aliccp(root=str(files))
    for split, rows in ROWS.items():
        (files / f"ali_ccp_{split}.csv").write_text(HEADER.replace("click", "clicks") + rows)
    with pytest.raises(mtl.UserError, match="has no column 'click'; its columns are clicks, purchase"):
        aliccp(root=str(files))
    (files / "ali_ccp_test.csv").unlink()
    with pytest.raises(mtl.UserError, match=r"there is no file .*ali_ccp_test\.csv.*https://tianchi\.aliyun\.com"):
        aliccp(root=str(files))


@pytest.mark.parametrize("text", ["", HEADER])
def test_files_without_rows(files: Path, text: str) -> None:
    (files / "ali_ccp_train.csv").write_text(text)
    with pytest.raises(mtl.UserError, match=r"has no rows|the first line of .*ali_ccp_train\.csv"):
        aliccp(root=str(files))


def listed(features: dict[str, list[tuple[int, float]]]) -> str:
    """Returns the features of a row as the original files have them: by field, ids and values."""
    triples = [f"{field}\x02{number}\x03{value}" for field, each in features.items() for number, value in each]
    return f"{len(triples)},{chr(1).join(triples)}"


def original(folder: Path) -> tuple[dict[str, list[Any]], dict[str, dict[str, Any]]]:
    """Writes the original files, and returns the rows of each split and the features they have in common."""
    draws = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {}
    common: dict[str, dict[str, Any]] = {}
    for split, count in (("train", 400), ("test", 60)):
        for user in range(9):
            history = [(int(n), 0.5) for n in draws.integers(1, 99, 3)]  # several ids in a field
            common[f"{split}{user}"] = {"101": [(7000 + user, 1.0)], "109_14": history, "121": [(user % 3 + 90, 1.0)]}
        rows[split] = []
        for _ in range(count):
            click, purchase = int(draws.random() < 0.5), int(draws.random() < 0.3)
            features = {"205": [(int(draws.integers(500, 515)), 1.0)], "301": [(9351665, 1.0)]}
            if draws.random() < 0.5:
                features["508"] = [(int(draws.integers(1, 4)), round(float(draws.random()), 4))]
            rows[split].append((click, purchase, f"{split}{draws.integers(0, 9)}", features))
        lines = [f"{key},{listed(each)}" for key, each in common.items() if key.startswith(split)]
        (folder / f"common_features_{split}.csv").write_text("\n".join(lines) + "\n")
        lines = [f"{n},{click},{buy},{key},{listed(each)}" for n, (click, buy, key, each) in enumerate(rows[split], 1)]
        (folder / f"sample_skeleton_{split}.csv").write_text("\n".join(lines) + "\n")
    return rows, common


@pytest.mark.parametrize("block", [None, 700])
def test_original_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int | None) -> None:
    """Whole files, and blocks of a few rows, against a loop over the rows."""
    rows, common = original(tmp_path)
    if block is not None:
        monkeypatch.setattr("mtl.data.aliccp_raw.BLOCK", block)
    splits = aliccp(root=str(tmp_path), rare=20)
    possible = {split: [row for row in each if row[0] >= row[1]] for split, each in rows.items()}
    assert len(possible["train"]) < 400
    assert len(splits.train) + len(splits.val) == len(possible["train"])
    assert len(splits.val) in (34, 35)  # of 345
    inputs = {*aliccp_raw.IDS, "D508", "D509", "D702", "D853"}
    assert set(splits.train.fields) == {*inputs, "click", "purchase", "conversion"}

    def expected(row: Any, name: str) -> float:
        features = row[3] | common[row[2]]
        pair = features.get(name.removeprefix("D"), [(0, 0.0)])[0]
        return pair[1] if name.startswith("D") else pair[0]

    test = splits.test.fields
    assert test["click"].tolist() == [row[0] for row in possible["test"]]
    assert test["purchase"].tolist() == [row[1] for row in possible["test"]]
    assert test["D508"].tolist() == pytest.approx([expected(row, "D508") for row in possible["test"]])
    _, chosen = held_out(len(possible["train"]), 0.1, 0)
    train = [row for index, row in enumerate(possible["train"]) if index not in set(chosen.tolist())]
    for name in aliccp_raw.IDS:
        counts = Counter(expected(row, name) for row in train)
        vocabulary = sorted(each for each, count in counts.items() if count >= 20 and each)
        codes = {each: code for code, each in enumerate(vocabulary, start=1)}
        assert splits.train.fields[name].tolist() == [codes.get(expected(row, name), 0) for row in train], name
        assert test[name].tolist() == [codes.get(expected(row, name), 0) for row in possible["test"]], name
        assert splits.facts["columns"][name] == {"kind": "category", "size": max(1, len(vocabulary))}
    assert 2 < splits.facts["columns"]["205"]["size"] < 15  # some are rare
    assert splits.facts["columns"]["301"]["size"] == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sample_skeleton_train", "9,2,0,train1,1,205\x025\x031.0", "row 401 of {file} has '2' in the column 'click'"),
        (
            "sample_skeleton_train",
            "9,1,0,none,1,205\x025\x031.0",
            "row 401 of {file}: common_features_train.csv has no",
        ),
        (
            "sample_skeleton_test",
            "9,1,0,test1,1,205\x025",
            "row 61 of {file} has a feature that isn't a field, an id and",
        ),
        ("sample_skeleton_test", "9,1,0,test1,1,205\x02x\x031", "a feature of {file}, in row 1 or later, is no number"),
        (
            "common_features_test",
            "test9,1",
            "{file} can't be read: CSV parse error: Row #10: Expected 3 columns, got 2",
        ),
    ],
)
def test_a_damaged_row_of_the_original_files(tmp_path: Path, name: str, row: str, message: str) -> None:
    original(tmp_path)
    file = tmp_path / f"{name}.csv"
    file.write_text(file.read_text() + row + "\n")
    with pytest.raises(mtl.UserError) as raised:
        aliccp(root=str(tmp_path))
    assert message.format(file=file) in str(raised.value)


def written(folder: Path, inputs: Any) -> None:
    """Writes files with all columns of the real ones, in which the user decides."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for split, count in (("train", 2000), ("val", 400), ("test", 400)):
        columns = [draws.random(count).round(4) if n.startswith("D") else draws.integers(0, 9, count) for n in inputs]
        click = draws.random(count) < columns[0] / 10
        purchase = click & (draws.random(count) < 0.5)
        lines = [",".join(("click", "purchase", *inputs))]
        lines += [",".join(map(str, row)) for row in zip(click * 1, purchase * 1, *columns, strict=True)]
        (folder / f"ali_ccp_{split}.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("arguments", [["balancer=upgrad"], ["model=aitm"], ["model=mmoe"]])
def test_the_problem_trains(here: Path, arguments: list[str]) -> None:
    inputs = yaml.safe_load((ROOT / "configs/task/aliccp.yaml").read_text())["model"]["inputs"]
    assert len(inputs) == 31
    written(here / "data" / "ali-ccp", inputs)
    ended = command("train", "task=aliccp", "data.batch_size=100", "trainer.max_epochs=2", "logger=[]", *arguments)
    assert ended.code == 0, ended.err
    assert "Ali-CCP in data/ali-ccp: 2,000 train, 400 val, 400 test" in " ".join(ended.out.split())
    assert ended.metrics["test"]["click"]["auc"] > 0.7  # 0.84 for the true chances: the user decides alone
    assert set(ended.metrics["test"]["purchase"]) == {"auc", "loss"}
