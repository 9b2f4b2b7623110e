"""A trunk for the columns of a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.data.columns import codes, numbers
from mtl.errors import UserError, suggest


class Table(nn.Module):
    """Columns of numbers and categories to (N, num_features) features, by a perceptron.

    A number is standardised; where it is missing it is 0, the mean, and one input more says so. A category goes through
    an embedding, whose row 0 is for what is missing or not in the vocabulary: zeros, before training. It has
    min(600, round(1.6 · n^0.56)) dimensions for n rows, as in fastai, where `dimensions` doesn't say how many.

    Args:
        columns: of each column by name `{kind: number, mean: …, std: …}`, `{kind: category, vocabulary: […]}`, or
            `{kind: category, size: n}` for ids from 1 to n; the fact `columns` of the data.
        inputs: the columns that `forward` is given, in order.
        num_features: width of the features.
        hidden: widths of the layers before.
        dropout: probability with which an output of each layer is dropped.
        dimensions: of each embedding.
        sparse: whether the embeddings' gradients are sparse: as large as the batch, not as the table. Few optimizers
            take such.

    Raises:
        UserError: for an input that isn't one of the columns.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, Any]],
        inputs: Sequence[str],
        *,
        num_features: int = 64,
        hidden: Sequence[int] = (128,),
        dropout: float = 0.0,
        dimensions: int | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        for name in inputs:
            if name not in columns:
                raise UserError(f"model.inputs: the table has no column '{name}'" + suggest(name, columns))
        self.inputs = tuple(inputs)
        chosen = {name: columns[name] for name in inputs}
        scaled = [(column["mean"], column["std"]) for column in chosen.values() if column["kind"] == "number"]
        self.register_buffer("mean", torch.tensor([mean for mean, _ in scaled], dtype=torch.float64))
        self.register_buffer("std", torch.tensor([std for _, std in scaled], dtype=torch.float64))
        self.vocabularies: dict[str, list[str] | int] = {
            name: column["size"] if "size" in column else list(column["vocabulary"])
            for name, column in chosen.items()
            if column["kind"] == "category"
        }
        sizes = [1 + (each if isinstance(each, int) else len(each)) for each in self.vocabularies.values()]
        widths = [dimensions or _dimensions(size) for size in sizes]
        embeddings = [nn.Embedding(size, d, sparse=sparse) for size, d in zip(sizes, widths, strict=True)]
        for embedding in embeddings:
            # Small values, as in fastai, so that rare categories have little influence.
            nn.init.normal_(embedding.weight, std=0.01)
            nn.init.zeros_(embedding.weight.detach()[0])
        checks: Any = torch.sparse.check_sparse_tensor_invariants
        if sparse and not checks.is_enabled():
            checks.disable()  # off by default, but torch warns unless they are disabled explicitly
        self.embeddings = nn.ModuleList(embeddings)
        width = 2 * len(scaled) + sum(widths)
        layers: list[nn.Module] = []
        for wider in (*hidden, num_features):
            layers += [nn.Linear(width, wider), nn.ReLU(), nn.Dropout(dropout)]
            width = wider
        self.layers = nn.Sequential(*layers)

    def forward(self, *columns: Any) -> Tensor:
        """Features of shape (N, num_features), all at least 0.

        Args:
            columns: one for each of the inputs: the data's field (N,), or a list of N raw values: numbers or texts,
                None where one is missing.
        """
        if len(columns) != len(self.inputs):
            raise UserError(f"{len(columns)} columns are given, not {', '.join(self.inputs)}; look at model.inputs")
        by_name = dict(zip(self.inputs, columns, strict=True))
        raw = [self._tensor(name, column) for name, column in by_name.items() if name not in self.vocabularies]
        parts: list[Tensor] = []
        if raw:
            # The mean is subtracted in float64, since large numbers, such as times, differ only in the last digits.
            values = (torch.stack(raw, 1).double() - self.mean) / self.std
            values = values.to(self.layers[0].weight.dtype)  # type: ignore[arg-type]
            missing = values.isnan()
            parts += [values.masked_fill(missing, 0), missing.to(values.dtype)]
        parts += [
            embedding(self._tensor(name, by_name[name]))
            for name, embedding in zip(self.vocabularies, self.embeddings, strict=True)
        ]
        features: Tensor = self.layers(torch.cat(parts, 1))
        return features

    def _tensor(self, name: str, column: Any) -> Tensor:
        """Returns the column as numbers or codes, on the model's device."""
        if not isinstance(column, Tensor):
            vocabulary = self.vocabularies.get(name)
            values = numbers(column, name) if vocabulary is None else codes(column, vocabulary)
            return values.to(self.mean.device)
        if column.is_floating_point() == (name in self.vocabularies):
            raise UserError(f"'{name}': a tensor of {column.dtype} is given; numbers are floats, codes are integers")
        return column.to(self.mean.device)


def _dimensions(rows: int) -> int:
    """Returns the number of dimensions of an embedding with this number of rows."""
    return min(600, round(1.6 * math.pow(rows, 0.56)))
