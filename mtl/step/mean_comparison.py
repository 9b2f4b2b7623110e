"""The loss of some samples, compared with the mean of the losses of two parts of them.

Of a batch in two halves with losses L_a and L_b, and the numbers D_a and D_b that are counted on them, a mean has
L · (D_a + D_b) = L_a · D_a + L_b · D_b. The difference of the two sides is judged in units of |L_a - L_b|, since that
ratio is the error of the halves' shares: at initialisation halves are alike, and any shares give nearly the same loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Counted = Callable[[list[int]], tuple[float, float]]  # from samples to what is counted on them, and their loss


@dataclass
class Verdict:
    """What a test of a loss says.

    Attributes:
        whole, mean: the loss of all samples, and the mean of two parts' by what they count, where these differ.
        decided: whether the losses of parts differ by enough to tell.
        finite: whether the loss of all samples is.
    """

    whole: float = 0.0
    mean: float = 0.0
    differs: bool = False
    decided: bool = False
    finite: bool = True


@dataclass
class Comparison:
    """The mean of two parts' losses by what they count, beside the loss of both together.

    Attributes:
        mean: the former.
        differs: whether the latter is another number.
        decided: whether the parts' losses differ by enough to tell.
    """

    mean: float
    differs: bool
    decided: bool


def compare(
    counts: tuple[float, float], losses: tuple[float, float], whole: float, tolerance: float, precision: float
) -> Comparison:
    """Compares the loss of two parts together with the mean of their losses.

    Args:
        counts: what is counted on each part, above 0.
        losses: of each part.
        whole: of both together.
        tolerance: of the error of a part's share.
        precision: the relative rounding error of a loss.
    """
    (count_a, count_b), (loss_a, loss_b) = counts, losses
    mean = (count_a * loss_a + count_b * loss_b) / (count_a + count_b)
    gap, noise = abs(loss_a - loss_b), precision * max(abs(whole), abs(loss_a), abs(loss_b))
    # NaN differs from every number.
    return Comparison(mean, not abs(mean - whole) <= tolerance * gap + noise, tolerance * gap > noise)


def judge(counted: Counted, samples: list[int], tolerance: float, precision: float, *, cuts: int = 4) -> Verdict:
    """Compares the loss of samples with the mean of two parts' losses, for several cuts.

    Args:
        counted: gives what is counted on some samples, and their loss.
        samples: the first half and the second half of which are one cut; three more, of other sizes, are drawn.
        tolerance: of the error of a part's share.
        precision: the relative rounding error of a loss.
        cuts: how many are made.
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
        found = compare((count_a, count_b), (loss_a, loss_b), whole, tolerance, precision)
        if found.differs:
            return Verdict(whole, found.mean, differs=True)
        decided |= found.decided
    return Verdict(decided=decided)
