"""Division of a step's batch into micro-batches, and the share of each task's loss in each micro-batch.

With several processes, the batch of a step consists of the micro-batches of all of them.
"""

from collections.abc import Mapping, Sequence
from copy import copy

from mtl.batch import Batch, cut, joined, num_samples
from mtl.errors import UserError
from mtl.step.alignment import align, silenced
from mtl.step.shares import Shares, known
from mtl.step.shares import count as count_labels
from mtl.task import Task

StepBatch = Batch | list[Batch]


class MicroBatches:
    """The micro-batches of a step, which are processed one after the other, each with a graph of its own.

    A batch that isn't divided is one micro-batch. If tasks have separate batches, each of these is one micro-batch.

    Args:
        tasks: The tasks that take part in the step.
        batches: The micro-batches, each a dict of fields.
        shares: The share of each task's loss in each micro-batch.
        processes: The number of processes that train together, each with micro-batches of its own.
        members: By micro-batch, the indices of the tasks whose passes run; by default, of those with labels in it.
        sources: By micro-batch, a value that is equal for micro-batches of one batch; by default, all are of one.

    Attributes:
        names: The names of the tasks.
        labelled: By micro-batch, the indices of the tasks that have labels in it.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        batches: Sequence[Batch],
        shares: Shares,
        processes: int = 1,
        members: Sequence[Sequence[int]] | None = None,
        sources: Sequence[object] | None = None,
    ) -> None:
        self.processes = processes
        self.tasks = list(tasks)
        self.names = [task.name for task in self.tasks]
        self.batches = list(batches)
        self._shares = shares
        self.labelled = shares.labelled
        self.members = self.labelled if members is None else [list(each) for each in members]
        self.is_aligned = members is not None
        self.sources = list(sources or [None] * len(self.batches))

    @property
    def shares(self) -> list[list[float]]:
        """By micro-batch and task, the share of the task's loss; 0 if the task has no labels in the micro-batch."""
        return self._shares.rows

    @property
    def several(self) -> bool:
        """Whether any process has several micro-batches."""
        return self._shares.several

    @classmethod
    def of(
        cls,
        tasks: Sequence[Task],
        batch: StepBatch,
        *,
        size: int | None = None,
        count: int | None = None,
        without: Mapping[str, object] | None = None,
        processes: int = 1,
        aligned: bool = False,
        measure: bool = False,
    ) -> "MicroBatches":
        """Divides the batch of a step into micro-batches, and selects the tasks that have labels in the batch.

        Args:
            tasks: All tasks.
            batch: A dict of fields, a dict of such batches by task name, or a list of micro-batches.
            size: The number of samples in a micro-batch.
            count: The number of micro-batches; at most one of `size` and `count` may be set. A list isn't divided.
            without: The names of tasks that don't take part.
            processes: The number of processes that train together.
            aligned: Whether all processes have to run the same passes, see alignment.py.
            measure: Whether this process measures gradients in the step, as all of them or none have to.

        Raises:
            UserError: If `batch` isn't a batch, or if the passes of the processes differ and can't be made the same.
        """
        dicts = batch if isinstance(batch, list) else [batch]
        if not dicts or not all(isinstance(each, Mapping) for each in dicts):
            kinds = ", ".join(dict.fromkeys(type(each).__name__ for each in dicts)) or "an empty list"
            raise UserError(f"a step takes a batch, which is a dict of fields, or a list of these; here it is {kinds}")
        whole = [pair for each in dicts for pair in _by_tasks(tasks, each)]
        if processes > 1:  # a process that has no samples in the step has a batch without fields
            whole = [(fields, numbers) for fields, numbers in whole if fields]
        batches: list[Batch] = []
        members: list[list[int]] = []
        for each, numbers in whole:
            if tasks[numbers[0]].objective is not None and tasks[numbers[0]].whole_batch:
                continue  # added below, with all samples in one graph
            is_cut = isinstance(batch, list) or not (size or count)
            targets = [] if is_cut else [tasks[i].target for other, i_s in whole if other is each for i in i_s]
            pieces = [each] if is_cut else cut(each, num_samples(each, targets), size=size, count=count)
            batches += pieces
            members += [numbers] * len(pieces)
        for index, task in enumerate(tasks):
            parts = [each for each, numbers in whole if numbers == [index]]
            if task.objective is not None and task.whole_batch and parts:
                sizes = [] if len(parts) == 1 else [num_samples(each, [task.target]) for each in parts]
                batches.append(parts[0] if len(parts) == 1 else joined(parts, sizes))
                members.append([index])
        counted, runs = members, None
        if aligned:
            batches, members, repeated = align(batches, members)
            counted = [[] if again else member for member, again in zip(members, repeated, strict=True)]
        shares = count_labels(list(tasks), batches, counted, processes, measure=measure, waits=aligned)
        if aligned:
            runs = [[index for index in member if index in shares.present] for member in members]
        sources = [tuple(member) for member in members]
        return cls(tasks, batches, shares, processes, runs, sources).without(without or {})

    def task(self, number: int, index: int) -> Task:
        """Returns the task with this index as the micro-batch with this number uses it.

        It is silent if it has no labels, and doesn't look for missing labels again if there are none.
        """
        if index not in self.labelled[number]:
            return silenced(self.tasks[index])
        task = self.tasks[index]
        if index in self._shares.complete[number]:
            task = copy(task)
            task.missing = False
        return task

    def without(self, names: Mapping[str, object]) -> "MicroBatches":
        """Returns the micro-batches without the named tasks, and without tasks that have no labels in any of them."""
        stay = [
            number for number, name in enumerate(self.names) if number in self._shares.present and name not in names
        ]
        if len(stay) == len(self.tasks):
            return self
        return self.of_tasks(stay)

    def of_tasks(self, numbers: Sequence[int]) -> "MicroBatches":
        """Returns the micro-batches with only the tasks that have these indices."""
        place = {number: index for index, number in enumerate(numbers)}
        present = {index for number, index in place.items() if number in self._shares.present}
        rows = [[row[number] for number in numbers] for row in self.shares]
        complete = [{place[number] for number in each if number in place} for each in self._shares.complete]
        shares = known(rows, present, several=self.several, complete=complete)
        runs = [[place[number] for number in member if number in place] for member in self.members]
        tasks = [self.tasks[number] for number in numbers]
        members = runs if self.is_aligned else None
        return MicroBatches(tasks, self.batches, shares, self.processes, members, self.sources)


def _by_tasks(tasks: Sequence[Task], batch: Batch) -> list[tuple[Batch, list[int]]]:
    """Returns pairs of a batch and the indices of its tasks: several pairs if `batch` holds batches by task name.

    A task with an objective always has a pair of its own, since an objective doesn't use the features of other tasks.
    """
    names = [task.name for task in tasks]
    by_name = bool(batch) and set(batch) <= set(names) and all(isinstance(each, Mapping) for each in batch.values())
    groups: dict[object, tuple[Batch, list[int]]] = {}
    for index, task in enumerate(tasks):
        if not by_name or task.name in batch:
            fields = batch[task.name] if by_name else batch
            groups.setdefault((id(fields), index if task.objective else None), (fields, []))[1].append(index)
    return list(groups.values())
