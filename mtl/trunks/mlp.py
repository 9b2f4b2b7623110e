"""A multilayer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

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
        self.extend(perceptron([in_features, *widths], activation=kind, dropout=dropout))

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


def perceptron(
    widths: Sequence[int], *, activation: Callable[[], nn.Module] = nn.ReLU, dropout: float = 0.0
) -> nn.Sequential:
    """Returns linear layers, each with an activation and dropout, from widths[0] values to widths[-1] values."""
    layers = nn.Sequential()
    for before, width in pairwise(widths):
        layers.extend([nn.Linear(before, width), activation(), nn.Dropout(dropout)])
    return layers
