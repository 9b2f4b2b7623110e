"""The linear head."""

from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear head: (N, in_features) features to (N, out_features), or to (N,) for one output.

    Maps (N, in_features, H, W) are averaged over their positions first, so that a task of whole images can share a
    trunk with one of pixels.

    Args:
        in_features: width of the features.
        out_features: numbers a sample.
        squeeze: whether one output loses its dimension, as a target (N,) has none.
    """

    def __init__(self, in_features: int, out_features: int, *, squeeze: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.squeeze = squeeze and out_features == 1

    def forward(self, features: Tensor) -> Tensor:
        """The prediction, (N, out_features) or (N,)."""
        prediction = super().forward(averaged(features))
        return prediction.squeeze(-1) if self.squeeze else prediction


def averaged(features: Tensor) -> Tensor:
    """Maps (N, C, H, W) averaged over their positions, (N, C); anything else as it is."""
    return features.mean((2, 3)) if features.ndim == 4 else features
