"""What would end a training after an epoch, tried before its first step."""

import warnings
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from mtl.batch import bounds, num_samples, take
from mtl.data import Loader, Mix
from mtl.errors import UserError
from mtl.snapshots import preserved_buffers
from mtl.step import Step
from mtl.step.forward import without_gradients
from mtl.training.validation import Validation


def try_split(validation: Validation, loader: Loader | Mix, name: str) -> None:
    """Takes the figures of one batch of the split of this name. Buffers are afterwards what they were.

    Raises:
        UserError: for whatever fails.
    """
    try:
        with preserved_buffers(validation.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again with the whole split
            validation.trial(loader)
    except UserError as error:
        raise UserError(f"{error} (on one batch of {name}, tried before the first step)") from error


def try_one_sample(step: Step, train: Loader | Mix) -> None:
    """Takes one sample forward, if the training has a batch or micro-batch of one. Buffers stay what they are.

    Raises:
        UserError: where trunk or heads can't take it, as with batch norm.
    """
    for loader, names in train.parts():
        if min(_sizes(step, loader)) > 1:
            continue
        tasks = [task for task in step.tasks if task.objective is None and (names is None or task.name in names)]
        batches: Any = loader.batches(1)
        with closing(batches):
            batch = next(batches)
        try:
            whole = batch[0] if isinstance(batch, list) else batch
            sample = take(whole, num_samples(whole, [task.target for task in tasks]), slice(0, 1))
        except UserError:
            continue  # its fields aren't by samples
        without_gradients(step.model, [(tasks, sample)], step.passes.autocast, take=lambda *_: None)


def _sizes(step: Step, loader: Loader) -> Iterator[int]:
    """How many samples the batches, or micro-batches, of the training may have: that of the first and the last."""
    micro = {"size": step.micro_batch_size, "count": step.num_micro_batches}
    for size in {loader.size_of(0), loader.size_of(len(loader) - 1)}:
        cut = bounds(size, **(loader.micro if loader.is_cut else micro)) if loader.is_cut or any(micro.values()) else []
        yield min((end - start for start, end in cut), default=size)
