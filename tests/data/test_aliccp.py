"""Ali-CCP: the fields of small files in its layout, what is wrong with files, and the problem as a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, command

import mtl
from mtl.data import aliccp

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
