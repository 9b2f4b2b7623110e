"""Data sets as named fields, and the splits of a problem's data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from mtl.data.lanes import READERS, is_stateful, length_of
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
    """Returns the first sample of the data set; one with a state, as `Lane` uses it, keeps its state."""
    if not isinstance(dataset, IterableDataset):
        return dataset[0]
    stateful: Any = dataset if is_stateful(dataset) else None
    state = None if stateful is None else stateful.state_dict()
    try:
        return next(iter(dataset))
    finally:
        if stateful is not None:
            stateful.load_state_dict(state)


@dataclass
class Splits:
    """The splits of a problem's data: training, and optionally validation and test.

    Args:
        train, val, test: Map-style or iterable data sets, whose samples are dicts of fields.
        name: A description of the data, which is logged at the start of a run.
        facts: What a model may need to know about the data, as plain values: vocabularies, means, numbers of classes.
            The value `from_data` in a model's config is replaced with the fact of the same key.
        warnings: Possible problems of the data, one sentence each; they are logged at the start of training.
        epoch: The number of steps in an epoch if the training data are iterable and have no length, or if they shall go
            on from epoch to epoch in any case.
        readers: The largest numbers of processes, and of worker processes in each, that can share the shards of
            iterable data: a mapping with `processes` and `workers`. The batches depend on these numbers, and not on the
            actual numbers of processes.

    Raises:
        UserError: If a split has no samples, if a sample isn't a dict, or if `epoch` is needed or isn't possible.
    """

    train: Dataset[Any]
    val: Dataset[Any] | None = None
    test: Dataset[Any] | None = None
    name: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    epoch: int | None = None
    readers: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        self.facts = {str(key): _plain(value, str(key)) for key, value in self.facts.items()}
        if self.train is None:
            raise UserError("data.train is null; a problem needs training data")
        for split, dataset in self.items():
            kind = type(dataset).__name__
            length = length_of(dataset)
            if not isinstance(dataset, IterableDataset) and (length is None or not hasattr(dataset, "__getitem__")):
                raise UserError(f"data.{split}: {kind} is not a map-style dataset; it needs __len__ and __getitem__")
            if length == 0:
                raise UserError(f"data.{split}: {kind} has no samples")
            try:
                sample = first(dataset)
            except StopIteration:
                raise UserError(f"data.{split}: {kind} has no samples") from None
            except UserError as error:
                raise UserError(f"data.{split}: {text_of(error)}") from error
            except FOREIGN as error:
                raise UserError(f"data.{split}: sample 0 of {kind} fails: {describe_error(error)}") from error
            if not isinstance(sample, Mapping):
                raise UserError(
                    f"data.{split}: a sample of {kind} is a {type(sample).__name__}; "
                    'it must be a dict of fields, such as {"image": image, "digit": 3}'
                )

        self._check_epoch()

    def _check_epoch(self) -> None:
        kind = type(self.train).__name__
        if self.epoch is None and length_of(self.train) is None:
            raise UserError(
                f"data.train: {kind} has no length; set data.epoch to the number of steps in an epoch, after which the "
                "next epoch continues with the samples that follow"
            )
        if self.epoch is not None and not isinstance(self.train, IterableDataset):
            raise UserError(f"data.epoch is for iterable data sets; an epoch of {kind} is a pass over its samples")
        if self.epoch is not None and (type(self.epoch) is not int or self.epoch < 1):
            raise UserError(f"data.epoch is {self.epoch!r}; it must be a whole number of steps of at least 1")
        readers = READERS if self.readers is None else self.readers
        right = isinstance(readers, Mapping) and readers.keys() <= READERS.keys()
        if not right or any(type(number) is not int or number < 1 for number in readers.values()):
            raise UserError(
                f"data.readers is {readers!r}; it must have whole numbers of at least 1, such as {{processes: 8, "
                "workers: 4}"
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
        sizes = ", ".join(f"{_size(dataset)} {split}" for split, dataset in self.items() if only in (None, split))
        return f"{self.name or type(self.train).__name__}: {sizes}; fields: {', '.join(self.fields())}"


def _size(dataset: Any) -> str:
    """Describes the number of samples of a data set, or of its shards if that is all that is known."""
    length = length_of(dataset)
    if length is not None:
        return f"{length:,}"
    shards = getattr(dataset, "num_shards", None)
    return "an unknown number of" if shards is None else f"{shards:,} shards of"
