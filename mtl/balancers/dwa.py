"""DWA: more weight for tasks whose loss falls slowly."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer


class DWA(Balancer):
    """Weights from how much each task's loss fell from one epoch to the next.

    w = P·softmax(r/τ) over the P tasks present, r_t the mean training loss of the last epoch over that of the one
    before; 1 in the first two. A task's epochs are those that had it, and its means are of the steps that had it.

    Args:
        temperature: τ, above 0; the higher, the more alike the weights.

    Source: Liu et al., "End-to-End Multi-Task Learning with Attention", arXiv 1803.10704.
    """

    needs = "past"
    kept = ("means", "total", "count")

    def __init__(self, *, temperature: float = 2.0) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.temperature = temperature
        self.means: list[Tensor] = []  # of the last two epochs that are over; 0 where there were fewer
        self.total: Tensor | None = None  # of the losses in this one
        self.count: Tensor | None = None  # of the steps that each task was present in

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Returns the weights, above 0, with sum P. A task whose loss was zero counts as one that didn't change."""
        if not self.means:
            return torch.ones_like(losses)
        before, last = (self.of_present(mean.to(losses.device)) for mean in self.means)
        ratio = torch.where(before == 0, 1.0, last / before)
        return len(losses) * (ratio / self.temperature).softmax(0)

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Adds the losses of the step to those of the epoch."""
        self.total, self.count = self.begun(self.total, losses), self.begun(self.count, losses)
        self.total = self.put(self.total, self.of_present(self.total) + losses)
        self.count = self.put(self.count, self.of_present(self.count) + 1)

    def epoch_end(self) -> None:
        """Takes the epoch's means; a task that was never present keeps its earlier ones."""
        if self.total is not None and self.count is not None:
            before, last = (self.begun(mean, self.total) for mean in self.means or (None, None))
            seen = self.count > 0
            self.means = [torch.where(seen, last, before), torch.where(seen, self.total / self.count, last)]
            self.total = self.count = None
