"""Δm of figures computed by hand, and the coverage of its interval."""

import math
from pathlib import Path

import numpy as np
import pytest
from made_runs import run
from scipy import stats

from mtl.reporting.comparison import Comparison
from mtl.reporting.delta import delta
from mtl.reporting.estimates import Estimate
from mtl.reporting.grouping import sections
from mtl.reporting.reading import find

SIGNS = {"a": 1, "b": -1}  # an accuracy, an error


def test_by_hand_seed_by_seed() -> None:
    """Seed 0: a gains 10 %, b's error falls by 20 %: 15 %. Seed 1: a loses 10 %, b gains 0: -5 %."""
    ours = {"a": {0: 0.55, 1: 0.45}, "b": {0: 1.6, 1: 2.0}}
    alone = {"a": {0: 0.5, 1: 0.5}, "b": {0: 2.0, 1: 2.0}}
    found = delta(ours, alone, SIGNS)
    assert found.how == "paired"
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx((15 - 5) / 2)
    tangent = math.tan(math.pi * 0.475)  # of one degree of freedom; the deviation is 20 / √2
    assert found.estimate.half == pytest.approx(tangent * 20 / math.sqrt(2) / math.sqrt(2))


def test_a_seed_counts_where_all_have_it() -> None:
    ours = {"a": {0: 0.55, 1: 0.45, 2: 9.0}, "b": {0: 1.6, 1: 2.0, 2: 9.0}}
    alone = {"a": {0: 0.5, 1: 0.5, 2: 9.0}, "b": {0: 2.0, 1: 2.0, 5: 9.0}}
    found = delta(ours, alone, SIGNS)
    assert found.estimate is not None
    assert (found.estimate.n, found.estimate.mean) == (2, pytest.approx(5.0))


def test_of_means_by_hand() -> None:
    """No seed in common: the means are 0.6 against 0.5 and 1.5 against 2, which are gains of 20 % and 25 %.

    All four have a variance of 0.02 / 2. By the means of a and b alone the gain falls by 100 · 0.6 / 0.5 / (2 · 0.5)
    and rises by 100 · 1.5 / 2 / (2 · 2). The method's seeds, 15 % and 30 %, have a variance of 112.5.
    """
    ours = {"a": {0: 0.5, 1: 0.7}, "b": {0: 1.4, 1: 1.6}}
    alone = {"a": {5: 0.4, 6: 0.6}, "b": {7: 1.9, 8: 2.1}}
    found = delta(ours, alone, SIGNS)
    assert found.how == "unpaired"
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx(22.5)
    variances = [112.5 / 2, 120**2 * 0.01, 18.75**2 * 0.01]
    freedom = sum(variances) ** 2 / sum(v**2 for v in variances)
    assert found.estimate.half == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(sum(variances)))
    assert found.estimate.n == 2


def test_one_seed_has_no_interval() -> None:
    found = delta({"a": {0: 0.6}}, {"a": {0: 0.5}}, {"a": 1})
    assert found.estimate == Estimate(pytest.approx(20.0), None, 1)
    assert found.why == "one seed"
    found = delta({"a": {0: 0.5, 1: 0.6, 2: 0.7}}, {"a": {5: 0.5}}, {"a": 1})
    assert found.estimate == Estimate(pytest.approx(20.0), None, 1)  # no more than the single run can tell


@pytest.mark.parametrize("zero", [0.0, -0.3])
def test_a_baseline_that_has_no_percentage(zero: float) -> None:
    found = delta({"a": {0: 0.6, 1: 0.6}}, {"a": {0: 0.5, 1: zero}}, {"a": 1})
    assert found.estimate is None
    assert "relative differences have no meaning" in found.why


def test_a_baseline_that_is_missing() -> None:
    assert delta({"a": {0: 0.6}}, {"a": {}}, {"a": 1}).why == "no value of a alone"
    assert delta({"a": {}}, {"a": {0: 0.6}}, {"a": 1}).why == "no value of a"


@pytest.mark.parametrize("shared", [True, False], ids=["paired", "unpaired"])
def test_the_interval_holds_the_truth_as_often_as_it_says(shared: bool) -> None:
    """Tasks of a method are correlated within a seed, and a seed's method with its single runs where they are paired."""
    generator = np.random.default_rng(0)
    held, trials, n = 0, 1500, 4
    for _ in range(trials):
        common = generator.normal(0, 0.02, n)
        joint = generator.normal(0, 0.02, n)
        ours, alone = {}, {}
        for task, mean, base in (("a", 0.6, 0.5), ("b", 1.8, 2.0)):
            own = mean * (1 + joint + shared * common + generator.normal(0, 0.01, n))
            single = base * (1 + shared * common + generator.normal(0, 0.01, n))
            ours[task] = dict(enumerate(own.tolist()))
            alone[task] = dict(enumerate(single.tolist(), 0 if shared else 100))
        found = delta(ours, alone, SIGNS).estimate
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= (20 + 10) / 2 <= found.high
    assert 0.93 < held / trials < 0.97  # four standard errors of a share of 1,500 are 0.023


