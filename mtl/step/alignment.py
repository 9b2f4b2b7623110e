"""Micro-batches of a model whose parameters are divided over the processes: each process runs the same passes.

A module gathers its parameters from all processes when it runs, so that no process can leave out a pass. Where a
process has no labels for a task, or fewer micro-batches than another one, it runs the pass with a loss of zero.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mtl.batch import Batch
from mtl.distributed.collectives import gather_numbers, gather_objects, mark
from mtl.errors import UserError
from mtl.task import Task

# The arguments of a task whose loss is replaced by a function of the prediction alone.
STAND_IN: dict[str, Any] = {"whole_batch": False, "missing": False, "mask": None, "mean_over": None}


def align(batches: Sequence[Batch], members: Sequence[list[int]]) -> tuple[list[Batch], list[list[int]], list[bool]]:
    """Repeats micro-batches until all processes have equally many for the same tasks.

    Args:
        batches: The micro-batches of this process.
        members: By micro-batch, the indices of its tasks.

    Returns:
        Micro-batches, the indices of their tasks, and whether each is a repetition, which must not count.

    Raises:
        UserError: In all processes, if one has no samples for tasks for which another one has some.
    """
    groups: dict[tuple[int, ...], list[Batch]] = {}
    for batch, member in zip(batches, members, strict=True):
        groups.setdefault(tuple(member), []).append(batch)
    ours = {group: len(pieces) for group, pieces in groups.items()}
    marks = gather_numbers([mark(ours)])
    counts = [ours] if all(each == marks[0] for each in marks) else gather_objects(ours)  # objects are pickled
    if any(set(each) != set(counts[0]) for each in counts):
        raise UserError(
            "with sharded parameters or synchronised batch norm each process needs samples of each source in each "
            "step. Take larger batches, fewer processes, or distributed=ddp and model.sync_batchnorm=false"
        )
    aligned: list[Batch] = []
    tasks: list[list[int]] = []
    repeated: list[bool] = []
    for group in counts[0]:
        pieces = groups[group]
        missing = max(each[group] for each in counts) - len(pieces)
        aligned += pieces + pieces[-1:] * missing
        tasks += [list(group)] * (len(pieces) + missing)
        repeated += [False] * len(pieces) + [True] * missing
    return aligned, tasks, repeated


class StandIn:
    """The base class of stand-ins for losses, which are called with all that a task's forward pass returns."""


def silenced(task: Task) -> Task:
    """Returns a copy of a task whose loss is zero, with zeros as gradients for everything that the task reaches."""
    return replace(task, **STAND_IN, loss=_Zero())


class _Zero(StandIn):
    def __call__(self, prediction: Any, target: Any) -> Tensor:
        floating = [leaf for leaf in tree_leaves(prediction) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return torch.stack(
            [torch.where(torch.zeros_like(leaf, dtype=torch.bool), leaf, 0.0).sum() for leaf in floating]
        ).sum()
