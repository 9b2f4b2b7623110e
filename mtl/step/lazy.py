"""Initialisation of lazy modules, such as `torch.nn.LazyLinear`, whose shapes are inferred from the first batch."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mtl.batch import Batch
from mtl.data import Loader, Mix
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.snapshots import preserved_buffers
from mtl.step.forward import loss_of, objective_of
from mtl.task import Task


def lazy(model: nn.Module) -> list[str]:
    """Returns the names of the parameters and buffers that have no shape yet."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, value in named if is_lazy(value)]


def materialise(model: MultiTaskModel, tasks: Sequence[Task], train: Loader | Mix) -> None:
    """Initialises the lazy modules of a model with a forward pass on the first training batch.

    The forward pass runs in eval mode and leaves buffers unchanged. The initial values are drawn in the order in which
    the pass reaches the modules: trunk, head and loss, task by task. A model without lazy modules is left unchanged.

    Args:
        model: The model.
        tasks: The tasks.
        train: The loader of the training data.

    Raises:
        UserError: If a module is still lazy afterwards, since the forward pass doesn't reach it.
    """
    if not lazy(model):
        return
    training = model.training
    model.eval()
    with preserved_buffers(model):
        for loader, names in train.by_source():
            batches: Any = loader.batches(1)
            with closing(batches):  # also ends the worker processes
                batch = next(batches)
            of_source = [task for task in tasks if names is None or task.name in names]
            _forward(model, of_source, batch[0] if isinstance(batch, list) else batch)
    model.train(training)
    if left := lazy(model):
        raise UserError(
            f"{', '.join(left)} {'has' if len(left) == 1 else 'have'} no shape after a batch went through the model in "
            "eval mode; give these modules their sizes in place of lazy ones"
        )


def check_not_lazy(model: nn.Module) -> None:
    """Checks that the model has no lazy modules, whose parameters an optimizer could not update.

    Raises:
        UserError: If a parameter or buffer has no shape yet.
    """
    if left := lazy(model):
        raise UserError(
            f"the model has lazy modules, whose shapes the first batch gives: {', '.join(left)}. Run one batch "
            "through the model first, before optimizer and step are made: model.eval()(batch), then model.train()"
        )


@torch.no_grad()
def _forward(model: MultiTaskModel, tasks: Sequence[Task], batch: Batch) -> None:
    features = None
    for task in tasks:
        if task.objective is not None:
            with torch.enable_grad():  # it may differentiate by itself
                objective_of(model, task, batch)
            continue
        if features is None:
            features = model.features(batch)
        prediction = model.predict(task.name, features)
        if task.name in model.losses and lazy(model.losses[task.name]):
            loss_of(task, prediction, batch)
