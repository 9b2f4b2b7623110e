"""A step's batch in parts: micro-batches, the batches of tasks that have their own, or both."""

from collections.abc import Mapping, Sequence

from mtl.batch import Batch, cut, joined, num_samples
from mtl.errors import UserError
from mtl.labels import shares
from mtl.task import Task

StepBatch = Batch | list[Batch]


class Parts:
    """What one step goes over, one part after the other; each has a graph of its own.

    Args:
        tasks: those of which the shares speak.
        batches: fields by name, a dict for each part.
        shares: by part and task, how much of the task's loss is in it; 0 where it has nothing there.
    """

    def __init__(self, tasks: Sequence[Task], batches: Sequence[Batch], shares: Sequence[Sequence[float]]) -> None:
        self.tasks = list(tasks)
        self.batches = list(batches)
        self.shares = [list(row) for row in shares]

    @classmethod
    def of(
        cls, tasks: Sequence[Task], batch: StepBatch, *, size: int | None = None, count: int | None = None
    ) -> "Parts":
        """The parts of a batch: of a dict of fields, of one of batches by task name, or of a list of micro-batches.

        Args:
            tasks: the step's.
            batch: what the step is given.
            size: samples in a micro-batch, and
            count: number of micro-batches, of which one at most is given; a list is cut already.
        """
        given = batch if isinstance(batch, list) else [batch]
        if not given or not all(isinstance(each, Mapping) for each in given):
            kinds = ", ".join(dict.fromkeys(type(each).__name__ for each in given)) or "an empty list"
            raise UserError(f"a step takes a batch, which is a dict of fields, or a list of these; here it is {kinds}")
        whole = [pair for each in given for pair in _by_tasks(tasks, each)]
        batches: list[Batch] = []
        members: list[list[int]] = []
        for each, its in whole:
            if tasks[its[0]].objective is not None and tasks[its[0]].whole_batch:
                continue  # it has all the samples in one graph
            is_cut = isinstance(batch, list) or not (size or count)
            targets = [] if is_cut else [tasks[i].target for other, i_s in whole if other is each for i in i_s]
            pieces = [each] if is_cut else cut(each, num_samples(each, targets), size=size, count=count)
            batches += pieces
            members += [its] * len(pieces)
        for index, task in enumerate(tasks):
            own = [each for each, its in whole if its == [index]]
            if task.objective is not None and task.whole_batch and own:
                batches.append(own[0] if len(own) == 1 else joined(own, [num_samples(b, [task.target]) for b in own]))
                members.append([index])
        return cls(tasks, batches, shares(tasks, batches, members))

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return [task.name for task in self.tasks]

    def present(self) -> list[int]:
        """The tasks that have something in any part."""
        return [index for index in range(len(self.tasks)) if any(row[index] for row in self.shares)]

    def in_part(self, number: int) -> list[int]:
        """The tasks that have something in this part."""
        return [index for index, share in enumerate(self.shares[number]) if share]

    def of_tasks(self, which: Sequence[int]) -> "Parts":
        """The same of these tasks alone."""
        return Parts([self.tasks[i] for i in which], self.batches, [[row[i] for i in which] for row in self.shares])

    def without(self, names: Mapping[str, object]) -> "Parts":
        """The same with nothing in it for the tasks of these names."""
        rows = [[0.0 if name in names else x for name, x in zip(self.names, row, strict=True)] for row in self.shares]
        return Parts(self.tasks, self.batches, rows)


def _by_tasks(tasks: Sequence[Task], batch: Batch) -> list[tuple[Batch, list[int]]]:
    """The different batches in a batch by task name, with the tasks for which each is; else the one with all tasks.

    A task that is a function of model and batch has a part of its own: it needn't go through the trunk as others do.
    """
    names = [task.name for task in tasks]
    own = bool(batch) and set(batch) <= set(names) and all(isinstance(each, Mapping) for each in batch.values())
    found: dict[object, tuple[Batch, list[int]]] = {}
    for index, task in enumerate(tasks):
        if not own or task.name in batch:
            its = batch[task.name] if own else batch
            found.setdefault((id(its), index if task.objective else None), (its, []))[1].append(index)
    return list(found.values())
