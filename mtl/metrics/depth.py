"""Errors of predicted depths."""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric


class DepthErrors(Metric):
    """Mean absolute and mean relative error of depths, and the root mean squared error.

    The relative error is |prediction - target| / target. Pixels whose target isn't above zero, or is NaN, don't count.

    Args:
        prediction: What the model predicts: the depth in the unit of the target, or its inverse (`inverse`). For models
            that predict logarithms, set `output=log_values` of the task, which converts them.

    Attributes:
        figures: `absolute`, `relative` and `rmse`; smaller is better.
    """

    sums: Tensor
    count: Tensor

    def __init__(self, *, prediction: Literal["depth", "inverse"] = "depth") -> None:
        super().__init__()
        if prediction not in ("depth", "inverse"):
            raise ValueError(f"prediction is {prediction!r}; it must be depth or inverse")
        self.prediction = prediction
        self.figures = dict.fromkeys(["absolute", "relative", "rmse"], "min")
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds the pixels of a batch; prediction and target have the same shape."""
        present = target > 0
        depth, target = prediction[present].double(), target[present].double()
        if self.prediction == "inverse":
            depth = 1 / depth.clamp(min=1e-6)
        error = (depth - target).abs()
        self.sums += torch.stack([error.sum(), (error / target).sum(), error.square().sum()])
        self.count += present.sum()

    def compute(self) -> dict[str, Tensor]:
        """Computes the figures; NaN if no pixel has a depth."""
        absolute, relative, squared = self.sums / self.count
        return {"absolute": absolute, "relative": relative, "rmse": squared.sqrt()}
