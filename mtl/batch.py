"""Batches: dicts of fields, which are tensors with the sample as first dimension, lists, or nested dicts and tuples."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mtl.errors import UserError

Batch = Mapping[str, Any]


def field(batch: Batch, name: str, where: str) -> Any:
    """Returns a field of the batch.

    Raises:
        UserError: If the batch has no such field; the message begins with `where`.
    """
    if name not in batch:
        raise UserError(f"{where} '{name}' not in batch; the dataset gives: {', '.join(map(str, batch))}")
    return batch[name]


def num_samples(batch: Batch, targets: Iterable[str] = ()) -> int:
    """Returns the number of samples in a batch.

    This is the length of the targets or, if none of these is in the batch, the common length of all fields. The longest
    tensor doesn't decide, since flat fields such as the ids of bags or the edges of graphs have other lengths.

    Args:
        batch: The batch.
        targets: The names of fields that have one entry for each sample.

    Raises:
        UserError: If the fields have different lengths.
    """
    lengths_by_name = {name: _length(batch[name]) for name in targets if name in batch}
    lengths_by_name = {name: length for name, length in lengths_by_name.items() if length is not None}
    if not lengths_by_name:
        every = {name: _length(value) for name, value in batch.items()}
        lengths_by_name = {name: length for name, length in every.items() if length is not None}
    lengths = {length for length in lengths_by_name.values() if length is not None}
    if len(lengths) > 1:
        listed = ", ".join(f"'{name}' {length}" for name, length in lengths_by_name.items())
        raise UserError(
            f"the number of samples in a batch isn't known, since its fields have different lengths: {listed}. Give "
            "the step a list of micro-batches, or let the loader collate each micro-batch separately; for a task that "
            "is a function of model and batch, tasks.NAME.count gives the denominator of the mean"
        )
    return lengths.pop() if lengths else 1


def _length(value: Any) -> int | None:
    """Returns the length of a tensor or list, or the common length of nested tensors; None if there is none."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    if isinstance(value, Mapping | tuple):
        each = {_length(one) for one in (value.values() if isinstance(value, Mapping) else value)} - {None}
        if len(each) == 1:
            return each.pop()
    return len(value) if isinstance(value, list) else None


def describe(value: Any) -> str:
    """Describes the shapes of nested tensors, for messages."""
    shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in tree_leaves(value)]
    return f"of shape {shapes[0]}" if len(shapes) == 1 else f"of shapes {', '.join(map(str, shapes))}"


def bounds(total: int, *, size: int | None = None, count: int | None = None) -> list[tuple[int, int]]:
    """Returns where micro-batches of `size` samples, or `count` micro-batches, begin and end among `total` samples."""
    if size is None:
        assert count is not None
        count = min(count, total)
        return list(pairwise(total * number // count for number in range(count + 1)))
    return list(pairwise([*range(0, total, size), total]))


def cut(batch: Batch, total: int | None = None, *, size: int | None = None, count: int | None = None) -> list[Batch]:
    """Divides a batch into micro-batches.

    Tensors are divided along the first dimension; lists, and tuples that don't hold such tensors, have one entry for
    each sample. Numbers, texts and 0-dim tensors are part of every micro-batch.

    Args:
        batch: The batch.
        total: The number of samples in the batch; None for the common length of all fields.
        size: The number of samples in a micro-batch; the last one may have fewer.
        count: The number of micro-batches, of nearly equal sizes, instead of `size`.

    Raises:
        UserError: If the length of a field isn't the number of samples.
    """
    total = num_samples(batch) if total is None else total
    where = bounds(total, size=size, count=count)
    return [batch] if len(where) == 1 else [take(batch, total, slice(*each)) for each in where]


def take(batch: Batch, total: int, which: slice | list[int]) -> dict[str, Any]:
    """Returns a batch with the samples `which` of a batch of `total` samples.

    Raises:
        UserError: If the length of a field isn't the number of samples.
    """
    return {name: take_field(value, total, which, str(name)) for name, value in batch.items()}


def take_field(value: Any, total: int, which: slice | list[int], name: str) -> Any:
    """Returns the samples `which` of one field, see `take`."""
    if isinstance(value, Tensor):
        if value.ndim and len(value) != total:
            raise _not_by_samples(name, f"a tensor {describe(value)}", total)
        return value[which] if value.ndim else value
    if isinstance(value, Mapping):
        return {key: take_field(each, total, which, f"{name}.{key}") for key, each in value.items()}
    if not isinstance(value, list | tuple) or not value:
        return value
    nest = all(_length(each) == total for each in value)
    if len(value) == total and (isinstance(value, list) or not nest):
        chosen = value[which] if isinstance(which, slice) else [value[index] for index in which]
        return type(value)(chosen)
    if nest:
        each = [take_field(one, total, which, f"{name}[{index}]") for index, one in enumerate(value)]
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    if isinstance(value, tuple) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
        return value
    raise _not_by_samples(name, f"a {type(value).__name__} of length {len(value)}", total)


def _not_by_samples(name: str, what: str, total: int) -> UserError:
    return UserError(
        f"the batch can't be cut into micro-batches: its field '{name}' is {what}, and the batch has {total} samples. "
        "Use a data set that returns single samples, so that the loader collates each micro-batch separately, or give "
        "the step a list of micro-batches"
    )


def joined(parts: Sequence[Any], sizes: Sequence[int], name: str = "prediction") -> Any:
    """Joins the fields, or the predictions, of micro-batches; the inverse of `cut`.

    Args:
        parts: The fields or predictions, one for each micro-batch.
        sizes: The numbers of samples in the micro-batches.
        name: The name of the field, for messages.

    Raises:
        UserError: If the shapes of tensors differ in more than the first dimension.
    """
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim:
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(dict.fromkeys(str(tuple(part.shape)) for part in parts))
            raise UserError(
                f"micro-batches can't be joined to one batch: their field '{name}' has the shapes {shapes}; pad them "
                "to one width"
            )
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {key: joined([part[key] for part in parts], sizes, f"{name}.{key}") for key in first}
    if not isinstance(first, list | tuple):
        return first
    pairs = list(zip(parts, sizes, strict=True))
    nest = all(_length(each) == size for part, size in pairs for each in part)
    if all(len(part) == size for part, size in pairs) and (isinstance(first, list) or not nest):
        return type(first)(each for part in parts for each in part)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(first)):
        return first
    each = [joined(one, sizes, f"{name}[{index}]") for index, one in enumerate(zip(*parts, strict=True))]
    return type(first)(*each) if hasattr(first, "_fields") else type(first)(each)
