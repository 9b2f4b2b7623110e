"""The states of metrics in several processes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchmetrics.regression
from torch import Tensor
from torchmetrics import Metric

from mtl.distributed.collectives import any_process, gather_objects, world_size
from mtl.errors import UserError

# torchmetrics joins the states of this metric wrongly: it fails with 3 processes, and has other values with several
# outputs. Early versions don't have it.
MOMENTS: Any = getattr(torchmetrics.regression, "NormalizedRootMeanSquaredError", ())


def fill_empty_states(metric: Metric) -> None:
    """Prepares a metric for torchmetrics' synchronisation if it had no samples in some process.

    A state that is a list of tensors is gathered from all processes, which needs the same data type and the same number
    of dimensions in each. In a process without samples, such a list is empty, and gets an empty tensor of that kind.

    Raises:
        UserError: If the metric has a state that can't be gathered.
    """
    if world_size() == 1:
        return
    modules = [module for module in metric.modules() if isinstance(module, Metric)]
    for module in modules:
        if isinstance(module, MOMENTS):
            _join_moments(module)
        for name, reduction in module._reductions.items():
            if reduction is None and isinstance(module._defaults[name], list):
                raise UserError(
                    f"the metric {type(module).__name__} keeps one value for each batch in '{name}', which can't be "
                    "gathered from processes with different numbers of batches; compute it by mtl.evaluate"
                )
    if not any_process([not metric.update_called])[0]:
        return
    lists = [{name: getattr(module, name) for name in module._reductions} for module in modules]
    ours = [{name: _kind(value) for name, value in states.items() if _kind(value)} for states in lists]
    gathered = gather_objects(ours)
    for number, module in enumerate(modules):
        for name, value in lists[number].items():
            kinds = [theirs[number][name] for theirs in gathered if name in theirs[number]]
            if value == [] and kinds:
                dtype, shape = kinds[0]
                setattr(module, name, [torch.empty((0, *shape), dtype=dtype, device=module.device)])


@contextmanager
def no_warning_of_empty_states() -> Iterator[None]:
    """Suppresses torchmetrics' warning about a metric without samples in this process, since others have some."""
    with warnings.catch_warnings():
        if world_size() > 1:
            warnings.filterwarnings("ignore", ".* was called before the ``update`` method")
        yield


def _join_moments(metric: Any) -> None:
    """Gives a metric of squared errors and of the moments of the targets the states over all processes."""
    parts = gather_objects({name: getattr(metric, name).cpu() for name in metric._reductions})
    states = {name: torch.stack([part[name] for part in parts]).to(metric.device) for name in metric._reductions}
    count = states["total"]
    mean = (count * states["mean_val"]).sum(0) / count.sum(0)
    states["var_val"] += count * (states["mean_val"] - mean).square()
    for name in ("sum_squared_error", "total", "target_squared", "var_val"):
        setattr(metric, name, states[name].sum(0))
    metric.mean_val, metric.min_val, metric.max_val = mean, states["min_val"].amin(0), states["max_val"].amax(0)
    metric._to_sync = False  # torchmetrics would gather the states once more


def _kind(value: Any) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """Returns the data type of a list's tensors and their shape without the first dimension; None for other states."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Tensor):
        return None
    return value[0].dtype, tuple(value[0].shape[1:])
