"""A head with hidden layers."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.heads.linear import Linear, averaged_maps


class MLP(nn.Sequential):
    """Hidden layers with ReLUs, followed by a linear head. Maps are averaged over their positions first.

    Args:
        in_features: The number of features.
        out_features: The number of outputs for each sample.
        widths: The widths of the hidden layers.
        dropout: The dropout probability of the hidden layers' outputs.
        squeeze: Whether to remove the dimension of a single output, so that the prediction is (N,).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        widths: Sequence[int] = (64,),
        dropout: float = 0.0,
        squeeze: bool = True,
    ) -> None:
        super().__init__()
        for width in widths:
            self.extend([nn.Linear(in_features, width), nn.ReLU(), nn.Dropout(dropout)])
            in_features = width
        self.append(Linear(in_features, out_features, squeeze=squeeze))

    def forward(self, features: Tensor) -> Tensor:
        """Computes the prediction, (N, out_features) or (N,)."""
        prediction: Tensor = super().forward(averaged_maps(features))  # type: ignore[no-untyped-call]
        return prediction
