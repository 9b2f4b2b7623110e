"""A multilayer perceptron."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.errors import UserError


class MLP(nn.Sequential):
    """Linear layers with activations, from flattened inputs (N, in_features) to features (N, widths[-1]).

    Args:
        in_features: The number of values in a sample: the product of all dimensions after the first.
        widths: The width of each layer; the last width is the number of features.
        activation: The name of a module class in torch.nn, such as ReLU or GELU.
        dropout: The dropout probability of each layer's outputs.

    Raises:
        UserError: If `widths` is empty, or if torch.nn has no such activation.
    """

    def __init__(
        self, in_features: int, *, widths: Sequence[int], activation: str = "ReLU", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not widths:
            raise UserError("model.trunk.widths: name the width of at least one layer")
        kind = getattr(nn, activation, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise UserError(f"model.trunk.activation: torch.nn has no '{activation}'; use ReLU, GELU, SiLU or Tanh")
        self.num_features = widths[-1]
        for width in widths:
            self.extend([nn.Linear(in_features, width), kind(), nn.Dropout(dropout)])
            in_features = width

    def forward(self, x: Tensor) -> Tensor:
        """Computes features (N, num_features) from inputs (N, …)."""
        features: Tensor = super().forward(x.flatten(1))  # type: ignore[no-untyped-call]
        return features

    def stages(self) -> list[nn.Module]:
        """Returns a stage for each linear layer; see `mtl.trunks.stages`."""
        layers = list(self.children())
        stages = [nn.Sequential(*layers[start : start + 3]) for start in range(0, len(layers), 3)]
        stages[0].insert(0, nn.Flatten())
        return list(stages)