def test_figures_of_one_task_are_from_the_same_single_task_runs() -> None:
    """Without seeds in common. Two equal figures say no more than one, so that the interval is that of one."""
    ours, alone = {0: 0.5, 1: 0.7, 2: 0.75}, {5: 0.4, 6: 0.6}
    one = delta({"a/x": ours}, {"a/x": alone}, {"a/x": 1})
    twice = delta({"a/x": ours, "a/y": ours}, {"a/x": alone, "a/y": alone}, {"a/x": 1, "a/y": 1})
    assert one.estimate is not None
    assert one.estimate.half is not None
    assert twice.estimate is not None
    assert twice.estimate.mean == pytest.approx(one.estimate.mean)
    assert twice.estimate.half == pytest.approx(one.estimate.half)


def test_a_task_counts_as_often_as_it_has_figures() -> None:
    """a gains 10 % and 20 %, b loses 30 %: 0 over three figures."""
    ours = {"a/x": {0: 1.1}, "a/y": {0: 0.8}, "b/x": {0: 1.3}}
    alone = dict.fromkeys(ours, {0: 1.0})
    found = delta(ours, alone, {"a/x": 1, "a/y": -1, "b/x": -1})
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx(0, abs=1e-9)


def test_seeds_without_all_figures_of_a_task_alone() -> None:
    ours = {"a/x": {0: 1.0}, "a/y": {0: 1.0}}
    found = delta(ours, {"a/x": {1: 1.0}, "a/y": {2: 1.0}}, {"a/x": 1, "a/y": 1})
    assert (found.estimate, found.why) == (None, "no seed of a alone has all figures")


# Table 1 of FAMO (arXiv 2306.03792): mIoU, pixel accuracy, absolute and relative error, mean and median angle, shares
# within 11.25°, 22.5° and 30°; and Δm, in which the paper counts a loss as positive.
NYUV2 = {
    "alone": (38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15),
    "equal": (39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08),
    "mgda": (30.47, 59.90, 0.6070, 0.2555, 24.88, 19.45, 29.18, 56.88, 69.36),
    "cagrad": (39.79, 65.49, 0.5486, 0.2250, 26.31, 21.58, 25.61, 52.36, 65.58),
    "nash_mtl": (40.13, 65.93, 0.5261, 0.2171, 25.26, 20.08, 28.40, 55.47, 68.15),
    "famo": (38.88, 64.90, 0.5474, 0.2194, 25.06, 19.57, 29.21, 56.61, 68.98),
}
PRINTED = {"equal": 5.59, "mgda": 1.38, "cagrad": 0.20, "nash_mtl": -4.04, "famo": -4.10}


def nyuv2(row: str) -> dict[str, dict[str, float]]:
    """Returns the figures of a row, with two that the paper doesn't have."""
    names = ["mean", "median", "within_11.25", "within_22.5", "within_30"]
    iou, accuracy, absolute, relative, *angles = NYUV2[row]
    return {
        "segmentation": {"iou": iou, "accuracy": accuracy, "class_iou.bed": 1.0, "loss": 1.0},
        "depth": {"error.absolute": absolute, "error.relative": relative, "error.rmse": 1.0, "loss": 1.0},
        "normals": {**{f"angle.{name}": angle for name, angle in zip(names, angles, strict=True)}, "loss": 1.0},
    }


def test_the_delta_that_a_paper_prints(tmp_path: Path) -> None:
    better = {"iou": "max", "accuracy": "max", "class_iou.bed": "max"} | {
        f"angle.within_{angle:g}": "max" for angle in (11.25, 22.5, 30)
    }
    kinds = {f"{task}/{name}": better.get(name, "min") for task, named in nyuv2("alone").items() for name in named}
    for name in PRINTED:
        run(tmp_path / name, balancer=name, tasks=list(nyuv2(name)), test=nyuv2(name), kinds=kinds)
    for task, figures in nyuv2("alone").items():
        run(tmp_path / task, tasks=[task], test={task: figures}, kinds=kinds)
    (section,) = sections(find([tmp_path]), None)
    chosen = ["segmentation/iou", "segmentation/accuracy", "depth/error.absolute", "depth/error.relative"]
    found = Comparison(section, delta=[*chosen, "normals/angle"])
    assert len(found.gained) == 9
    for method in found.methods:
        gain = found.delta(method).estimate
        assert gain is not None
        assert -gain.mean == pytest.approx(PRINTED[method.label], abs=0.011)  # of rounded figures
    everything = Comparison(section, delta=["all"])
    rest = {str(figure) for figure in everything.gained if figure not in found.gained}
    assert rest == {"segmentation class_iou.bed", "depth error.rmse"}
    tasks = [found.delta(found.methods[0], name).estimate for name in ("segmentation", "depth", "normals")]
    shares = [2, 2, 5]
    whole = found.delta(found.methods[0]).estimate
    assert whole is not None
    assert whole.mean == pytest.approx(sum(n * task.mean for n, task in zip(shares, tasks, strict=True) if task) / 9)
