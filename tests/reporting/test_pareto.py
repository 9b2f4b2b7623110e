"""Fronts against their definition, and areas computed by hand."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import accuracies, run

from mtl.reporting.axes import staircase
from mtl.reporting.comparison import Comparison
from mtl.reporting.grouping import sections
from mtl.reporting.pareto import front, hypervolume, pairs_to_show
from mtl.reporting.reading import find

numbers = st.integers(0, 5).map(float)


def test_area_by_hand() -> None:
    """Both more: two boxes, 1 × 3 and beside it 1 × 1. With the second figure less: the same, upside down."""
    assert hypervolume([(1.0, 3.0), (2.0, 1.0)], (0.0, 0.0), [True, True]) == pytest.approx(4.0)
    assert hypervolume([(1.0, 7.0), (2.0, 9.0)], (0.0, 10.0), [True, False]) == pytest.approx(4.0)


@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8),
    st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=60, deadline=None)
def test_front_is_as_defined(points: list[tuple[float, float]], maximise: tuple[bool, bool]) -> None:
    def value(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (v if more else -v for v, more in zip(point, maximise, strict=True))
        return x, y

    expected = [
        not any(
            other != point and all(o >= p for o, p in zip(value(other), value(point), strict=True)) for other in points
        )
        for point in points
    ]
    assert front(points, maximise) == expected


@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8),
    st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=60, deadline=None)
def test_the_shaded_area_is_the_hypervolume(points: list[tuple[float, float]], maximise: tuple[bool, bool]) -> None:
    """The corners that are drawn enclose what the library says, by the shoelace formula."""
    reference = tuple((min if more else max)(p[i] for p in points) for i, more in enumerate(maximise))
    on = sorted(point for point, there in zip(points, front(points, maximise), strict=True) if there)
    corners = staircase(on, reference, maximise)
    crosses = [a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, corners[1:] + corners[:1], strict=True)]
    assert abs(sum(crosses)) / 2 == pytest.approx(hypervolume(points, reference, maximise))


def test_picture_of_methods(tmp_path: Path) -> None:
    """Means (0.6, 0.4), (0.4, 0.6) and (0.4, 0.4); the worst of any run is (0.3, 0.3)."""
    for name, (a, b) in {"equal": (0.6, 0.4), "X": (0.4, 0.6), "Y": (0.4, 0.4)}.items():
        for seed, by in enumerate((-0.1, 0.1)):
            run(tmp_path / f"{name}{seed}", balancer=name, seed=seed, test=accuracies(a=a + by, b=b + by))
    (picture,) = pairs_to_show(Comparison(*sections(find([tmp_path]), None)))
    assert {m.label: on for m, on in zip(picture.methods, picture.on_front, strict=True)} == {
        "equal": True,
        "X": True,
        "Y": False,
    }
    assert picture.reference == pytest.approx((0.3, 0.3))
    assert picture.volume == pytest.approx(0.3 * 0.1 + 0.1 * 0.2)
    assert picture.volume_over_seeds is not None  # seed 0: 0.2 × 0 + …; both seeds' fronts from the same point
    seeds = [0.0, 0.4 * 0.2 + 0.2 * 0.2]
    assert picture.volume_over_seeds.mean == pytest.approx(sum(seeds) / 2)


def test_the_reference_point_is_the_worst_of_either_figure(tmp_path: Path) -> None:
    """An accuracy and an error: the least of the one, the most of the other, of any run."""
    for name, (a, b) in {"equal": (0.6, 0.4), "X": (0.4, 0.6)}.items():
        for seed, by in enumerate((-0.1, 0.1)):
            figures = {"a": {"accuracy": a + by}, "b": {"error": b + by}}
            kinds = {"a/accuracy": "max", "b/error": "min"}
            run(tmp_path / f"{name}{seed}", balancer=name, seed=seed, test=figures, kinds=kinds)
    (picture,) = pairs_to_show(Comparison(*sections(find([tmp_path]), None)))
    assert picture.reference == pytest.approx((0.3, 0.7))
    assert picture.volume == pytest.approx((0.6 - 0.3) * (0.7 - 0.4))


def test_pairs(tmp_path: Path) -> None:
    """Of up to five tasks every pair is shown, of more those that are asked for."""
    tasks = [f"t{index}" for index in range(6)]
    for name in ("equal", "X"):
        run(tmp_path / "six" / name, balancer=name, tasks=tasks)
        run(tmp_path / "five" / name, balancer=name, tasks=tasks[:5])
    six, five = (Comparison(*sections(find([tmp_path / part]), None)) for part in ("six", "five"))
    assert len(pairs_to_show(five)) == 5 * 4 / 2
    assert pairs_to_show(six) == []
    (picture,) = pairs_to_show(six, [["t5", "t1"]])
    assert (picture.x.task, picture.y.task) == ("t5", "t1")
