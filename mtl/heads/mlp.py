"""The head with hidden layers."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.heads.linear import Linear, averaged


class MLP(nn.Sequential):
    """Hidden layers with ReLUs, then a linear head. Maps are averaged over their positions first.

    Args:
        in_features: width of the features.
        out_features: numbers a sample.
        widths: of the hidden layers.
        dropout: probability with which an output of a hidden layer is dropped.
        squeeze: whether one output loses its dimension, as a target (N,) has none.
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
        """The prediction, (N, out_features) or (N,)."""
        prediction: Tensor = super().forward(averaged(features))  # type: ignore[no-untyped-call]
        return prediction
