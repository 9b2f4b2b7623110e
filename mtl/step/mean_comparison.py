"""Comparison of the loss of some samples with the mean of the losses of two subsets.

If a batch is divided into two halves with losses L_a and L_b and denominators D_a and D_b, then the loss L of the batch
is a mean if and only if L · (D_a + D_b) = L_a · D_a + L_b · D_b. The difference of the two sides is measured in units
of |L_a - L_b|: that ratio is the error of the halves' shares. An absolute tolerance would not detect wrong shares at
initialisation, when both halves have nearly the same loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Counted = Callable[[list[int]], tuple[float, float]]  # from samples to the denominator of their mean, and their loss


@dataclass
class Verdict:
    """The outcome of a test of a loss.

    Attributes:
        whole: The loss of all samples, if it differs from `mean`.
        mean: The weighted mean of the losses of two subsets, if it differs from `whole`.
        differs: Whether the two differ, so that the loss is not a mean.
        decided: Whether the losses of the subsets differ by enough for the test to be conclusive.
        finite: Whether the loss of all samples is finite.
    """

    whole: float = 0.0
    mean: float = 0.0
    differs: bool = False
    decided: bool = False
    finite: bool = True


@dataclass
class Comparison:
    """A comparison of the mean of two subsets' losses with the loss of both subsets together.

    Attributes:
        mean: The mean of the two losses, weighted by what each counts.
        differs: Whether the loss of both subsets together is another number.
        decided: Whether the two losses differ by enough for the comparison to be conclusive.
    """

    mean: float
    differs: bool
    decided: bool


def compare(
    counts: tuple[float, float], losses: tuple[float, float], whole: float, tolerance: float, precision: float
) -> Comparison:
    """Compares the loss of two subsets together with the weighted mean of their losses.

    Args:
        counts: The denominators of the two means, above 0.
        losses: The loss of each subset.
        whole: The loss of both subsets together.
        tolerance: The largest accepted error of a subset's share.
        precision: The relative rounding error of a loss.
    """
    (count_a, count_b), (loss_a, loss_b) = counts, losses
    mean = (count_a * loss_a + count_b * loss_b) / (count_a + count_b)
    gap, noise = abs(loss_a - loss_b), precision * max(abs(whole), abs(loss_a), abs(loss_b))
    # NaN differs from every number.
    return Comparison(mean, not abs(mean - whole) <= tolerance * gap + noise, tolerance * gap > noise)


def judge(counted: Counted, samples: list[int], tolerance: float, precision: float, *, cuts: int = 4) -> Verdict:
    """Compares the loss of samples with the mean of two subsets' losses, for several divisions into two subsets.

    Args:
        counted: Returns, for some samples, the denominator of their mean, and their loss.
        samples: The indices of the samples. The first division is into the first and the second half; up to three
            random divisions, some into subsets of different sizes, follow.
        tolerance: The largest accepted error of a subset's share.
        precision: The relative rounding error of a loss.
        cuts: The number of divisions, at most 4.
    """
    _, whole = counted(samples)
    if not math.isfinite(whole):
        return Verdict(finite=False)
    generator = torch.Generator().manual_seed(0)
    orders = [samples] + [[samples[i] for i in torch.randperm(len(samples), generator=generator)] for _ in range(3)]
    decided = False
    for order, share in list(zip(orders, (0.5, 0.5, 0.25, 0.7), strict=True))[:cuts]:
        middle = min(max(round(share * len(order)), 1), len(order) - 1)
        (count_a, loss_a), (count_b, loss_b) = counted(sorted(order[:middle])), counted(sorted(order[middle:]))
        if not count_a or not count_b:
            continue
        comparison = compare((count_a, count_b), (loss_a, loss_b), whole, tolerance, precision)
        if comparison.differs:
            return Verdict(whole, comparison.mean, differs=True)
        decided |= comparison.decided
    return Verdict(decided=decided)
