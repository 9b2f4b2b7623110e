"""The content of the tables, and what they leave out."""

from pathlib import Path

import pytest
from made_runs import accuracies, comparison, run

from mtl.reporting import tables
from mtl.reporting.curves import Curves
from mtl.reporting.document import Table


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


@pytest.mark.parametrize(
    ("steps", "every", "advice"),
    [(2400, 1000, ": log.every=100 measures often enough for all."), (23, 10, "measured."), (240, 10, "measured.")],
)
def test_how_to_measure_more_is_said_where_it_helps(tmp_path: Path, steps: int, every: int, advice: str) -> None:
    told = {"a~b": {"mean": 0.5, "below_zero": 0.25, "steps": 3}}
    run(tmp_path / "one", steps=steps, cosine=told, config={"log.every": every})
    found = comparison(tmp_path)
    assert table(tables.conflicts(found, Curves(found.methods))).note.endswith(advice)


def test_bold_is_what_is_left_after_correction(tmp_path: Path) -> None:
    """X is ahead in a by 0.01, 0.02, 0.03 and 0.04, t = √15: p = 0.030, and of four tests 0.12. The others don't differ."""
    noise = (0.02, -0.02, 0.01, -0.01)
    for seed in range(4):
        run(tmp_path / f"e{seed}", seed=seed, test=accuracies(a=0.5, b=0.5))
        figures = accuracies(a=0.51 + 0.01 * seed, b=0.5 + noise[seed])
        run(tmp_path / f"x{seed}", seed=seed, balancer="X", test=figures)
        run(tmp_path / f"y{seed}", seed=seed, balancer="Y", test=accuracies(a=0.5 - noise[seed], b=0.5 + noise[seed]))
    found = table(tables.tests(comparison(tmp_path)))
    ps = {(row[0], row[1]): row[4:] for row in found.rows}
    assert ps["X", "a accuracy"] == ["0.030", "0.122"]
    assert found.strong == set()
    assert (
        "Of 4 tests of methods that don't differ, 0.2 would have p < 0.05 by chance; 1 has, and 0 after" in found.note
    )
    for seed in range(4):
        run(tmp_path / f"z{seed}", seed=seed, balancer="Z", test=accuracies(a=0.9 + 0.001 * seed, b=0.5))
    found = table(tables.tests(comparison(tmp_path)))
    assert [found.rows[index][:2] for index in found.strong] == [["Z", "a accuracy"]]


def test_bold_is_what_validation_would_choose(tmp_path: Path) -> None:
    for name, best in {"equal": 0.5, "X": 0.9}.items():
        run(tmp_path / name, balancer=name, best=best)
    found = table(tables.figures(comparison(tmp_path)))
    assert ([found.rows[index][0] for index in found.strong], found.note) == (
        ["X"],
        "Bold: the method that validation would choose.",
    )
    run(tmp_path / "Y", balancer="Y", best=None)
    found = table(tables.figures(comparison(tmp_path)))
    assert (found.strong, found.note) == (set(), "")


def test_a_mean_tells_of_how_many_seeds_it_is_where_not_of_all(tmp_path: Path) -> None:
    for seed, a in enumerate((0.4, 0.5, float("nan"))):
        run(tmp_path / str(seed), seed=seed, test=accuracies(a=a, b=0.5))
    (row,) = table(tables.figures(comparison(tmp_path))).rows
    assert row[:3] == ["equal", "3", "0.45 ± 0.64 (n=2)"]
    assert row[4] == "0.5 ± 0"


def test_units_of_time_and_memory(tmp_path: Path) -> None:
    run(tmp_path / "one", seconds_per_step=0.0125, memory_per_step=2_500_000)
    assert table(tables.costs(comparison(tmp_path))).rows == [["equal", "12.5", "1.00", "2.5", "1.00"]]
