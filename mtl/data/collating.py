"""Collates numbered samples into batches, and explains why samples can't be collated."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mtl.batch import bounds
from mtl.errors import FOREIGN, UserError, describe_error, text_of

Numbered = tuple[int, Any]  # the number of a sample, and the sample
SHOWN = 5  # the most sample numbers that a message lists


class Numbers(Dataset[Numbered]):
    """A map-style data set that yields each sample together with the sample's number."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Numbered:
        return index, self._dataset[index]


class Collate:
    """Collates samples into a batch or a list of micro-batches. Instances can be pickled for worker processes.

    Args:
        collate: A function from a list of samples to a batch; None for PyTorch's default.
        micro: How the samples are divided into micro-batches, see `mtl.batch.bounds`; None for whole batches.
        share: The samples that belong to this process.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any] | None,
        micro: Mapping[str, int | None] | None,
        share: slice = slice(None),  # immutable
    ) -> None:
        self._collate = collate
        self._micro = micro
        self._share = share

    def __call__(self, samples: Sequence[Numbered]) -> Any:
        """Returns the batch, or the list of micro-batches; without samples, these have no fields."""
        samples = samples[self._share]
        if not samples:
            return {} if self._micro is None else [{}]
        if self._micro is None:
            return self._batch(samples)
        return [self._batch(samples[start:end]) for start, end in bounds(len(samples), **self._micro)]

    def _batch(self, samples: Sequence[Numbered]) -> Any:
        plain = [sample for _, sample in samples]
        try:
            return default_collate(plain) if self._collate is None else self._collate(plain)
        except FOREIGN as error:
            of = _shortened([number for number, _ in samples])
            text = text_of(error) if isinstance(error, UserError) else describe_error(error)
            if self._collate is not None:
                raise UserError(f"data.collate fails on {of}: {text}") from error
            raise UserError(unlike(samples) or f"{of} can't be collated: {text}") from error


def unlike(samples: Sequence[Numbered]) -> str:
    """Describes the fields whose sizes or types differ between the samples; returns an empty text if none differ."""
    fields: dict[str, dict[str, list[int]]] = {}
    for number, sample in samples:
        for name, kind in _leaves(sample):
            fields.setdefault(name, {}).setdefault(kind, []).append(number)
    differences = []
    for name, kinds in fields.items():
        if len(kinds) > 1:
            often_first = sorted(kinds.items(), key=lambda item: -len(item[1]))
            each = ", ".join(f"{kind} in {_shortened(numbers)}" for kind, numbers in often_first[:3])
            differences.append(f"field '{name}' is {each}{', …' if len(kinds) > 3 else ''}")
    if not differences:
        return ""
    return f"{'; '.join(differences)}. Samples of unequal size need a data.collate that makes a batch of them"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the name of each field of a sample, with a description of the field's value."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Tensor | np.ndarray):
        yield name, f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    elif isinstance(value, list | tuple):
        yield name, f"a {type(value).__name__} of length {len(value)}"
        for index, each in enumerate(value):
            yield from _leaves(each, f"{name}[{index}]")
    else:
        yield name, f"of type {type(value).__name__}"


def _shortened(numbers: Sequence[int]) -> str:
    word = "sample" if len(numbers) == 1 else "samples"
    return f"{word} {', '.join(map(str, numbers[:SHOWN]))}{', …' if len(numbers) > SHOWN else ''}"


def as_dicts(value: Any) -> Any:
    """Replaces mappings, such as the ones that tokenizers return, with dicts, because torch only traverses dicts."""
    return {key: as_dicts(each) for key, each in value.items()} if isinstance(value, Mapping) else value
