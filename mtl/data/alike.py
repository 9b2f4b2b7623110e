"""Checks that the samples of a batch have the same fields."""

from collections.abc import Iterator, Mapping
from typing import Any

from mtl.errors import UserError


class Alike:
    """Compares the fields of each sample with those of the first sample.

    Without this check, PyTorch's collate function would fail on different fields, or silently leave some of them out.
    """

    def __init__(self) -> None:
        self._first: tuple[int, frozenset[str]] | None = None

    def __call__(self, sample: Any, index: int) -> Any:
        """Returns the sample unchanged.

        Raises:
            UserError: If the sample has other fields than the first sample.
        """
        names = frozenset(_names(sample))
        first, fields = self._first = self._first or (index, names)
        if names != fields:
            differs = [
                f"{word} {', '.join(repr(name) for name in sorted(which))}"
                for word, which in (("lacks", fields - names), ("has", names - fields))
                if which
            ]
            raise UserError(
                f"it {' and '.join(differs)}, unlike sample {first}; all samples need the same fields, or a "
                "data.collate that makes a batch of them"
            )
        return sample


def _names(sample: Any, before: str = "") -> Iterator[str]:
    """Yields the names of a sample's fields; a field of a nested dict is named with dots, as in `outer.inner`."""
    if isinstance(sample, Mapping):
        for key, value in sample.items():
            yield f"{before}{key}"
            if isinstance(value, Mapping):
                yield from _names(value, f"{before}{key}.")
