"""The small transformer encoder."""

import torch
from torch import Tensor, nn

from mtl.errors import UserError


class Transformer(nn.Module):
    """A transformer encoder over a sequence, averaged over its positions: to (N, num_features) features.

    Args:
        vocabulary: how many token numbers there are, for sequences (N, L) of these; or
        in_features: numbers a position, for sequences (N, L, in_features), of patches of an image or of measurements.
        max_length: of the sequences; each position has a learned embedding.
        num_features: width of the layers and of the features.
        num_layers, num_heads: of the encoder.
        dropout: in the encoder's layers.

    Raises:
        UserError: unless one of vocabulary and in_features is given, and for heads that num_features can't be cut into.
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
            raise UserError("model.trunk: give vocabulary, for sequences of token numbers, or in_features, not both")
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
        self.layers = nn.ModuleList(  # not nn.TransformerEncoder, whose layers begin as copies of one
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
        """Features of shape (N, num_features).

        Args:
            sequence: (N, L) token numbers, or (N, L, in_features).
            mask: (N, L), true or 1 where there is a token, false or 0 where there is padding. None: everywhere.
        """
        length = sequence.shape[1]
        if length > self.max_length:
            raise UserError(f"model.trunk.max_length is {self.max_length}, and a sequence of {length} was given")
        x = self.embedding(sequence) + self.position[:length]
        there = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        # A sequence that is all padding attends to it: a softmax over nothing is NaN. Its features are zeros.
        padding = None if mask is None else ~there & there.any(1, keepdim=True)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        weights = there.to(x.dtype) / there.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("nlf,nl->nf", self.norm(x), weights)
