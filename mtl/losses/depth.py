"""Losses for depth maps."""

import torch
from torch import Tensor, nn


class InverseL1(nn.L1Loss):
    """The mean absolute difference between the prediction and 1 / target, for models that predict inverse depth.

    Positions without a depth are NaN in the target, or excluded by the task's mask.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Computes the mean over all elements of a prediction and a target of the same shape."""
        return super().forward(input, 1 / target)


class ScaleInvariant(nn.Module):
    """The scale-invariant error of depth maps, for models that predict the natural logarithm of the depth.

    For each image, with the differences d = prediction - log(target) at its n pixels, it is Σd² / n - weight · (Σd)² /
    n². With the weight 1, a factor that is common to all depths of an image doesn't count. Source: Eigen, Puhrsch and
    Fergus, "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network", NeurIPS 2014, equation 4.

    It is a mean over samples, and leaves out missing pixels itself: a task with this loss sets `missing=False` and
    `mean_over="samples"`. Missing depths are NaN or not above zero; an image without any depth has the error 0.

    Args:
        weight: The weight of the second term, λ in the paper, from 0 to 1.

    Raises:
        ValueError: If the weight is outside of this range.
    """

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is {weight!r}; it must be from 0 to 1")
        self.weight = weight

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Computes the mean over the images of a batch; prediction and target have the same shape (N, …)."""
        if prediction.shape != target.shape:
            raise ValueError(f"the prediction {tuple(prediction.shape)} and the target {tuple(target.shape)} differ")
        present = target > 0
        # The missing depths are replaced before the logarithm, since NaN would get into the gradient.
        difference = (prediction - target.where(present, torch.ones_like(target)).log()) * present
        count = present.flatten(1).sum(1).clamp(min=1)
        first, second = difference.square().flatten(1).sum(1) / count, (difference.flatten(1).sum(1) / count).square()
        return (first - self.weight * second).mean()
