"""Any map-style data sets, their samples' values named."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from mtl.data.fields import Splits
from mtl.errors import UserError


class Named(Dataset[dict[str, Any]]):
    """A data set whose samples are dicts of fields, from one whose samples are tuples or dicts.

    Args:
        dataset: map-style.
        fields: the names of a tuple's values, by position; or by the field's name a dict's key or a tuple's position,
            and only what is named is taken.

    Raises:
        UserError: for a sample that has other values.
    """

    def __init__(self, dataset: Any, fields: Sequence[str] | Mapping[str, Any]) -> None:
        if not isinstance(fields, list | tuple | Mapping) or not fields:
            raise UserError(
                f"data.fields is {fields!r}; it must be a list of names, such as [image, digit], or a mapping from "
                "names to what they are called in the dataset, such as {image: img, digit: label}"
            )
        self.dataset = dataset
        self.fields = fields

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        if isinstance(self.fields, Mapping):
            return {name: self._value(sample, key) for name, key in self.fields.items()}
        if not isinstance(sample, list | tuple) or len(sample) != len(self.fields):
            raise UserError(
                f"data.fields names the {len(self.fields)} values of a tuple, {', '.join(self.fields)}; "
                + self._has(sample)
            )
        return dict(zip(self.fields, sample, strict=True))

    def _value(self, sample: Any, key: Any) -> Any:
        try:
            return sample[key]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"data.fields: a sample has no {key!r}; {self._has(sample)}") from None

    def _has(self, sample: Any) -> str:
        kind = type(self.dataset).__name__
        if isinstance(sample, Mapping):
            return f"one of {kind} is a dict with {', '.join(map(str, sample))}"
        return f"one of {kind} is a {type(sample).__name__}" + (
            f" of {len(sample)}" if hasattr(sample, "__len__") else ""
        )


def datasets(
    train: Any, val: Any = None, test: Any = None, *, fields: Sequence[str] | Mapping[str, Any] | None = None
) -> Splits:
    """Splits of any map-style data sets; see `Splits`.

    Args:
        train, val, test: the data sets.
        fields: names for their samples' values, where these aren't dicts of fields already; see `Named`.
    """
    parts = {"train": train, "val": val, "test": test}
    if fields is not None:
        parts = {split: None if each is None else Named(each, fields) for split, each in parts.items()}
    return Splits(**parts, name=type(train).__name__)
