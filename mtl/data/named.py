"""Data sets that name the values in the samples of existing data sets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from mtl.data.fields import Splits
from mtl.data.lanes import length_of
from mtl.errors import UserError

Names = Sequence[str] | Mapping[str, Any]


class Named(Dataset[dict[str, Any]]):
    """A data set of dicts of fields, made from a data set of tuples or dicts.

    Args:
        dataset: A map-style data set.
        fields: The names of a tuple's values, in order; or a mapping from field names to the keys of a dict or the
            positions in a tuple, which selects only the named values.

    Raises:
        UserError: If a sample doesn't have the named values.
    """

    def __init__(self, dataset: Any, fields: Names) -> None:
        self.dataset = dataset
        self.fields = _checked(fields)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _named(self.dataset[index], self.fields, type(self.dataset).__name__)


class Stream(IterableDataset[Any]):
    """An iterable data set with a length, or with other names of the fields.

    It has the state, the shards and the method `set_epoch` of the original data set, if that has them.

    Args:
        dataset: An iterable that begins anew with each call of `iter`.
        length: The number of samples in an epoch; None if it is unknown.
        fields: The names of the samples' values, if the samples aren't dicts of fields already; see `Named`.

    Raises:
        UserError: If a sample doesn't have the named values.
    """

    def __init__(self, dataset: Iterable[Any], length: int | None, fields: Names | None = None) -> None:
        self.dataset = dataset
        self.length = length
        self.fields = fields if fields is None else _checked(fields)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"{type(self.dataset).__name__} has no length")
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for sample in self.dataset:
            yield sample if self.fields is None else _named(sample, self.fields, type(self.dataset).__name__)

    def __getattr__(self, name: str) -> Any:
        if name in ("num_shards", "set_epoch", "state_dict", "load_state_dict"):
            return getattr(self.dataset, name)
        if name == "shard" and hasattr(self.dataset, "shard"):
            return self._shard
        raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")

    def _shard(self, num_shards: int, index: int) -> "Stream":
        part: Any = self.dataset
        return Stream(part.shard(num_shards=num_shards, index=index), None, self.fields)


def datasets(
    train: Any,
    val: Any = None,
    test: Any = None,
    *,
    fields: Names | None = None,
    epoch: int | None = None,
    readers: Mapping[str, int] | None = None,
) -> Splits:
    """Returns the splits of existing data sets; see `Splits`.

    Args:
        train, val, test: The data sets, map-style or iterable.
        fields: The names of the samples' values, if the samples aren't dicts of fields already; see `Named`.
        epoch, readers: See `Splits`.
    """

    def named(dataset: Any) -> Any:
        if fields is None or dataset is None:
            return dataset
        if isinstance(dataset, IterableDataset):
            return Stream(dataset, length_of(dataset), fields)
        return Named(dataset, fields)

    name = type(train).__name__
    return Splits(named(train), named(val), named(test), name=name, epoch=epoch, readers=readers)


def _checked(fields: Names) -> Names:
    if not isinstance(fields, list | tuple | Mapping) or not fields:
        raise UserError(
            f"data.fields is {fields!r}; it must be a list of names, such as [image, digit], or a mapping from "
            "names to the names in the data set, such as {image: img, digit: label}"
        )
    return fields


def _named(sample: Any, fields: Names, kind: str) -> dict[str, Any]:
    description = f"a sample of {kind} is a {type(sample).__name__}"
    if isinstance(sample, Mapping):
        description += f" with {', '.join(map(str, sample))}"
    elif isinstance(sample, list | tuple):
        description += f" of {len(sample)}"
    if not isinstance(fields, Mapping):
        if not isinstance(sample, list | tuple) or len(sample) != len(fields):
            raise UserError(
                f"data.fields names the {len(fields)} values of a tuple, {', '.join(fields)}; {description}"
            )
        return dict(zip(fields, sample, strict=True))
    values = {}
    for name, key in fields.items():
        try:
            values[name] = sample[key]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"data.fields: there is no {key!r}; {description}") from None
    return values
