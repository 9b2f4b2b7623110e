"""The lines of the CSV file."""

import csv
from pathlib import Path

import pytest
from made_runs import accuracies, comparison, run

from mtl.reporting import tidy


def test_lines_by_hand(tmp_path: Path) -> None:
    """X is ahead in a by 0.01, 0.02 and 0.03, t = 2 √3, and behind in b by as much: two tests, each p doubled."""
    for seed in range(3):
        run(tmp_path / f"e{seed}", seed=seed, test=accuracies(a=0.5, b=0.5), memory_per_step=1000 * seed)
        by = 0.01 * (seed + 1)
        figures = accuracies(a=0.5 + by, b=0.5 - by)
        told = {"a~b": {"mean": 0.1 * seed, "below_zero": 0.2, "steps": 9}}
        run(tmp_path / f"x{seed}", seed=seed, balancer="X", test=figures, cosine=told)
    tidy.write(tmp_path / "report.csv", [comparison(tmp_path)])
    with (tmp_path / "report.csv").open() as file:
        lines = {(line["method"], line["task"], line["figure"]): line for line in csv.DictReader(file)}
    found = lines["X", "a", "difference in accuracy"]
    p = 1 - 2 * 3**0.5 / 14**0.5
    assert [float(found[name]) for name in ("mean", "p", "p_holm")] == pytest.approx([0.02, p, 2 * p])
    assert lines["equal", "", "memory_per_step"]["mean"] == "1000.0"
    assert lines["X", "", "seconds_per_step"]["mean"] == "0.01"
    assert float(lines["X", "a~b", "cosine"]["mean"]) == pytest.approx(0.1)
