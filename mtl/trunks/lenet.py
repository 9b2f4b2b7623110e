"""A small convolutional network for 28×28 images."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """A small LeNet-like trunk from images (N, 1, 28, 28) to features (N, num_features).

    Args:
        num_features: The number of features.
        channels: The numbers of channels of the two convolutions.
        dropout: The dropout probability of the second convolution's channels.

    Source: after LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """

    def __init__(self, *, num_features: int = 20, channels: Sequence[int] = (5, 16), dropout: float = 0.2) -> None:
        super().__init__()
        self.num_features = num_features
        first, second = channels
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.dropout = nn.Dropout2d(dropout)
        self.linear = nn.Linear(16 * second, num_features)

    def forward(self, image: Tensor) -> Tensor:
        """Computes features (N, num_features), all at least 0."""
        x = F.relu(F.max_pool2d(self.conv1(image), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = self.dropout(x).flatten(1)
        # The features end with this ReLU. Some published versions of the network also have a ReLU on the logits. Heads
        # have none, since a negative logit, and the gradient of its class, would become zero.
        return F.relu(self.linear(x))

    def stages(self) -> list[nn.Module]:
        """Returns a stage for each layer; see `mtl.trunks.stages`."""
        return [
            nn.Sequential(self.conv1, nn.MaxPool2d(2), nn.ReLU()),
            nn.Sequential(self.conv2, nn.MaxPool2d(2), nn.ReLU(), self.dropout, nn.Flatten()),
            nn.Sequential(self.linear, nn.ReLU()),
        ]
