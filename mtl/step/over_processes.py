"""Predictions of all processes, for losses that need those for the whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mtl.batch import Batch, joined, take, take_field
from mtl.distributed.collectives import gather_numbers, gather_objects, gather_rows, mark, rank


@dataclass
class Whole:
    """Predictions and labels of one task for the samples of all processes.

    Attributes:
        prediction: The prediction, in the order of a batch that the processes have taken their shares of; None if no
            process has samples.
        batch: The fields of the labels.
        size: The number of samples.
        ours: The places of this process's samples among all samples.
        is_first: Whether this process is the first that has samples.
        seed: A number that rank 0 has drawn, with which all processes seed the draws of the loss.
    """

    prediction: Any
    batch: Batch
    size: int
    ours: list[int]
    is_first: bool
    seed: int


def gather(prediction: Any, batch: Batch, places: Sequence[int], device: torch.device) -> Whole:
    """Gathers predictions and labels of all processes, which have to call it together.

    Args:
        prediction: The prediction for the samples of this process, without a graph; ignored if there are none.
        batch: The fields of the labels.
        places: The places of the samples in the batch of this process, in ascending order.
        device: The device of the result.
    """
    values = _moved((prediction, dict(batch)), device) if places else None
    parts, seed = _gathered(list(places), values, device)
    keys = [(place, number) for number, (theirs, _) in enumerate(parts) for place in theirs]  # in the order of ranks
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ours = [place for place, index in enumerate(order) if keys[index][1] == rank()]
    some = [(len(theirs), _moved(each, device)) for theirs, each in parts if theirs]
    if not some:
        return Whole(None, {}, 0, [], False, seed)
    sizes = [size for size, _ in some]
    prediction = take_field(joined([each for _, (each, _) in some], sizes), len(order), order, "prediction")
    labels = take(joined([each for _, (_, each) in some], sizes, "batch"), len(order), order)
    first = next(number for number, (theirs, _) in enumerate(parts) if theirs)
    return Whole(prediction, labels, len(order), ours, rank() == first, seed)


def _gathered(places: list[int], values: Any, device: torch.device) -> tuple[list[tuple[list[int], Any]], int]:
    """Returns the places and values of all processes, in the order of their ranks, and a number that rank 0 has drawn.

    Tensors with a row for each sample, of the same kinds in all processes, are sent as the bytes of one tensor. Other
    values are pickled.
    """
    leaves, structure = tree_flatten(values)
    has_rows = bool(places) and all(
        isinstance(each, Tensor) and each.shape[:1] == (len(places),) and each.numel() for each in leaves
    )
    kinds = [(each.dtype, each.shape[1:]) for each in leaves] if has_rows else None
    drawn = int(torch.randint(2**52, ()))  # is exact as a float
    marks = gather_numbers([mark((structure, kinds)), len(places), drawn])
    seed = int(marks[0][2])
    if not has_rows or any(theirs != marks[0][0] for theirs, *_ in marks):
        return gather_objects((places, _moved(values, torch.device("cpu")))), seed
    tensors = [torch.tensor(places, device=device), *leaves]
    columns = [_bytes(each) for each in tensors]
    widths = [each.shape[1] for each in columns]
    counts = [int(count) for _, count, _ in marks]
    parts = []
    for rows in torch.split(gather_rows(torch.cat(columns, dim=1), counts), counts):
        pieces = zip(torch.split(rows, widths, dim=1), tensors, strict=True)
        numbers, *theirs = [_tensor(piece, like) for piece, like in pieces]
        parts.append((numbers.tolist(), tree_unflatten(theirs, structure)))
    return parts, seed


def _bytes(values: Tensor) -> Tensor:
    """Returns a matrix with the bytes of each row of a tensor."""
    rows = values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)
    return rows.contiguous().view(torch.uint8)


def _tensor(rows: Tensor, like: Tensor) -> Tensor:
    """Returns the tensor whose rows have these bytes, with the data type of another one."""
    return rows.clone(memory_format=torch.contiguous_format).view(like.dtype).view(len(rows), *like.shape[1:])


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf, values)
