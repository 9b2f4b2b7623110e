"""Data sets that name the values in the samples of existing data sets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from mtl.data.fields import Splits
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
    """An iterable data set with a length.

    Args:
        dataset: An iterable that begins anew with each call of `iter`.
        length: The number of samples in an epoch.
        fields: The names of the samples' values, if the samples aren't dicts of fields already; see `Named`.

    Raises:
        UserError: If a sample doesn't have the named values.
    """

    def __init__(self, dataset: Iterable[Any], length: int, fields: Names | None = None) -> None:
        self.dataset = dataset
        self.length = length
        self.fields = fields if fields is None else _checked(fields)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for sample in self.dataset:
            yield sample if self.fields is None else _named(sample, self.fields, type(self.dataset).__name__)


def datasets(train: Any, val: Any = None, test: Any = None, *, fields: Names | None = None) -> Splits:
    """Returns the splits of existing data sets; see `Splits`.

    Args:
        train, val, test: The data sets: map-style, or iterable with a length.
        fields: The names of the samples' values, if the samples aren't dicts of fields already; see `Named`.
    """

    def named(dataset: Any) -> Any:
        if fields is None or dataset is None:
            return dataset
        if isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
            return Stream(dataset, len(dataset), fields)
        return Named(dataset, fields)

    return Splits(named(train), named(val), named(test), name=type(train).__name__)


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
