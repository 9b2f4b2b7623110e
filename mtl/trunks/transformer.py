"""A small transformer encoder."""

import torch
from torch import Tensor, nn

from mtl.errors import UserError


class Transformer(nn.Module):
    """A transformer encoder for sequences, whose outputs are averaged over the positions to features (N, num_features).

    Args:
        vocabulary: The number of different tokens, for sequences (N, L) of token numbers. Either this or `in_features`
            is required.
        in_features: The number of values at each position, for sequences (N, L, in_features), such as image patches or
            measurements.
        max_length: The largest length of a sequence; each position has a learned embedding.
        num_features: The width of the layers and the number of features.
        num_layers, num_heads: The number of layers, and of attention heads in each layer.
        dropout: The dropout probability in the layers.

    Raises:
        UserError: If both or none of `vocabulary` and `in_features` are set, or if `num_heads` doesn't divide
            `num_features`.
    """

    def __init__(
        self,
        *,
        vocabulary: int | None = None,
        in_features: int | None = None,
        max_length: int,
        num_features: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if (vocabulary is None) == (in_features is None):
            raise UserError("model.trunk: set either vocabulary, for sequences of token numbers, or in_features")
        if num_features % num_heads:
            raise UserError(f"model.trunk.num_heads is {num_heads}; it must divide num_features, {num_features}")
        self.num_features = num_features
        self.max_length = max_length
        self.embedding: nn.Module
        if vocabulary is not None:
            self.embedding = nn.Embedding(vocabulary, num_features)
        elif in_features is not None:
            self.embedding = nn.Linear(in_features, num_features)
        self.position = nn.Parameter(0.02 * torch.randn(max_length, num_features))
        self.layers = nn.ModuleList(  # the layers of nn.TransformerEncoder would start as copies of one layer
            nn.TransformerEncoderLayer(
                *(num_features, num_heads, 4 * num_features, dropout),
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(num_features)

    def forward(self, sequence: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes features (N, num_features).

        Args:
            sequence: Token numbers (N, L), or values (N, L, in_features).
            mask: (N, L), true or 1 for tokens, false or 0 for padding. None means that there is no padding.

        Raises:
            UserError: If the sequence is longer than `max_length`.
        """
        length = sequence.shape[1]
        if length > self.max_length:
            raise UserError(f"model.trunk.max_length is {self.max_length}, but a sequence has the length {length}")
        x = self.embedding(sequence) + self.position[:length]
        tokens = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        # In a sequence without tokens the padding isn't masked, since attention over no position would be NaN. The
        # features of such a sequence are zeros.
        padding = None if mask is None else ~tokens & tokens.any(1, keepdim=True)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        weights = tokens.to(x.dtype) / tokens.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("nlf,nl->nf", self.norm(x), weights)
