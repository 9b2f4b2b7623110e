"""Δm of figures computed by hand, and the coverage of its interval."""

import math

import numpy as np
import pytest
from scipy import stats

from mtl.reporting.delta import delta
from mtl.reporting.estimates import Estimate

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
    assert delta({"a": {0: 0.6}}, {"a": {}}, {"a": 1}).why == "no figures of a alone"
    assert delta({"a": {}}, {"a": {0: 0.6}}, {"a": 1}).why == "no figures of a"


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
