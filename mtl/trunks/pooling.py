"""Attention over lists of ids, such as the items that a user clicked before."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """A weighted mean of the vectors in a list, with weights that depend on a candidate, as in DIN (arXiv 1706.06978).

    The weights are a softmax over the list. The score of a vector h for the candidate c is that of a small network on
    (h, c, h − c, h · c). The mean of an empty list is zero. (DIN itself has no softmax.)

    Args:
        width: The width of the vectors and of the candidate.
        hidden: The width of the network's hidden layer.
    """

    def __init__(self, width: int, *, hidden: int = 16) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(4 * width, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, vectors: Tensor, candidate: Tensor, present: Tensor) -> Tensor:
        """Returns the weighted means, (N, width).

        Args:
            vectors: The vectors, (N, length, width).
            candidate: The candidates, (N, width).
            present: Which of the vectors are present, (N, length), boolean.
        """
        same = candidate[:, None].expand_as(vectors)
        scores = self.score(torch.cat([vectors, same, vectors - same, vectors * same], 2)).squeeze(2)
        lowest = torch.finfo(scores.dtype).min  # not -inf, since the softmax of an empty list would be NaN
        weights = scores.masked_fill(~present, lowest).softmax(1).masked_fill(~present, 0)
        pooled: Tensor = (weights[..., None] * vectors).sum(1)
        return pooled
