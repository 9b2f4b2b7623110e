"""Batches: dicts of fields, which are tensors with the sample as first dimension, lists, or nests of these."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mtl.errors import UserError

Batch = Mapping[str, Any]


def field(batch: Batch, name: str, where: str) -> Any:
    """The batch's field of that name.

    Raises:
        UserError: for one that isn't in it; `where` says who asks.
    """
    if name not in batch:
        raise UserError(f"{where} '{name}' not in batch; the dataset gives: {', '.join(map(str, batch))}")
    return batch[name]


def num_samples(batch: Batch) -> int:
    """How many samples a batch has.

    It is the first dimension of its tensors; where there are none the length of its lists.
    """
    if batch and all(isinstance(each, Mapping) for each in batch.values()):
        return sum(num_samples(each) for each in {id(each): each for each in batch.values()}.values())
    return max(
        _lengths(batch), default=max((len(each) for each in batch.values() if isinstance(each, list)), default=1)
    )


def _lengths(value: Any) -> Iterator[int]:
    """Of the tensors in a nest; a list may be one of samples, and says nothing."""
    if isinstance(value, Tensor) and value.ndim:
        yield len(value)
    elif isinstance(value, Mapping | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _lengths(each)


def describe(value: Any) -> str:
    """Shapes of a nest of tensors, for messages."""
    shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in tree_leaves(value)]
    return f"of shape {shapes[0]}" if len(shapes) == 1 else f"of shapes {', '.join(map(str, shapes))}"


def cut(batch: Batch, *, size: int | None = None, count: int | None = None) -> list[Batch]:
    """The batch in micro-batches of `size` samples, the last one maybe smaller, or in `count` of nearly equal sizes.

    Tensors and lists whose length is the number of samples are cut; anything else goes into each part as it is.
    """
    total = num_samples(batch)
    if size is None:
        assert count is not None
        bounds = [total * part // min(count, total) for part in range(min(count, total) + 1)]
    else:
        bounds = [*range(0, total, size), total]
    return [part_of(batch, total, start, end) for start, end in pairwise(bounds)]


def part_of(value: Any, total: int, start: int, end: int) -> Any:
    """The samples from `start` to `end` of a batch, or a field, of `total`."""

    def sliced(leaf: Any) -> Any:
        return leaf[start:end] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == total else leaf

    if isinstance(value, list) and len(value) == total:
        return value[start:end]
    if isinstance(value, Mapping):
        return {key: part_of(each, total, start, end) for key, each in value.items()}
    return tree_map(sliced, value)


def chosen(value: Any, total: int, indices: Sequence[int]) -> Any:
    """The samples with these numbers of a field, or a prediction, of `total` samples."""
    if isinstance(value, list) and len(value) == total:
        return [value[index] for index in indices]
    if isinstance(value, Mapping):
        return {key: chosen(each, total, indices) for key, each in value.items()}
    return tree_map(
        lambda leaf: leaf[list(indices)] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == total else leaf,
        value,
    )


def joined(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The counterpart of `cut`: micro-batches of these sizes, or predictions for them, in one."""
    first = parts[0]
    if isinstance(first, Tensor):
        whole = first.ndim and all(len(part) == size for part, size in zip(parts, sizes, strict=True))
        return torch.cat(list(parts)) if whole else first
    if isinstance(first, Mapping):
        return {key: joined([part[key] for part in parts], sizes) for key in first}
    if isinstance(first, list) and all(len(part) == size for part, size in zip(parts, sizes, strict=True)):
        return [each for part in parts for each in part]
    if isinstance(first, list | tuple):
        return type(first)(joined(each, sizes) for each in zip(*parts, strict=True))
    return first
