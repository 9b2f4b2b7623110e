"""Estimates against closed forms of Student's t, SciPy's intervals, and results by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from mtl.reporting.estimates import Estimate, estimate, holm, mean_ranks, paired, smallest_p, welch


def t_quantile(freedom: int, p: float = 0.975) -> float:
    """Returns the quantile in closed form: the tangent for one degree of freedom, a root for two."""
    return math.tan(math.pi * (p - 0.5)) if freedom == 1 else (2 * p - 1) / math.sqrt(2 * p * (1 - p))


def t_two_sided(t: float) -> float:
    """The p-value with two degrees of freedom, in closed form."""
    return 1 - abs(t) / math.sqrt(2 + t * t)


def test_interval_of_two_and_three_values() -> None:
    two, three = estimate([1.0, 3.0]), estimate([1.0, 2.0, 3.0])
    assert two is not None
    assert three is not None
    assert (two.mean, two.n, three.mean, three.n) == (2.0, 2, 2.0, 3)
    assert two.half == pytest.approx(t_quantile(1) * math.sqrt(2) / math.sqrt(2))  # deviation √2
    assert three.half == pytest.approx(t_quantile(2) * 1 / math.sqrt(3))  # deviation 1
    assert (three.low, three.high) == (2 - three.half, 2 + three.half)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert estimate([0.7]) == Estimate(0.7, None, 1)
    assert estimate([0.7]).low is None  # type: ignore[union-attr]
    assert estimate([]) is None


def test_equal_values_have_an_interval_without_width() -> None:
    assert estimate([0.25] * 3) == Estimate(0.25, 0.0, 3)


def test_other_units() -> None:
    assert Estimate(0.25, 0.01, 3).times(100) == Estimate(25.0, 1.0, 3)
    assert Estimate(0.25, None, 1).times(100) == Estimate(25.0, None, 1)


def test_paired_by_hand() -> None:
    """Differences 1, 2, 3: t = 2 / (1 / √3), with two degrees of freedom. Seeds that one alone has don't count."""
    ours, theirs = {0: 11.0, 1: 22.0, 2: 33.0, 7: 1e9}, {2: 30.0, 1: 20.0, 0: 10.0, 8: -1e9}
    found = paired(ours, theirs)
    assert found.p == pytest.approx(t_two_sided(2 * math.sqrt(3)))
    assert found.estimate == Estimate(2.0, pytest.approx(t_quantile(2) / math.sqrt(3)), 3)
    assert found.why == ""
    assert paired(theirs, ours).p == found.p


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        ({0: 1.0}, {1: 1.0}, "no seed in common"),
        ({0: 1.0, 1: 2.0}, {0: 0.5}, "one seed in common"),
        ({0: 0.1, 1: 0.2, 2: 0.3}, {0: 0.1, 1: 0.2, 2: 0.3}, "no difference in any seed"),
        # Float32 accuracies, 0.002 apart in every seed, but for the last digits.
        ({0: float(np.float32(0.934)), 1: float(np.float32(0.95))}, {0: 0.932, 1: 0.948}, "the same difference in"),
    ],
)
def test_no_test_where_it_would_be_nonsense(ours: dict[int, float], theirs: dict[int, float], why: str) -> None:
    found = paired(ours, theirs)
    assert found.p is None
    assert found.why.startswith(why)


def test_welch_is_scipys() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(1, 1, 5).tolist(), generator.normal(3, 4, 4).tolist()
    ours = welch([np.mean(a), -np.mean(b)], [(1.0, a), (-1.0, b)])
    theirs = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.n == 4


def test_welch_without_any_spread() -> None:
    assert welch([3.0], [(1.0, [1.0, 1.0])]) == Estimate(3.0, 0.0, 2)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_ranks_by_hand() -> None:
    """Three methods; ties share the mean of their ranks."""
    assert mean_ranks([[0.1, 0.2, 0.3], [5.0, 5.0, 1.0]]) == [(1 + 2.5) / 2, (2 + 2.5) / 2, (3 + 1) / 2]


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_smallest_p_is_that_of_signed_ranks(seeds: int) -> None:
    assert smallest_p(seeds) == pytest.approx(stats.wilcoxon(range(1, seeds + 1), method="exact").pvalue)
