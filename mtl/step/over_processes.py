"""Predictions of all processes, for losses that need those for the whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mtl.batch import Batch, joined, take, take_field
from mtl.distributed.collectives import gather_objects, rank


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
    values = _moved((prediction, dict(batch)), torch.device("cpu")) if places else None
    gathered = gather_objects((list(places), values, int(torch.randint(2**62, ()))))
    parts = [(theirs, each) for theirs, each, _ in gathered]
    seed = gathered[0][2]
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


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf, values)
