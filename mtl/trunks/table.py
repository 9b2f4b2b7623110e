"""A trunk for the columns of a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.data.columns import codes, numbers
from mtl.errors import UserError, suggest
from mtl.trunks.mlp import perceptron
from mtl.trunks.pooling import Attention


class Columns(nn.Module):
    """Columns of numbers and categories as one vector for each sample: the first stage of a `Table`.

    Numbers are standardised; a missing number becomes 0, the mean, and an additional input is 1 for missing numbers.
    Categories are embedded; row 0 of an embedding stands for missing and unknown categories, and is zero before
    training. Lists of ids, such as a user's history, are embedded and averaged, or pooled by attention.

    Args:
        columns: The description of each column by name: `{kind: number, mean: …, std: …}`,
            `{kind: category, vocabulary: […]}`, or `{kind: category, size: n}` for ids from 1 to n; and for lists of
            ids `{kind: ids, size: n}`, (N, length) with 0 where a list is shorter. The fact `columns` of the data has
            this form.
        inputs: The names of the columns that `forward` gets, in order.
        dimensions: The number of dimensions of each embedding; None for min(600, round(1.6 · n^0.56)) with n rows, as
            in fastai.
        sparse: Whether the gradients of the embeddings are sparse, and so as large as the batch, not as the embedding.
            Few optimizers support sparse gradients.
        attention: By name of a column of ids, the name of the category, such as the candidate item, whose embedding
            is used for the ids too, and by which attention weights them, see `Attention`. Other columns of ids have an
            embedding of their own, and are averaged.

    Attributes:
        width: The number of values for each sample.

    Raises:
        UserError: If an input is not one of the columns, or if `attention` names columns that don't fit.
    """

    mean: Tensor
    std: Tensor
    values: Tensor

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, Any]],
        inputs: Sequence[str],
        *,
        dimensions: int | None = None,
        sparse: bool = False,
        attention: Mapping[str, str] | None = None,
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
        self.register_buffer("values", torch.empty(0), persistent=False)  # has the data type of the vectors
        self.vocabularies: dict[str, list[str] | int] = {
            name: column["size"] if "size" in column else list(column["vocabulary"])
            for name, column in chosen.items()
            if column["kind"] != "number"
        }
        self.lists = {name for name, column in chosen.items() if column["kind"] == "ids"}
        self.attention = dict(attention or {})
        self._check_attention()
        sizes = {n: 1 + (each if isinstance(each, int) else len(each)) for n, each in self.vocabularies.items()}
        widths = {name: dimensions or _dimensions(sizes[self.attention.get(name, name)]) for name in sizes}
        self.embeddings = nn.ModuleList(self._embedding(n, sizes[n], widths[n], sparse=sparse) for n in sizes)
        for embedding in self.embeddings:
            if isinstance(embedding, nn.Embedding | nn.EmbeddingBag):
                # Small values, as in fastai, so that rare categories have little influence.
                nn.init.normal_(embedding.weight, std=0.01)
                nn.init.zeros_(embedding.weight.detach()[0])
        checks: Any = torch.sparse.check_sparse_tensor_invariants
        if sparse and not checks.is_enabled():
            checks.disable()  # off by default, but torch warns unless they are disabled explicitly
        self.width = 2 * len(scaled) + sum(widths.values())

    def _embedding(self, name: str, size: int, width: int, *, sparse: bool) -> nn.Module:
        """Returns the module that embeds the column, or that pools lists of ids by attention."""
        if name in self.attention:
            return Attention(width)
        if name in self.lists:
            return nn.EmbeddingBag(size, width, sparse=sparse, mode="mean", padding_idx=0)
        return nn.Embedding(size, width, sparse=sparse)

    def _check_attention(self) -> None:
        """Checks that each name in `attention` is a column of ids, with a category that has the same ids."""
        for name, candidate in self.attention.items():
            size, same = self.vocabularies.get(name), self.vocabularies.get(candidate)
            if name not in self.lists or candidate in self.lists or size is None or size != same:
                raise UserError(
                    f"model.trunk.attention: {name}: {candidate} doesn't fit; it must be a column of lists of ids, and "
                    "a category of the same ids, both in model.inputs"
                )

    def forward(self, *columns: Any) -> Tensor:
        """Returns the standardised numbers and the embeddings, (N, width).

        Args:
            columns: For each input, the field of the data, (N,), or a list of N raw values: numbers or texts, with None
                for missing values. For lists of ids (N, length), or N lists of raw values.

        Raises:
            UserError: If the number or the type of the columns is wrong, or if a value isn't a number.
        """
        if len(columns) != len(self.inputs):
            raise UserError(f"the trunk got {len(columns)} columns, but model.inputs is {', '.join(self.inputs)}")
        by_name = dict(zip(self.inputs, columns, strict=True))
        raw = [self._tensor(name, column) for name, column in by_name.items() if name not in self.vocabularies]
        parts: list[Tensor] = []
        if raw:
            # The mean is subtracted in float64, since large numbers, such as times, differ only in the last digits.
            values = ((torch.stack(raw, 1).double() - self.mean) / self.std).to(self.values.dtype)
            missing = values.isnan()
            parts += [values.masked_fill(missing, 0), missing.to(values.dtype)]
        embeddings = dict(zip(self.vocabularies, self.embeddings, strict=True))
        ids = {name: self._tensor(name, by_name[name]) for name in embeddings}
        for name, embedding in embeddings.items():
            if name in self.attention:
                candidate = self.attention[name]
                table = embeddings[candidate]
                parts.append(embedding(table(ids[name]), table(ids[candidate]), ids[name] != 0))
            else:
                parts.append(embedding(ids[name]))
        return torch.cat(parts, 1)

    def _tensor(self, name: str, column: Any) -> Tensor:
        """Returns the column as numbers or codes, on the model's device."""
        if not isinstance(column, Tensor):
            vocabulary = self.vocabularies.get(name)
            if name in self.lists and vocabulary is not None:
                lists = [codes(each or [None], vocabulary) for each in column]  # 0 for an empty list
                return nn.utils.rnn.pad_sequence(lists, batch_first=True).to(self.mean.device)
            values = numbers(column, name) if vocabulary is None else codes(column, vocabulary)
            return values.to(self.mean.device)
        if column.is_floating_point() == (name in self.vocabularies):
            raise UserError(f"'{name}' is a tensor of {column.dtype}; numbers must be floats, categories integers")
        return column.to(self.mean.device)


