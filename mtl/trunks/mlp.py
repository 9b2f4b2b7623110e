"""The perceptron."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.errors import UserError


class MLP(nn.Sequential):
    """Linear layers, each with an activation: (N, …), in_features numbers a sample, to (N, widths[-1]) features.

    Args:
        in_features: numbers a sample, all its dimensions multiplied.
        widths: of the layers; the last one is the features'.
        activation: a class of torch.nn, such as ReLU or GELU.
        dropout: probability with which an output of a layer is dropped.

    Raises:
        UserError: without widths, or for an activation that torch.nn has not.
    """

    def __init__(
        self, in_features: int, *, widths: Sequence[int], activation: str = "ReLU", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not widths:
            raise UserError("model.trunk.widths: name the width of at least one layer")
        kind = getattr(nn, activation, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise UserError(f"model.trunk.activation: torch.nn has no '{activation}'; take ReLU, GELU, SiLU or Tanh")
        self.num_features = widths[-1]
        for width in widths:
            self.extend([nn.Linear(in_features, width), kind(), nn.Dropout(dropout)])
            in_features = width

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (N, num_features)."""
        features: Tensor = super().forward(x.flatten(1))  # type: ignore[no-untyped-call]
        return features
