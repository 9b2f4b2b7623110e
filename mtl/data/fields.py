"""Data sets as named fields, and the splits of a problem's data."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from mtl.errors import FOREIGN, UserError, describe_error, text_of


class Fields(Dataset[dict[str, Tensor]]):
    """A data set in memory: tensors by name, with the sample as their first dimension.

    Raises:
        UserError: If there are no fields, or if fields have different lengths.
    """

    def __init__(self, fields: Mapping[str, Tensor]) -> None:
        lengths = {name: len(tensor) for name, tensor in fields.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"the fields of a data set must have one length; they have {lengths}")
        self.fields = dict(fields)

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.fields.items()}

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Returns the batch of the samples with these indices, shape (n,), which must be on the fields' device."""
        return {name: tensor.index_select(0, indices) for name, tensor in self.fields.items()}

    def to(self, device: torch.device) -> "Fields":
        """Returns the same data on another device."""
        return Fields({name: tensor.to(device) for name, tensor in self.fields.items()})


def _plain(value: Any, where: str) -> Any:
    """Converts the value to plain types, which a checkpoint can store."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, where) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"the data's fact '{where}' is a {type(value).__name__}; it must consist of numbers, texts, lists and dicts"
    )


def first(dataset: Any) -> Any:
    """Returns the first sample of the data set."""
    return next(iter(dataset)) if isinstance(dataset, IterableDataset) else dataset[0]


@dataclass
class Splits:
    """The splits of a problem's data: training, and optionally validation and test.

    Args:
        train, val, test: Map-style data sets whose samples are dicts of fields, or iterable data sets with a length.
        name: A description of the data, which is logged at the start of a run.
        facts: What a model may need to know about the data, as plain values: vocabularies, means, numbers of classes.
            The value `from_data` in a model's config is replaced with the fact of the same key.
        warnings: Possible problems of the data, one sentence each; they are logged at the start of training.

    Raises:
        UserError: If a split has no length or no samples, or if a sample isn't a dict.
    """

    train: Dataset[Any]
    val: Dataset[Any] | None = None
    test: Dataset[Any] | None = None
    name: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.facts = {str(key): _plain(value, str(key)) for key, value in self.facts.items()}
        if self.train is None:
            raise UserError("data.train is null; a problem needs training data")
        for split, dataset in self.items():
            kind = type(dataset).__name__
            if isinstance(dataset, IterableDataset):
                if not isinstance(dataset, Sized):
                    raise UserError(
                        f"data.{split}: {kind} has no length, which is the number of samples in an epoch; define "
                        "__len__, or wrap it: {_target_: mtl.data.Stream, dataset: …, length: …}"
                    )
            elif not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
                raise UserError(f"data.{split}: {kind} is not a map-style dataset; it needs __len__ and __getitem__")
            if not len(dataset):
                raise UserError(f"data.{split}: {kind} has no samples")
            try:
                sample = first(dataset)
            except UserError as error:
                raise UserError(f"data.{split}: {text_of(error)}") from error
            except FOREIGN as error:
                raise UserError(f"data.{split}: sample 0 of {kind} fails: {describe_error(error)}") from error
            if not isinstance(sample, Mapping):
                raise UserError(
                    f"data.{split}: a sample of {kind} is a {type(sample).__name__}; "
                    'it must be a dict of fields, such as {"image": image, "digit": 3}'
                )

    def items(self) -> list[tuple[str, Any]]:
        """Returns the available splits as pairs of name and data set."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return [(split, dataset) for split, dataset in named.items() if dataset is not None]

    def fact(self, key: str, source: str | None) -> Any:
        """Returns the fact about the data with the given key.

        Raises:
            UserError: If there is no such fact.
        """
        if key not in self.facts:
            raise UserError(f"the data have no fact '{key}'; they have: {', '.join(self.facts) or 'none'}")
        return self.facts[key]

    def of_task(self, task: str, source: str | None) -> "Splits":
        """Returns the splits themselves, because all tasks share one source.

        Raises:
            UserError: If the task names a source.
        """
        if source is not None:
            raise UserError(
                f"tasks.{task}.source is '{source}', but the data have only one source; for several sources, select "
                "`override /data: sources`"
            )
        return self

    def fields(self) -> list[str]:
        """Returns the names of the fields of a training sample."""
        return list(first(self.train))

    def summary(self, only: str | None = None) -> str:
        """Describes the data in one line: name, size of each split (or only of the split `only`), and fields."""
        sizes = ", ".join(f"{len(dataset):,} {split}" for split, dataset in self.items() if only in (None, split))
        return f"{self.name or type(self.train).__name__}: {sizes}; fields: {', '.join(self.fields())}"
