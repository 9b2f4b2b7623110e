"""Binary cross-entropy is torch's, for targets of any type."""

import pytest
import torch
from torch import nn

from mtl.losses import BinaryCrossEntropy


@pytest.mark.parametrize("target", [torch.int64, torch.uint8, torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_values_and_gradients_are_torchs(target: torch.dtype, precision: torch.dtype) -> None:
    logits = torch.randn(6, dtype=precision, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    ours = BinaryCrossEntropy()(logits, labels.to(target))
    theirs = nn.BCEWithLogitsLoss()(logits, labels.to(precision))
    assert ours.dtype == precision
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_unlike_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be the same as input size"):
        BinaryCrossEntropy()(torch.zeros(3, 1), torch.zeros(3).long())
