"""What is spread unevenly over the samples of a step: what a loss may leave out, or count, by a rule of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves_with_path

from mtl.batch import Batch, num_samples
from mtl.errors import UserError
from mtl.labels import label_fields
from mtl.task import Task

VALUES = 64  # different integers in a field, up to which each of them is watched


def uneven_values(task: Task, batches: Sequence[Batch]) -> set[str]:
    """What is spread unevenly over a step's samples in the fields that the task's loss may look at.

    An integer or a boolean, if a field has few different ones, else values below 0, 0, 255 and the length of the
    padding at either end; NaN and 0 among floats; and whether micro-batches have different widths.
    """
    fields: dict[str, list[Tensor]] = {}
    found = set()
    for batch in batches:
        try:
            total = num_samples(batch, [task.target])
        except UserError:  # then a `count` has to say, see mean_tests.py
            return {"fields of different lengths"}
        for path, leaf in tree_leaves_with_path(label_fields(task, batch) if task.objective is None else dict(batch)):
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == total:
                fields.setdefault(".".join(str(getattr(key, "key", key)) for key in path), []).append(leaf)
            elif isinstance(leaf, Tensor) and leaf.ndim:
                found.add("fields of different lengths")
    counts: dict[str, Tensor] = {}
    for name, leaves in fields.items():
        if len({leaf.shape[1:] for leaf in leaves}) > 1:
            found.add(f"the width of {name}")
        kinds = None if leaves[0].is_floating_point() else torch.unique(torch.cat([leaf.flatten() for leaf in leaves]))
        for leaf in leaves:
            for value, number in _numbers_of(leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1), kinds).items():
                key = f"{value} in {name}"
                counts[key] = torch.cat([counts[key], number]) if key in counts else number
    if counts:
        is_uneven = torch.stack([(number != number[0]).any() for number in counts.values()]).tolist()
        found |= {key for key, uneven in zip(counts, is_uneven, strict=True) if uneven}
    return found


def _numbers_of(leaf: Tensor, kinds: Tensor | None) -> dict[str, Tensor]:
    """By value, how often each sample (N, M) has it, (N,)."""
    if kinds is None:
        return {"nan": leaf.isnan().sum(1), "0": (leaf == 0).sum(1)}
    if len(kinds) <= VALUES:
        return {str(value): (leaf == value).sum(1) for value in kinds.tolist()}
    numbers = {"a value below 0": (leaf < 0).sum(1), "0": (leaf == 0).sum(1), "255": (leaf == 255).sum(1)}
    last = leaf.flip(1)
    for end, each in (("first", leaf), ("last", last)):
        numbers[f"repetition of the {end}"] = (each == each[:, :1]).long().cumprod(1).sum(1)
    return numbers
