"""Samples that are to make one batch have the same fields."""

from collections.abc import Iterator, Mapping
from typing import Any

from mtl.errors import UserError


class Alike:
    """Compares each sample's fields with those of the first one: PyTorch would fail on them, or leave some out."""

    def __init__(self) -> None:
        self._first: tuple[int, frozenset[str]] | None = None

    def __call__(self, sample: Any, index: int) -> Any:
        """The sample.

        Raises:
            UserError: for other fields than the first sample's.
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
    """The names of a sample's fields, with dots for those of dicts inside it."""
    if isinstance(sample, Mapping):
        for key, value in sample.items():
            yield f"{before}{key}"
            if isinstance(value, Mapping):
                yield from _names(value, f"{before}{key}.")