class Table(Columns):
    """A multilayer perceptron from columns of numbers and categories to features (N, num_features).

    Args:
        columns, inputs, dimensions, sparse, attention: See `Columns`, also for the errors raised.
        num_features: The number of features.
        hidden: The widths of the hidden layers.
        dropout: The dropout probability of each layer's outputs.
    """

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
        attention: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(columns, inputs, dimensions=dimensions, sparse=sparse, attention=attention)
        self.num_features = num_features
        self.layers = perceptron([self.width, *hidden, num_features], dropout=dropout)

    def forward(self, *columns: Any) -> Tensor:
        """Computes features (N, num_features), all at least 0; arguments and errors are those of `Columns.forward`."""
        features: Tensor = self.layers(super().forward(*columns))
        return features

    def stages(self) -> list[nn.Module]:
        """Returns the columns as the first stage, and a stage for each layer; see `mtl.trunks.stages`."""
        first = Columns.__new__(Columns)  # this object without the layers, with the same embeddings and buffers
        first.__dict__.update(self.__dict__, _modules={"embeddings": self.embeddings})
        layers = list(self.layers)
        return [first, *(nn.Sequential(*layers[start : start + 3]) for start in range(0, len(layers), 3))]


def _dimensions(rows: int) -> int:
    """Returns the number of dimensions of an embedding with this number of rows."""
    return min(600, round(1.6 * math.pow(rows, 0.56)))
