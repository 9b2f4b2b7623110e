"""Detection of values that are spread unevenly over the samples of a step.

A loss may leave out such values, for instance an ignored class or padding, without declaring it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves_with_path

from mtl.batch import Batch, num_samples
from mtl.errors import UserError
from mtl.labels import label_fields
from mtl.task import Task

VALUES = 64  # the largest number of different integers in a field for which each is counted separately


def uneven_values(task: Task, batches: Sequence[Batch]) -> set[str]:
    """Returns descriptions of the values that are spread unevenly over the samples in the fields that a loss may use.

    If a field has few different integers or booleans, each is considered; else 0, 255, values below 0 and the length of
    the padding at either end. Among floats, NaN and 0 are considered. Different widths of the micro-batches are
    reported, too.
    """
    fields: dict[str, list[Tensor]] = {}
    uneven = set()
    for batch in batches:
        try:
            total = num_samples(batch, [task.target])
        except UserError:  # the task needs a `count`, see mean_tests.py
            return {"fields of different lengths"}
        for path, leaf in tree_leaves_with_path(label_fields(task, batch) if task.objective is None else dict(batch)):
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == total:
                fields.setdefault(".".join(str(getattr(key, "key", key)) for key in path), []).append(leaf)
            elif isinstance(leaf, Tensor) and leaf.ndim:
                uneven.add("fields of different lengths")
    counts: dict[str, Tensor] = {}
    for name, leaves in fields.items():
        if len({leaf.shape[1:] for leaf in leaves}) > 1:
            uneven.add(f"the width of {name}")
        kinds = None if leaves[0].is_floating_point() else torch.unique(torch.cat([leaf.flatten() for leaf in leaves]))
        for leaf in leaves:
            for value, number in _numbers_of(leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1), kinds).items():
                key = f"{value} in {name}"
                counts[key] = torch.cat([counts[key], number]) if key in counts else number
    if counts:
        is_uneven = torch.stack([(number != number[0]).any() for number in counts.values()]).tolist()
        uneven |= {key for key, differs in zip(counts, is_uneven, strict=True) if differs}
    return uneven


def _numbers_of(leaf: Tensor, kinds: Tensor | None) -> dict[str, Tensor]:
    """Returns, by value, how often each of the N samples in the (N, M) tensor contains the value, (N,)."""
    if kinds is None:
        return {"nan": leaf.isnan().sum(1), "0": (leaf == 0).sum(1)}
    if len(kinds) <= VALUES:
        return {str(value): (leaf == value).sum(1) for value in kinds.tolist()}
    numbers = {"a value below 0": (leaf < 0).sum(1), "0": (leaf == 0).sum(1), "255": (leaf == 255).sum(1)}
    last = leaf.flip(1)
    for end, each in (("first", leaf), ("last", last)):
        numbers[f"repetition of the {end}"] = (each == each[:, :1]).long().cumprod(1).sum(1)
    return numbers
