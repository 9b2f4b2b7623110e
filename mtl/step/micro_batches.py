"""A step's batch cut into micro-batches, and how much of each task's loss is in each of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl.batch import Batch, cut, joined, num_samples
from mtl.errors import UserError
from mtl.labels import denominator, may_miss
from mtl.task import Task

StepBatch = Batch | list[Batch]


class MicroBatches:
    """What a step goes over, one micro-batch after the other; each has a graph of its own.

    A step that isn't cut has one micro-batch, or one for each of the batches that tasks have for themselves.

    Args:
        tasks: those that have something in the step.
        batches: fields by name, a dict for each micro-batch.
        shares: by micro-batch and task, how much of the task's loss is in it; 0 where the task has nothing there.

    Attributes:
        names: of the tasks.
        members: by micro-batch, the numbers of the tasks that have something in it.
    """

    def __init__(self, tasks: Sequence[Task], batches: Sequence[Batch], shares: Sequence[Sequence[float]]) -> None:
        self.tasks = list(tasks)
        self.names = [task.name for task in self.tasks]
        self.batches = list(batches)
        self.shares = [list(row) for row in shares]
        self.members = [[number for number, share in enumerate(row) if share] for row in self.shares]

    @classmethod
    def of(
        cls,
        tasks: Sequence[Task],
        batch: StepBatch,
        *,
        size: int | None = None,
        count: int | None = None,
        without: Mapping[str, object] | None = None,
    ) -> "MicroBatches":
        """The micro-batches of what a step is given, with the tasks that have labels in it.

        Args:
            tasks: the step's.
            batch: a dict of fields, a dict of such batches by task name, or a list of micro-batches.
            size: samples in a micro-batch, and
            count: number of micro-batches, of which one at most is given; a list is cut already.
            without: names of tasks that take no part.

        Raises:
            UserError: for what is no batch.
        """
        given = batch if isinstance(batch, list) else [batch]
        if not given or not all(isinstance(each, Mapping) for each in given):
            kinds = ", ".join(dict.fromkeys(type(each).__name__ for each in given)) or "an empty list"
            raise UserError(f"a step takes a batch, which is a dict of fields, or a list of these; here it is {kinds}")
        whole = [pair for each in given for pair in _by_tasks(tasks, each)]
        batches: list[Batch] = []
        members: list[list[int]] = []
        for each, numbers in whole:
            if tasks[numbers[0]].objective is not None and tasks[numbers[0]].whole_batch:
                continue  # it has all the samples in one graph
            is_cut = isinstance(batch, list) or not (size or count)
            targets = [] if is_cut else [tasks[i].target for other, i_s in whole if other is each for i in i_s]
            pieces = [each] if is_cut else cut(each, num_samples(each, targets), size=size, count=count)
            batches += pieces
            members += [numbers] * len(pieces)
        for index, task in enumerate(tasks):
            own = [each for each, numbers in whole if numbers == [index]]
            if task.objective is not None and task.whole_batch and own:
                batches.append(own[0] if len(own) == 1 else joined(own, [num_samples(b, [task.target]) for b in own]))
                members.append([index])
        everyone = cls(tasks, batches, shares(tasks, batches, members))
        return everyone.without(without or {})

    def without(self, names: Mapping[str, object]) -> "MicroBatches":
        """The same without the tasks of these names, and without those that have nothing in any micro-batch."""
        present = set().union(*self.members)
        stay = [number for number, name in enumerate(self.names) if number in present and name not in names]
        if len(stay) == len(self.tasks):
            return self
        return self.of_tasks(stay)

    def of_tasks(self, numbers: Sequence[int]) -> "MicroBatches":
        """The same with the tasks of these numbers alone."""
        shares = [[row[number] for number in numbers] for row in self.shares]
        return MicroBatches([self.tasks[number] for number in numbers], self.batches, shares)


def _by_tasks(tasks: Sequence[Task], batch: Batch) -> list[tuple[Batch, list[int]]]:
    """The different batches in a batch by task name, with the numbers of their tasks; else the one with all tasks.

    A task that is a function of model and batch has a micro-batch of its own: it needn't go through the trunk as others
    do.
    """
    names = [task.name for task in tasks]
    own = bool(batch) and set(batch) <= set(names) and all(isinstance(each, Mapping) for each in batch.values())
    groups: dict[object, tuple[Batch, list[int]]] = {}
    for index, task in enumerate(tasks):
        if not own or task.name in batch:
            fields = batch[task.name] if own else batch
            groups.setdefault((id(fields), index if task.objective else None), (fields, []))[1].append(index)
    return list(groups.values())


def shares(tasks: Sequence[Task], batches: Sequence[Batch], members: Sequence[Sequence[int]]) -> list[list[float]]:
    """By micro-batch and task, the share of the task's loss: what its mean divides by there, over that in the step.

    Args:
        tasks: all tasks of the step.
        batches: its micro-batches.
        members: by micro-batch, the numbers of its tasks. A task in a single one is counted only if labels may be
            missing.
    """
    occurrences = [sum(index in each for each in members) for index in range(len(tasks))]
    counted: list[list[Tensor | int]] = [
        [
            0
            if index not in numbers
            else denominator(task, batch)
            if occurrences[index] > 1 or _may_miss(task, batch)
            else 1
            for index, task in enumerate(tasks)
        ]
        for batch, numbers in zip(batches, members, strict=True)
    ]
    on_device = [value.double() for row in counted for value in row if isinstance(value, Tensor)]
    read = iter(torch.stack(on_device).tolist() if on_device else ())  # one wait for the device
    rows = [[next(read) if isinstance(value, Tensor) else float(value) for value in row] for row in counted]
    totals = [sum(column) for column in zip(*rows, strict=True)]
    of_step = [[value / total if total else 0.0 for value, total in zip(row, totals, strict=True)] for row in rows]
    # A loss that is taken of the whole batch counts fully in each micro-batch, see whole_batch.py.
    return [[float(x > 0) if task.whole_batch else x for task, x in zip(tasks, row, strict=True)] for row in of_step]


def _may_miss(task: Task, batch: Batch) -> bool:
    """Whether labels of the task may be missing in the batch."""
    return task.objective is None and may_miss(task, batch.get(task.target))
