"""What tables leave out, since it would say nothing."""

from pathlib import Path

from made_runs import run

from mtl.reporting import tables
from mtl.reporting.comparison import Comparison
from mtl.reporting.curves import Curves
from mtl.reporting.document import Table
from mtl.reporting.grouping import sections
from mtl.reporting.reading import find


def comparison(folder: Path) -> Comparison:
    (section,) = sections(find([folder]), None)
    return Comparison(section)


def table(blocks: list) -> Table:
    (found,) = blocks
    assert isinstance(found, Table)
    return found


def test_times_of_jobs_that_ran_side_by_side_have_no_ratio(tmp_path: Path) -> None:
    for launcher in ("basic", "joblib"):
        for name in ("equal", "X"):
            seconds = {"equal": 0.1, "X": 0.3}[name]
            folder = tmp_path / launcher / name
            run(folder, balancer=name, seconds_per_step=seconds, memory_per_step=1e6, launcher=launcher)
    alone, together = (table(tables.costs(comparison(tmp_path / launcher))) for launcher in ("basic", "joblib"))
    assert {row[0]: row[2] for row in alone.rows} == {"equal": "1.00", "X": "3.00"}
    assert list(together.columns) == ["method", "ms per step", "MB per step", "× ref."]


def test_few_measured_steps_have_no_shares(tmp_path: Path) -> None:
    for name, steps in (("equal", 40), ("X", 4)):
        told = {"a~b": {"mean": 0.5, "below_zero": 0.25, "steps": steps}}
        run(tmp_path / name, balancer=name, cosine=told)
    found = comparison(tmp_path)
    rows = {row[1]: row for row in table(tables.conflicts(found, Curves(found.methods))).rows}
    assert rows["equal"][2] == "40"
    assert rows["equal"][4].startswith("25")
    assert rows["X"][2] == "4"
    assert set(rows["X"][4:]) == {"–"}


def test_what_cannot_be_tested_is_told_below(tmp_path: Path) -> None:
    for seed in range(3):
        run(tmp_path / f"e{seed}", seed=seed)
        run(tmp_path / f"x{seed}", seed=seed, balancer="X")
    found = table(tables.tests(comparison(tmp_path)))
    assert {row[4] for row in found.rows} == {"–"}
    assert "no difference in any seed" in found.note
