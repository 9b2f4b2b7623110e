"""Means with intervals, and tests of differences between methods that were run with the same seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev, variance

LEVEL = 0.95
SAME = 1e-6  # of the values' size: what float32 can't tell apart


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: in the figure's unit.
        half: half the width of its confidence interval, None where that isn't known.
        n: how many seeds it is of.
    """

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        """The interval's lower end."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The interval's upper end."""
        return None if self.half is None else self.mean + self.half

    def times(self, factor: float) -> "Estimate":
        """The same in a unit of which there are `factor` in one."""
        return Estimate(self.mean * factor, None if self.half is None else self.half * factor, self.n)


@dataclass(frozen=True)
class Difference:
    """How far one method is from another, over the seeds that both have.

    Args:
        estimate: of the difference; None without common seeds.
        p: two-sided, of the paired t-test, None where there is none.
        why: why there is none, empty where there is one.
    """

    estimate: Estimate | None
    p: float | None
    why: str


@cache
def quantile(freedom: float) -> float:
    """How many standard errors an interval reaches to either side, by Student's t with so many degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def estimate(values: Sequence[float]) -> Estimate | None:
    """The values' mean with its interval by Student's t; None without values, no interval of one alone."""
    if not values:
        return None
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, 1)
    return Estimate(fmean(values), quantile(n - 1) * stdev(values) / math.sqrt(n), n)


def welch(means: Sequence[float], parts: Sequence[tuple[float, Sequence[float]]]) -> Estimate:
    """The sum of the means, with the interval of a sum of independent means.

    Its degrees of freedom are those of Welch and Satterthwaite (Biometrics Bulletin 2, 1946).

    Args:
        means: what is added up.
        parts: of each that is uncertain, the derivative of the sum by it, and its values, at least two.

    Returns:
        The estimate, with the least number of seeds that a part has as `n`.
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
    """Ours minus theirs over the seeds that both have, with the paired t-test against no difference.

    Differences that are alike to the last digits of float32 have no test: a t-test would take them for certain.
    """
    seeds = [seed for seed in ours if seed in theirs]
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    found = estimate(differences)
    if found is None:
        return Difference(None, None, "no seed in common")
    if found.n == 1:
        return Difference(found, None, "one seed in common")
    size = max(abs(value) for seed in seeds for value in (ours[seed], theirs[seed]))
    if max(differences) - min(differences) <= SAME * size:
        same = abs(found.mean) <= SAME * size
        return Difference(found, None, "no difference in any seed" if same else "the same difference in every seed")

    from scipy import stats

    a, b = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    return Difference(found, float(stats.ttest_rel(a, b).pvalue), "")


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values corrected for how many they are (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    corrected, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = largest
    return corrected


def mean_ranks(columns: Sequence[Sequence[float]]) -> list[float]:
    """Each method's mean rank, 1 the best; equal values share the mean of their ranks.

    Args:
        columns: each with a value of every method, of which less is better.
    """
    from scipy import stats

    ranks = [stats.rankdata(column, method="average") for column in columns]
    return [fmean(float(rank[index]) for rank in ranks) for index in range(len(columns[0]))]


def smallest_p(seeds: int) -> float:
    """The least that a two-sided test by signed ranks can give for so many seeds."""
    return float(2 ** (1 - seeds))
