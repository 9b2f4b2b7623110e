"""metrics.csv, read back."""

import csv
from pathlib import Path

from mtl.loggers import CsvLogger


def test_lines(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path, ["a"])
    logger.log(1, 1, {"loss/a/train": 0.1 + 0.2, "x": float("nan")})
    with (tmp_path / "metrics.csv").open() as file:  # readable while the run goes on
        rows = list(csv.DictReader(file))
    logger.close()
    assert rows[0] == {"step": "1", "epoch": "1", "tag": "loss/a/train", "value": "0.30000000000000004"}
    assert rows[1]["value"] == "nan"


def test_a_run_that_goes_on_forgets_what_came_after_its_state(tmp_path: Path) -> None:
    first = CsvLogger(tmp_path, ["a"])
    first.log(1, 1, {"loss/a/train": 0.5})
    state = first.state_dict()
    first.log(2, 1, {"loss/a/train": 0.25, "weight/a": 1.0})
    first.close()
    second = CsvLogger(tmp_path, ["a"])
    second.load_state_dict(state)
    second.log(2, 1, {"loss/a/train": 0.125})
    second.close()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["step,epoch,tag,value", "1,1,loss/a/train,0.5", "2,1,loss/a/train,0.125"]
