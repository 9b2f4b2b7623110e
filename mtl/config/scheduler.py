"""Builds the config's learning-rate scheduler, and determines whether it counts steps or epochs."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mtl.config.data import Config
from mtl.config.targets import make
from mtl.errors import UserError

BY_STEP = ("OneCycleLR", "CyclicLR")  # PyTorch documents that these schedulers are stepped once per batch
TOTALS = ("total_steps", "total_epochs")


def interval_of(node: Mapping[str, Any] | None) -> str:
    """Returns what the scheduler of this node counts: `step` or `epoch`.

    Raises:
        UserError: If the interval is neither set nor implied by the other values.
    """
    if node is None:
        return "step"
    interval: str | None = node.get("interval")
    words = {word for word in _values(node) if word in TOTALS}
    name = str(node["_target_"]).rpartition(".")[2]
    if interval is None and name not in BY_STEP and words != {"total_steps"}:
        raise UserError(
            f"scheduler.interval: set what {name} counts. With scheduler.interval=step it advances after each "
            "optimizer step, with scheduler.interval=epoch after each epoch; numbers in papers, such as a step_size "
            "of StepLR, mostly mean epochs"
        )
    interval = interval or "step"
    if words - {f"total_{interval}s"}:
        raise UserError(
            f"scheduler: it counts {interval}s (scheduler.interval), and {', '.join(sorted(words))} in it counts "
            f"something else; use total_{interval}s"
        )
    return interval


def _values(node: Any) -> Iterator[str]:
    """Yields all texts among the values of a node."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping | list):
        for each in node.values() if isinstance(node, Mapping) else node:
            yield from _values(each)


def build_scheduler(config: Config, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
    """Builds the learning-rate scheduler; returns None if the config has none.

    In the scheduler's arguments, the words `total_steps` and `total_epochs` are replaced by the numbers of the run. The
    optimizer is also passed to the inner schedulers of a SequentialLR or a ChainedScheduler.

    Args:
        config: The config of the run.
        optimizer: The optimizer whose learning rates are scheduled.
        total_steps: The number of optimizer steps in the schedule.

    Raises:
        UserError: If the object that the config describes isn't a PyTorch scheduler.
    """
    node = config["scheduler"]
    if node is None:
        return None
    totals = {"total_steps": total_steps, "total_epochs": config["trainer"]["max_epochs"]}
    return _build(_counted(node, totals), "scheduler", optimizer, outer=True)


def _counted(node: Any, totals: Mapping[str, int]) -> Any:
    if isinstance(node, Mapping):
        return {key: _counted(value, totals) for key, value in node.items()}
    if isinstance(node, list):
        return [_counted(each, totals) for each in node]
    return totals.get(node, node) if isinstance(node, str) else node


def _build(node: Any, where: str, optimizer: Optimizer, *, outer: bool = False) -> LRScheduler:
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{where} is {node!r}; it must be a mapping with a _target_")
    if not outer and "interval" in node:
        raise UserError(f"{where}.interval: all inner schedulers have the same interval; set only scheduler.interval")
    node = {key: value for key, value in node.items() if key != "interval"}
    inner = node.pop("schedulers", None)
    if inner is None:
        scheduler = make(node, where, optimizer)
    else:
        if not isinstance(inner, list) or not inner:
            raise UserError(f"{where}.schedulers is {inner!r}; it must be a list of mappings, each with a _target_")
        built = [_build(each, f"{where}.schedulers[{index}]", optimizer) for index, each in enumerate(inner)]
        scheduler = make(node, where, schedulers=built, optimizer=optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise UserError(f"{where}: {node['_target_']} gives a {type(scheduler).__name__}, not a torch LRScheduler")
    if isinstance(scheduler, ReduceLROnPlateau) and not outer:
        raise UserError(
            f"{where}: ReduceLROnPlateau follows a validation metric; it can't be one of several schedulers"
        )
    return scheduler
