"""STCH: a smooth maximum of the losses, each relative to its value after a warm-up."""

import torch
from torch import Tensor

from mtl.balancers.balancer import TINY, Balancer, inverse


class STCH(Balancer):
    """Weights for the gradient of μ·log Σ exp(log(p_t L_t/nadir_t)/μ), where p are the task weights.

    w_t = softmax(log(p L/nadir)/μ)_t / L_t. The nadir is the mean training loss in the last epoch of a warm-up; during
    the warm-up, w is that of Σ p_t log L_t / Σp. For each task, only the epochs and steps in which it was present
    count. A task whose warm-up hasn't ended has the share p_t/Σp, and the other tasks divide the rest. Needs the losses
    of the step.

    Args:
        mu: μ, above 0; the smaller, the nearer to the maximum of the relative losses.
        warmup_epochs: The number of epochs of the warm-up, at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Source: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", arXiv 2402.19078; the
    warm-up and the logarithm are from its authors' code for multi-task learning.
    """

    needs = "losses"
    preference = "steer"
    state_names = ("nadir", "total", "count", "epochs")

    def __init__(self, *, mu: float = 1.0, warmup_epochs: int = 4) -> None:
        if not mu > 0:
            raise ValueError(f"mu is {mu}; it must be above 0")
        if warmup_epochs < 1:
            raise ValueError(f"warmup_epochs is {warmup_epochs}; it must be at least 1")
        self.mu = mu
        self.warmup_epochs = warmup_epochs
        self.nadir: Tensor | None = None  # 0 for tasks whose warm-up hasn't ended
        self.total: Tensor | None = None  # the sum of the losses in the current epoch
        self.count: Tensor | None = None  # the number of its steps in which each task was present
        self.epochs: Tensor | None = None  # the number of finished epochs in which each task was present

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        """Computes the weights, at least 0; NaN for a negative loss."""
        preferences = self.preferences(len(losses)).to(losses.device)
        share = preferences / preferences.sum().clamp(min=TINY)
        if self.nadir is not None:
            nadir = self.of_present(self.nadir.to(losses.device))
            relative = torch.where(nadir > 0, preferences * losses / nadir, 0.0)
            divided = (relative.log() / self.mu).softmax(0).nan_to_num()  # NaN if all relative losses are 0
            share = torch.where(nadir > 0, divided * torch.where(nadir > 0, share, 0.0).sum(), share)
        return share * inverse(losses)

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        """Adds the losses of the step to the sums of the epoch."""
        self.total, self.count = self.begun(self.total, losses), self.begun(self.count, losses)
        self.total = self.put(self.total, self.of_present(self.total) + losses)
        self.count = self.put(self.count, self.of_present(self.count) + 1)

    def epoch_end(self) -> None:
        """Sets the nadir of each task whose warm-up ends."""
        if self.total is not None and self.count is not None:
            seen = self.count > 0
            self.nadir, self.epochs = self.begun(self.nadir, self.total), self.begun(self.epochs, self.total) + seen
            ends = seen & (self.epochs >= self.warmup_epochs) & (self.nadir == 0)
            self.nadir = torch.where(ends, self.total / self.count, self.nadir)
            self.total = self.count = None
