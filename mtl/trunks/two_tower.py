"""Two towers: one for the columns of the user, and one for those of the item."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.errors import UserError, suggest
from mtl.trunks.mlp import perceptron
from mtl.trunks.table import Columns


class TwoTower(nn.Module):
    """Two multilayer perceptrons, one for the columns of the user and one for those of the item, without connections.

    The outputs u and v of the towers, (N, width) each, are combined to the features: their elementwise product u · v,
    of which a linear head makes a weighted inner product, or their concatenation, of which it makes a sum of a term
    of the user and one of the item, without interactions. The last layer of each tower has no activation.

    Args:
        columns, inputs, dimensions, sparse: See `mtl.trunks.Table`, also for the errors raised.
        user: The inputs of the user's tower.
        item: The inputs of the item's tower, such as the item and its tags; also the context, such as the hour.
        width: The width of each tower's output.
        hidden: The widths of the hidden layers of each tower.
        combine: `product` or `concatenation`.
        dropout: The dropout probability of the hidden layers' outputs.

    Attributes:
        num_features: The number of features: `width` for a product, twice as many for a concatenation.

    Raises:
        UserError: If an input is not in exactly one tower, or if `combine` is unknown.
    """

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, Any]],
        inputs: Sequence[str],
        *,
        user: Sequence[str],
        item: Sequence[str],
        width: int = 32,
        hidden: Sequence[int] = (64,),
        combine: str = "product",
        dropout: float = 0.0,
        dimensions: int | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if combine not in ("product", "concatenation"):
            raise UserError(f"model.trunk.combine: '{combine}' is not one of product, concatenation")
        for name in (*user, *item):
            if name not in inputs:
                raise UserError(f"model.trunk: '{name}' isn't in model.inputs" + suggest(name, inputs))
        for name in inputs:
            if [*user, *item].count(name) != 1:
                raise UserError(f"model.trunk: list '{name}' once, either in user or in item")
        self.inputs, self.combine = tuple(inputs), combine
        self.user_columns = Columns(columns, user, dimensions=dimensions, sparse=sparse)
        self.item_columns = Columns(columns, item, dimensions=dimensions, sparse=sparse)

        def tower(width_in: int) -> nn.Sequential:
            layers = perceptron([width_in, *hidden], dropout=dropout)
            return layers.append(nn.Linear([width_in, *hidden][-1], width))

        self.user, self.item = tower(self.user_columns.width), tower(self.item_columns.width)
        self.num_features = width if combine == "product" else 2 * width

    def forward(self, *columns: Any) -> Tensor:
        """Computes features (N, num_features); the arguments are those of `mtl.trunks.Table`."""
        if len(columns) != len(self.inputs):
            raise UserError(f"the trunk got {len(columns)} columns, but model.inputs is {', '.join(self.inputs)}")
        by_name = dict(zip(self.inputs, columns, strict=True))
        user: Tensor = self.user(self.user_columns(*(by_name[name] for name in self.user_columns.inputs)))
        item: Tensor = self.item(self.item_columns(*(by_name[name] for name in self.item_columns.inputs)))
        return user * item if self.combine == "product" else torch.cat([user, item], 1)
