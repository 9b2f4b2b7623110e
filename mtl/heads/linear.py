"""A linear head."""

from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear head from features (N, in_features) to a prediction (N, out_features), or (N,) for one output.

    Maps (N, in_features, H, W) are averaged over their positions first, so that a task with one target for each image
    can share a trunk with a task that has one for each pixel.

    Args:
        in_features: The number of features.
        out_features: The number of outputs for each sample.
        squeeze: Whether to remove the dimension of a single output, so that the prediction is (N,).
    """

    def __init__(self, in_features: int, out_features: int, *, squeeze: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.squeeze = squeeze and out_features == 1

    def forward(self, features: Tensor) -> Tensor:
        """Computes the prediction, (N, out_features) or (N,)."""
        prediction = super().forward(averaged_maps(features))
        return prediction.squeeze(-1) if self.squeeze else prediction


def averaged_maps(features: Tensor) -> Tensor:
    """Averages maps (N, C, H, W) over their positions, to (N, C); other features are returned unchanged."""
    return features.mean((2, 3)) if features.ndim == 4 else features
