"""Trials before the first step of code that otherwise would fail only after an epoch."""

import warnings
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from mtl.batch import bounds, num_samples, take
from mtl.data import Loader, Mix
from mtl.distributed.batch_norm import is_synchronised
from mtl.distributed.collectives import world_size
from mtl.distributed.sharding import is_sharded
from mtl.errors import UserError
from mtl.snapshots import preserved_buffers
from mtl.step import Step
from mtl.step.forward import without_gradients
from mtl.training.monitor import Monitor
from mtl.training.validation import Validation


def try_split(validation: Validation, loader: Loader | Mix, name: str, monitor: Monitor | None = None) -> None:
    """Validates one batch of a split, whose name appears in messages, and checks the monitor. Buffers are restored.

    Raises:
        UserError: If the validation fails.
    """
    try:
        with preserved_buffers(validation.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same warnings appear when the whole split is validated
            figures = validation.trial(loader)
            if monitor is not None:
                monitor.check(figures)
    except UserError as error:
        raise UserError(f"{error} (on one batch of {name}, tried before the first step)") from error


def check_shares(step: Step, train: Loader | Mix) -> None:
    """Checks that each process gets samples in each step, if the processes communicate within the model's passes.

    Raises:
        UserError: If the last batch of a pass over the data is, or may be, too small for that.
    """
    if world_size() == 1 or not _communicates(step):
        return
    for loader, _ in train.by_source():
        if loader.drop_last:
            continue
        if loader.stream is not None:
            few = f"the last batches of a pass over {type(loader.dataset).__name__} may have too few"
        elif len(loader) <= len(train) and (size := loader.size_of(len(loader) - 1)) < world_size():
            few = f"the last batch of an epoch{f' of {loader.of}' if loader.of else ''} has {size}"
        else:
            continue
        raise UserError(
            "with sharded parameters or synchronised batch norm each process needs samples in each step; there are "
            f"{world_size()} processes, and {few}. Set trainer.tail=drop or another data.batch_size, or use "
            "distributed=ddp and model.sync_batchnorm=false"
        )


def try_one_sample(step: Step, train: Loader | Mix) -> None:
    """Runs a forward pass on one sample if a batch or micro-batch has only one. Buffers are restored.

    Raises:
        UserError: If the trunk or a head fails on one sample, as with batch norm.
    """
    if _communicates(step):
        return  # all processes would have to run the pass, and not all may have a sample
    for loader, names in train.by_source():
        if 1 not in _sizes(step, loader):
            continue
        tasks = [task for task in step.tasks if task.objective is None and (names is None or task.name in names)]
        batches: Any = loader.batches(1)
        with closing(batches):
            batch = next(batches)
        if batch in ({}, [{}]):  # this process has no samples of it
            continue
        try:
            whole = batch[0] if isinstance(batch, list) else batch
            sample = take(whole, num_samples(whole, [task.target for task in tasks]), slice(0, 1))
        except UserError:
            continue  # the first dimension of the fields isn't the sample
        without_gradients(step.model, [(tasks, sample)], step.passes.autocast, take=lambda *_: None)


def _communicates(step: Step) -> bool:
    """Returns whether passes of the model are collective operations."""
    return is_sharded(next(step.model.parameters())) or is_synchronised(step.model)


def _sizes(step: Step, loader: Loader) -> Iterator[int]:
    """Yields the numbers of samples in the first and the last batch, or in the micro-batches of these batches."""
    micro = {"size": step.micro_batch_size, "count": step.num_micro_batches}
    whole = {loader.size_of(0), loader.size_of(len(loader) - 1)}
    shares = {share for total in whole for share in (total // world_size(), -(-total // world_size()))}
    for size in shares - {0}:
        cut = bounds(size, **(loader.micro if loader.is_cut else micro)) if loader.is_cut or any(micro.values()) else []
        yield min((end - start for start, end in cut), default=size)
