"""Binary cross-entropy for targets of any type."""

import torch
from torch import Tensor, nn


class BinaryCrossEntropy(nn.BCEWithLogitsLoss):
    """Binary cross-entropy of logits for floating-point, integer and boolean targets; torch's class needs floats."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Computes the mean over all elements of a prediction and a target of the same shape."""
        return super().forward(input, target.to(torch.promote_types(input.dtype, torch.float32)))
