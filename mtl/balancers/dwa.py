"""DWA: higher weights for tasks whose losses fall slowly."""

import torch
from torch import Tensor

from mtl.balancers.balancer import Balancer


class DWA(Balancer):
    """Weights from the ratio of each task's training losses in the last two epochs.

    w = P·softmax(r/τ) over the P present tasks, where r_t is the mean training loss of the last epoch divided by that
    of the epoch before; w = 1 in the first two epochs. For each task, only the epochs and steps in which it was present
    count. Needs the losses of earlier steps only.

    Args:
        temperature: τ, above 0; the higher, the more similar the weights.

    Raises:
        ValueError: If `temperature` is not above 0.

    Source: Liu et al., "End-to-End Multi-Task Learning with Attention", arXiv 1803.10704.
    """

    needs = "past"
    state_names = ("means", "total", "count")

    def __init__(self, *, temperature: float = 2.0) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.temperature = temperature
        self.means: list[Tensor] = []  # the mean losses of the last two finished epochs; 0 for epochs before the first
        self.total: Tensor | None = None  # the sum of the losses in the current epoch
        self.count: Tensor | None = None  # the number of its steps in which each task was present

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Returns the weights, above 0, with sum P. If the loss two epochs ago is zero or missing, r_t is 1."""
        if not self.means:
            return torch.ones_like(losses)
        before, last = (self.of_present(mean.to(losses.device)) for mean in self.means)
        ratio = torch.where(before == 0, 1.0, last / before)
        return len(losses) * (ratio / self.temperature).softmax(0)

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Adds the losses of the step to the sums of the epoch."""
        self.total, self.count = self.begun(self.total, losses), self.begun(self.count, losses)
        self.total = self.put(self.total, self.of_present(self.total) + losses)
        self.count = self.put(self.count, self.of_present(self.count) + 1)

    def epoch_end(self) -> None:
        """Stores the mean losses of the epoch; the mean of a task that was absent from the epoch doesn't change."""
        if self.total is not None and self.count is not None:
            before, last = (self.begun(mean, self.total) for mean in self.means or (None, None))
            seen = self.count > 0
            self.means = [torch.where(seen, last, before), torch.where(seen, self.total / self.count, last)]
            self.total = self.count = None
