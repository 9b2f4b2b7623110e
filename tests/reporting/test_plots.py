"""The content of the plots."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import accuracies, comparison, run

from mtl.reporting import plots
from mtl.reporting.curves import Curves
from mtl.reporting.pareto import pairs_to_show
from mtl.reporting.plots import Plots

T = math.tan(math.pi * 0.475)  # Student's t for two seeds


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Provides the figures that are drawn."""
    figures: list[Any] = []
    take = plots.take

    def keep(figure: Any, *rest: Any) -> str:
        figures.append(figure)
        return take(figure, *rest)

    monkeypatch.setattr(plots, "take", keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield figures


def of(folder: Path) -> Plots:
    found = comparison(folder)
    return Plots(found, Curves(found.methods), "x")


def test_intervals_of_what_is_reached(tmp_path: Path, drawn: list[Any]) -> None:
    """0.4 and 0.6: 0.5 ± t · 0.1."""
    for seed, a in enumerate((0.4, 0.6)):
        run(tmp_path / f"{seed}", seed=seed, test=accuracies(a=a))
    of(tmp_path).reached()
    interval, point = drawn[0].axes[0].lines
    assert list(interval.get_xdata()) == pytest.approx([0.5 - T * 0.1, 0.5 + T * 0.1])
    assert list(point.get_xdata()) == pytest.approx([0.5])


def test_training_and_validation_each_in_their_panel(tmp_path: Path, drawn: list[Any]) -> None:
    curves = {"loss/a/train": {1: 3.0, 2: 2.0}, "loss/a/val": {2: 5.0}, "metric/a/accuracy/val": {2: 0.7}}
    run(tmp_path / "one", curves=curves)
    of(tmp_path).training()
    told = {ax.get_title(loc="left"): ax.lines[0].get_ydata().tolist() for ax in drawn[0].axes}
    assert told == {
        "a loss, training": [3.0, 2.0],
        "a loss, validation": [5.0],
        "a accuracy, validation": [0.7],
    }


def test_intervals_of_two_tasks_go_their_own_ways(tmp_path: Path, drawn: list[Any]) -> None:
    """Across 0.5 ± t · 0.1, up 0.5 ± t · 0.01."""
    for name in ("equal", "X"):
        for seed, by in enumerate((-1, 1)):
            figures = accuracies(a=0.5 + 0.1 * by, b=0.5 + 0.01 * by)
            run(tmp_path / f"{name}{seed}", balancer=name, seed=seed, test=figures)
    found = of(tmp_path)
    found.pareto(pairs_to_show(found.comparison))
    _, _, (across, up) = drawn[0].axes[0].containers[0]
    assert across.get_segments()[0][:, 0].tolist() == pytest.approx([0.5 - T * 0.1, 0.5 + T * 0.1])
    assert up.get_segments()[0][:, 1].tolist() == pytest.approx([0.5 - T * 0.01, 0.5 + T * 0.01])


def test_long_names_leave_room_for_the_panels(tmp_path: Path, drawn: list[Any]) -> None:
    """Six pairs in two rows, and methods on the front whose names are wider than a panel."""
    tasks = ["segmentation", "depth", "normals", "edges"]
    for number in range(12):
        weights = {f"tasks.{t}.weight": 0.2 + 0.1 * ((number * 3 + i * 5) % 13) for i, t in enumerate(tasks)}
        figures = accuracies(**{t: 0.5 + 0.01 * ((number * 7 + i * 5) % 11) for i, t in enumerate(tasks)})
        run(tmp_path / str(number), tasks=tasks, test=figures, best=number / 12, config=weights)
    found = of(tmp_path)
    found.pareto(pairs_to_show(found.comparison))
    found.reached()
    of_pairs, of_tasks = ([ax.get_window_extent() for ax in figure.axes] for figure in drawn)
    inch = drawn[0].dpi
    assert len({box.y0 for box in of_pairs}) == 2
    assert min(box.width for box in of_pairs) > 2 * inch
    assert min(box.width for box in of_tasks) > inch
    names = [text for ax in drawn[0].axes for text in ax.texts if text.get_text().startswith("weights")]
    assert len(names) > 3
    assert not any(name.get_in_layout() for name in names)
    for name in names:
        told, room = name.get_window_extent(), name.axes.get_window_extent()
        assert room.x0 < told.x0 < told.x1 < room.x1
        assert room.y0 < told.y0 < told.y1 < room.y1
