"""Binary cross-entropy for targets of any type."""

import torch
from torch import Tensor, nn


class BinaryCrossEntropy(nn.BCEWithLogitsLoss):
    """Torch's binary cross-entropy of logits, which takes floats alone, for integers and booleans too."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean over all elements; both of one shape."""
        return super().forward(input, target.to(torch.promote_types(input.dtype, torch.float32)))
