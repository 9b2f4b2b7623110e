"""The small convolutional network for 28×28 images."""

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """A small LeNet-like trunk: (N, 1, 28, 28) images to (N, num_features) features.

    Args:
        num_features: width of the features.
        dropout: probability with which a channel of the second convolution is dropped.

    Source: after LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """

    def __init__(self, *, num_features: int = 20, dropout: float = 0.2) -> None:
        super().__init__()
        self.num_features = num_features
        self.conv1 = nn.Conv2d(1, 5, 5)
        self.conv2 = nn.Conv2d(5, 16, 5)
        self.dropout = nn.Dropout2d(dropout)
        self.linear = nn.Linear(256, num_features)

    def forward(self, image: Tensor) -> Tensor:
        """Features of shape (N, num_features), all at least 0."""
        x = F.relu(F.max_pool2d(self.conv1(image), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = self.dropout(x).flatten(1)
        # This ReLU ends the features. The network is often printed with one on its logits as well; heads have none,
        # since it would cut off every negative logit and with it the gradient of each class it silences.
        return F.relu(self.linear(x))
