"""Curves with bands, and conflict over time, for a few points computed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from made_runs import run

from mtl.reporting.curves import Curves, band, read
from mtl.reporting.grouping import Method, sections
from mtl.reporting.reading import find

T2 = 0.95 / math.sqrt(2 * 0.975 * 0.025)  # Student's t for three seeds


def method(folder: Path) -> Method:
    (section,) = sections(find([folder]), None)
    (found,) = section.methods
    return found


def test_what_is_read(tmp_path: Path) -> None:
    folder = run(tmp_path / "x", curves={"loss/a/train": {1: 2.5, 10: 1.5}, "lr/default": {1: 0.1}})
    with (folder / "metrics.csv").open("a") as file:
        file.write("20,2,loss/a/train,0.5\n30,2,loss/a/train,0.\n40,2,loss/a/tr")  # the last line was cut
    assert read(folder) == {"loss/a/train": ([1, 10, 20, 30], [2.5, 1.5, 0.5, 0.0])}
    assert read(tmp_path) == {}


def test_band_by_hand() -> None:
    """As far as all seeds go: 2, 4 and 6, then three times 1."""
    runs = [([1, 2, 3], [2.0, 1.0, 9.0]), ([1, 2], [4.0, 1.0]), ([1, 2, 4], [6.0, 1.0, 9.0])]
    found = band(runs, 100)
    half = T2 * 2 / math.sqrt(3)
    assert found.steps.tolist() == [1, 2]
    assert found.mean.tolist() == [4.0, 1.0]
    assert found.low is not None
    assert found.high is not None
    assert found.low == pytest.approx([4 - half, 1])
    assert found.high == pytest.approx([4 + half, 1])


def test_one_seed_has_no_band() -> None:
    found = band([([1, 2], [2.0, 1.0])], 100)
    assert (found.mean.tolist(), found.low, found.high) == ([2.0, 1.0], None, None)


def test_long_curves_are_means_over_windows() -> None:
    steps = list(range(1, 101))
    found = band([(steps, [float(step) for step in steps])], 10)
    assert found.steps.tolist() == found.mean.tolist() == [5.5 + 10 * window for window in range(10)]
    ragged = band([(steps[:97], [float(step) for step in steps[:97]])], 10)
    assert len(ragged.steps) == 10
    assert float(np.average(ragged.mean, weights=[9, 10, 10, 9, 10, 10, 9, 10, 10, 10])) == pytest.approx(49.0)


def test_a_curve_that_a_seed_lacks_isnt_drawn(tmp_path: Path) -> None:
    run(tmp_path / "0", curves={"loss/a/train": {1: 1.0}})
    run(tmp_path / "1", seed=1)
    found = method(tmp_path)
    curves = Curves([found])
    assert curves.band(found, "loss/a/train", 10) is None
    assert curves.missing(found)
    assert curves.tags() == ["loss/a/train"]


def test_conflict_in_thirds_of_training(tmp_path: Path) -> None:
    """Seed 0 has 8 of 8 below zero, then 2 of 8, then too few; seed 1 has 4 of 8, too few by a NaN, and none."""
    early, late = range(23, 31), range(31, 39)
    one = dict.fromkeys(early, -0.5) | {step: -0.1 if step < 33 else 0.2 for step in late}
    one |= dict.fromkeys(range(84, 91), -1.0)
    other = {step: -0.5 if step < 27 else 0.5 for step in early} | dict.fromkeys(late, -0.2) | {35: float("nan")}
    run(tmp_path / "0", steps=90, curves={"cosine/a~b": one})
    run(tmp_path / "1", seed=1, steps=90, curves={"cosine/a~b": other})
    found = method(tmp_path)
    assert Curves([found]).below_zero(found, "a~b") == [0.75, 0.25, None]


def test_a_cosine_that_is_not_defined_counts_neither_way(tmp_path: Path) -> None:
    values = {step: float("nan") if step == 9 else -0.5 for step in range(1, 10)}
    run(tmp_path / "0", steps=27, curves={"cosine/a~b": values})
    found = method(tmp_path)
    assert Curves([found]).below_zero(found, "a~b") == [1.0, None, None]
