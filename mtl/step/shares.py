"""The share of each task's loss in each micro-batch of a step."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mtl.batch import Batch
from mtl.distributed.collectives import begin_sum_of_numbers
from mtl.errors import UserError
from mtl.labels import denominator, may_miss, whole_denominator
from mtl.task import Task


class Shares:
    """The share of each task's loss in each micro-batch, which may depend on counts that other processes send.

    The counts arrive while this process runs its first forward pass: it waits only when it needs them.

    Args:
        labelled: By micro-batch, the indices of the tasks that have labels in it.
        present: The indices of the tasks that have labels in any process, or a function that waits for them.
        rows: By micro-batch and task, the share, or a function that waits for them.
        several: Whether a process has several micro-batches, or a function that waits for the answer.
        complete: By micro-batch, the indices of tasks that are known to miss no label in it.
    """

    def __init__(
        self,
        labelled: list[list[int]],
        present: set[int] | Callable[[], set[int]],
        rows: list[list[float]] | Callable[[], list[list[float]]],
        several: bool | Callable[[], bool],
        complete: list[set[int]],
    ) -> None:
        self.labelled = labelled
        self.complete = complete
        self._present = present
        self._rows = rows
        self._several = several

    @cached_property
    def present(self) -> set[int]:
        """The indices of the tasks that have labels in a micro-batch of any process."""
        return self._present() if callable(self._present) else self._present

    @cached_property
    def rows(self) -> list[list[float]]:
        """By micro-batch and task, the share, from 0 to 1."""
        return self._rows() if callable(self._rows) else self._rows

    @cached_property
    def several(self) -> bool:
        """Whether any process has several micro-batches."""
        return self._several() if callable(self._several) else self._several


def known(
    rows: Sequence[Sequence[float]],
    present: set[int] | None = None,
    *,
    several: bool | None = None,
    complete: list[set[int]] | None = None,
) -> Shares:
    """Returns shares that depend on no other process."""
    labelled = [[number for number, share in enumerate(row) if share] for row in rows]
    present = set().union(*labelled) if present is None else present
    several = len(rows) > 1 if several is None else several
    return Shares(labelled, present, [list(row) for row in rows], several, complete or [set() for _ in rows])


def count(
    tasks: list[Task],
    batches: list[Batch],
    members: list[list[int]],
    processes: int = 1,
    *,
    measure: bool = False,
    waits: bool = False,
) -> Shares:
    """Counts the labels of each task in each micro-batch.

    A share is the denominator of the task's mean on the micro-batch, divided by the sum over all micro-batches of all
    processes.

    Args:
        tasks: All tasks of the step.
        batches: The micro-batches of the step.
        members: By micro-batch, the indices of the tasks in it. For a task in only one micro-batch, labels are counted
            only if some may be missing.
        processes: The number of processes that train together.
        measure: Whether this process measures gradients in the step.
        waits: Whether to wait for the counts at once, since the forward passes already communicate.

    Raises:
        UserError: If only some of the processes measure, here or where the counts are first used.
    """
    occurrences = [sum(index in each for each in members) for index in range(len(tasks))]
    several = [number > 1 or processes > 1 for number in occurrences]
    counted = [_denominators(tasks, batch, numbers, several) for batch, numbers in zip(batches, members, strict=True)]
    on_device = [value.double() for row in counted for value in row if isinstance(value, Tensor)]
    read = iter(torch.stack(on_device).tolist() if on_device else ())  # one wait for the device
    rows = [[next(read) if isinstance(value, Tensor) else float(value) for value in row] for row in counted]
    ours = [sum(row[index] for row in rows) for index in range(len(tasks))]
    totals = _begin([*ours, len(batches) > 1], processes, measure)
    if measure or waits:  # otherwise processes that don't agree would communicate before they find out
        totals()

    def shares() -> list[list[float]]:
        of_step = [[x / total if total else 0.0 for x, total in zip(row, totals(), strict=False)] for row in rows]
        # A loss of the whole batch counts fully in each micro-batch, see whole_batch.py.
        return [[float(x > 0) if t.whole_batch else x for t, x in zip(tasks, row, strict=True)] for row in of_step]

    complete = [
        {index for index, value in enumerate(row) if value and value == whole_denominator(tasks[index], batch)}
        for row, batch in zip(rows, batches, strict=True)
    ]
    here = {index for index, total in enumerate(ours) if total}
    return Shares(
        [[index for index, value in enumerate(row) if value] for row in rows],
        here if len(here) == len(tasks) else lambda: {i for i, total in enumerate(totals()[: len(tasks)]) if total},
        shares,
        lambda: totals()[-1] > 0,
        complete,
    )


def _denominators(tasks: list[Task], batch: Batch, members: list[int], several: list[bool]) -> list[Tensor | int]:
    """Returns the denominator of each task's loss on a micro-batch; 0 for tasks that take no part in it.

    Args:
        tasks: All tasks.
        batch: The micro-batch.
        members: The indices of the tasks that take part in the micro-batch.
        several: For each task, whether it takes part in several micro-batches. For other tasks, the denominator may be
            1 if no label may be missing, since the micro-batch's share is 1 anyway.
    """
    counted: list[Tensor | int] = [0] * len(tasks)
    for index in members:
        task = tasks[index]
        counts = several[index] or (task.objective is None and may_miss(task, batch.get(task.target)))
        counted[index] = denominator(task, batch) if counts else 1
    return counted


def _begin(numbers: list[float], processes: int, measure: bool) -> Callable[[], list[float]]:
    """Begins to sum numbers over all processes; the returned function waits, and checks that all of them measure."""
    begun = begin_sum_of_numbers([*numbers, measure])

    def wait() -> list[float]:
        *sums, measuring = begun()
        if measuring not in (0, processes):
            raise UserError(
                f"step: measure is True in {measuring:g} of {processes} processes, and they can only measure together. "
                "Give all processes the same value; each of them then gets the measurements"
            )
        return sums

    return wait
