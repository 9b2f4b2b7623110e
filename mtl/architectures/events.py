"""A check that the labels of tasks are those of a chain of events, in which none happens without the one before it."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mtl.batch import Batch
from mtl.errors import UserError
from mtl.labels import label_mask
from mtl.task import Task

CHANCE = 1e-6  # labels count as missing wherever the event before is 0 if this is less likely to be chance


class Events:
    """Checks in training batches that, wherever an event is 0, the next event of the chain has a label, which is 0.

    Each check waits for the device. A pair of events is therefore checked in every batch only until a label of the
    later one was seen where the earlier one is 0, and then in the batches 1, 2, 4, 8, ….

    A batch may be a small part of a step's, so that some labels may be missing by chance. With a share f of samples in
    which the earlier event happened, all of k labels of the later event are among these with a probability of at most
    f^k. The counts are those of all batches so far. As sequential passes repeat each batch for each task, k is
    divided by the number of tasks.

    Args:
        model: The name of the model's class, for messages.
        chain: The tasks of the chain, in the order of the events.
        num_tasks: The number of all tasks of the model.
    """

    def __init__(self, model: str, chain: Sequence[Task], num_tasks: int) -> None:
        self._model = model
        self._num_tasks = num_tasks
        self._pairs = list(pairwise(chain))
        self._number = 0  # of batches
        # By pair: samples with and without the earlier event, and labels of the later one with the earlier one known
        self._unseen = {number: [0, 0, 0] for number in range(len(self._pairs))}

    def check(self, batch: Batch) -> None:
        """Checks the labels of a training batch.

        Raises:
            UserError: If an event happened without the one before it, or if its labels are missing, in all batches so
                far, wherever the event before it did not happen.
        """
        self._number += 1
        is_due = self._number.bit_count() == 1  # a power of two
        for number, (before, after) in enumerate(self._pairs):
            if (is_due or number in self._unseen) and (counts := _counts(before, after, batch)) is not None:
                self._judge(number, counts)

    def _judge(self, number: int, counts: Sequence[int]) -> None:
        before, after = self._pairs[number]
        *totals, without, wrong = counts
        advice = (
            "model.chain lists the tasks that are events in their order, each of which needs the one before it; with "
            "model.chain=[] each task only has a tower of its own"
        )
        if wrong:
            raise UserError(
                f"model: {self._model} takes '{after.name}' as an event after '{before.name}', which can't happen "
                f"without it, and the label '{after.target}' is 1 in {wrong} of {totals[1]} samples in which "
                f"'{before.target}' is 0. {advice}"
            )
        if without:
            self._unseen.pop(number, None)
        if number not in self._unseen:
            return
        self._unseen[number] = [a + b for a, b in zip(self._unseen[number], totals, strict=True)]
        happened, not_happened, labels = self._unseen[number]
        share = happened / max(happened + not_happened, 1)
        if not_happened and happened and labels / self._num_tasks * math.log(share) < math.log(CHANCE):
            raise UserError(
                f"model: {self._model} predicts '{after.name}' for all samples, and its label '{after.target}' is "
                f"missing wherever '{before.target}' is 0. The label of an event has to be 0 if the event before it "
                f"did not happen, as in task=made_ctr_chain. {advice}"
            )


def _counts(before: Task, after: Task, batch: Batch) -> list[int] | None:
    """Counts samples of a batch in which the earlier event is known; None if the labels can't be compared.

    Returns:
        The numbers of samples in which it happened, in which it did not, with a label of the later event, with such a
        label although the earlier event did not happen, and in which the later event happened without the earlier one.
    """
    earlier, later = batch.get(before.target), batch.get(after.target)
    if not isinstance(earlier, Tensor) or not isinstance(later, Tensor) or earlier.shape != later.shape:
        return None
    known, present = (
        torch.ones_like(values, dtype=torch.bool) if (mask := label_mask(task, batch)) is None else mask
        for task, values in ((before, earlier), (after, later))
    )
    no, yes = known & (earlier == 0), known & (earlier > 0)
    without = present & no
    kinds = (yes, no, present & (yes | no), without, without & (later > 0))
    counts: list[int] = torch.stack([kind.sum() for kind in kinds]).tolist()
    return counts
