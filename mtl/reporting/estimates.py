"""Means with confidence intervals, and tests of differences between methods that share seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev, variance

LEVEL = 0.95
SAME = 1e-6  # relative difference that float32 can't resolve


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: The mean, in the unit of the metric.
        half: Half the width of the confidence interval; None if unknown.
        n: The number of seeds.
    """

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        """The lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The upper end of the interval."""
        return None if self.half is None else self.mean + self.half

    def times(self, factor: float) -> "Estimate":
        """Returns the estimate multiplied by a factor, for a change of unit."""
        return Estimate(self.mean * factor, None if self.half is None else self.half * factor, self.n)


@dataclass(frozen=True)
class Difference:
    """The difference between two methods over common seeds.

    Args:
        estimate: The estimate of the difference; None if there are no common seeds.
        p: The two-sided p-value of the paired t-test; None if there is none.
        why: Why there is no p-value; empty if there is one.
    """

    estimate: Estimate | None
    p: float | None
    why: str


@cache
def quantile(freedom: float) -> float:
    """Returns the half width of a 95 % interval in standard errors, by Student's t for these degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def estimate(values: Sequence[float]) -> Estimate | None:
    """Returns the mean with Student's t interval; None if there are no values. A single value has no interval."""
    if not values:
        return None
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, 1)
    return Estimate(fmean(values), quantile(n - 1) * stdev(values) / math.sqrt(n), n)


def welch(means: Sequence[float], parts: Sequence[tuple[float, Sequence[float]]]) -> Estimate:
    """Returns the sum of independent means, with an interval.

    The degrees of freedom are those of Welch and Satterthwaite (Biometrics Bulletin 2, 1946).

    Args:
        means: The means to add.
        parts: For each uncertain term, the derivative of the sum with respect to the term, and at least two values.

    Returns:
        The estimate, whose `n` is the smallest number of seeds of a part.
    """
    variances = [slope**2 * variance(values) / len(values) for slope, values in parts]
    total = sum(variances)
    if total == 0:
        half = 0.0
    else:
        below = sum(v**2 / (len(values) - 1) for v, (_, values) in zip(variances, parts, strict=True))
        half = quantile(total**2 / below) * math.sqrt(total)
    return Estimate(sum(means), half, min(len(values) for _, values in parts))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Returns ours minus theirs over common seeds, with the paired t-test of no difference.

    There is no test if all differences are equal within float32 precision: the t-test would consider them certain.
    """
    seeds = [seed for seed in ours if seed in theirs]
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    centre = estimate(differences)
    if centre is None:
        return Difference(None, None, "no seed in common")
    if centre.n == 1:
        return Difference(centre, None, "one seed in common")
    size = max(abs(value) for seed in seeds for value in (ours[seed], theirs[seed]))
    if max(differences) - min(differences) <= SAME * size:
        same = abs(centre.mean) <= SAME * size
        return Difference(centre, None, "no difference in any seed" if same else "the same difference in every seed")

    from scipy import stats

    a, b = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    return Difference(centre, float(stats.ttest_rel(a, b).pvalue), "")


def holm(ps: Sequence[float]) -> list[float]:
    """Corrects the p-values for multiple testing (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    corrected, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = largest
    return corrected


def mean_ranks(columns: Sequence[Sequence[float]]) -> list[float]:
    """Returns each method's mean rank, where 1 is the best; equal values share the mean of their ranks.

    Args:
        columns: Columns with one value per method; lower is better.
    """
    from scipy import stats

    ranks = [stats.rankdata(column, method="average") for column in columns]
    return [fmean(float(rank[index]) for rank in ranks) for index in range(len(columns[0]))]


def smallest_p(seeds: int) -> float:
    """Returns the smallest p-value of a two-sided signed-rank test with this number of seeds."""
    return float(2 ** (1 - seeds))
