"""Angles between predicted and true surface normals."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

BINS = 18_000  # of the histogram from 0° to 180°: the median is exact to 0.01°


class NormalAngles(Metric):
    """Angles in degrees between predicted and true normals: mean, median, and shares of pixels below thresholds.

    Normals have any length above zero; pixels whose true normal is zero or NaN don't count. The median is read from a
    histogram, so that its error is at most 0.01°, and the states don't grow with the number of pixels.

    Args:
        thresholds: The angles in degrees.
        dim: The dimension of the three components, 1 for (N, 3, …).

    Attributes:
        figures: `mean`, `median` and `within_{threshold}`, each with `max` or `min` for the better direction.
    """

    total: Tensor
    histogram: Tensor
    within: Tensor

    def __init__(self, thresholds: Sequence[float] = (11.25, 22.5, 30), *, dim: int = 1) -> None:
        super().__init__()
        self.thresholds = list(thresholds)
        self.dim = dim
        self.figures = {"mean": "min", "median": "min", **{f"within_{each:g}": "max" for each in thresholds}}
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(self.thresholds), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds the pixels of a batch, of shape (N, 3, …)."""
        prediction, target = prediction.movedim(self.dim, -1).double(), target.movedim(self.dim, -1).double()
        present = target.norm(dim=-1) > 0  # false for NaN
        a, b = F.normalize(prediction[present], dim=-1), F.normalize(target[present], dim=-1)
        # The arc cosine would lose half of the digits for small angles.
        angles = torch.rad2deg(2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))
        self.total += angles.sum()
        self.histogram += torch.bincount((angles * (BINS / 180)).long().clamp(0, BINS - 1), minlength=BINS)
        self.within += torch.stack([(angles < threshold).sum() for threshold in self.thresholds])

    def compute(self) -> dict[str, Tensor]:
        """Computes the figures; NaN if no pixel has a normal."""
        count = self.histogram.sum()
        median = self._nth((count - 1) // 2) / 2 + self._nth(count // 2) / 2
        figures = [self.total / count, median.where(count > 0, torch.nan), *(self.within.double() / count)]
        return dict(zip(self.figures, figures, strict=True))

    def _nth(self, number: Tensor) -> Tensor:
        """Returns the middle of the bin of the angle with this number in ascending order."""
        index = torch.searchsorted(self.histogram.cumsum(0), number, right=True)
        return (index.double() + 0.5) * (180 / BINS)
