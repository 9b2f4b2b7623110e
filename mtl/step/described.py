"""Descriptions of the settings of a step as text, by which several processes find out whether theirs are the same."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl.distributed.replicas import checksum
from mtl.distributed.sharding import is_sharded
from mtl.step.balancing import Balancing
from mtl.step.descent import Descent
from mtl.step.settings import Gradients, Update
from mtl.task import Task

OURS = re.compile(r"(mtl|torch)\.")  # objects of other classes may hold what differs between processes, as their rank


def fixed(update: Update, gradients: Gradients, **others: object) -> dict[str, str]:
    """Returns descriptions of settings that don't change in a training, by name."""
    clipping = {"clip_norm": update.clip_norm, "clip_shared_norm": update.clip_shared_norm}
    schedule = {"interval": update.interval, "then": update.then and update.then[0]}
    settings = {"gradients": (gradients.source, gradients.every), **clipping, **schedule, **others}
    return {name: described(value) for name, value in settings.items()}


def current(tasks: Sequence[Task], balancing: Balancing, descent: Descent) -> dict[str, str]:
    """Returns descriptions of the number of steps taken, of the tasks, the balancer and the optimizer, by name."""
    number = descent.num_taken
    settings = {"number of steps taken": described(number)}
    for task in tasks:
        values = {f.name: getattr(task, f.name) for f in fields(task) if f.name not in ("head", "metrics", "seen")}
        settings[f"task '{task.name}'"] = described(values | {"weight": task.weight_at(number)})
    balancer = balancing.balancer
    state = {**balancing.state_dict(), "fixed weights": balancing.current() if balancing.needs == "nothing" else None}
    settings["balancer"] = described(balancer)
    settings["state of the balancer"] = described(state)
    for each in descent.optimizers:
        settings["optimizer"] = settings.get("optimizer", "") + described(each)
    settings["scheduler"] = described(descent.scheduler)
    return settings


def described(value: Any) -> str:
    """Returns a text that is the same for equal values in several processes, and seldom the same for different ones.

    Of an object whose class is neither of `mtl` nor of PyTorch, the text has the name of the class only.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        if value.numel() == 1 and not is_sharded(value):
            return repr(value.item())
        return f"tensor {shape}" if is_sharded(value) else f"tensor {shape} {int(checksum(value.detach()))}"
    if isinstance(value, torch.Generator):
        return f"generator {int(checksum(value.get_state()))}"
    if isinstance(value, torch.optim.Optimizer):  # its state belongs to parameters, which may be sharded
        groups = [{k: v if k != "params" else len(v) for k, v in group.items()} for group in value.param_groups]
        return f"{type(value).__name__} {described(groups)}"
    if isinstance(value, Mapping):
        return _joined(f"{key}={described(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return _joined(map(described, value))
    if isinstance(value, partial):
        return f"partial {described([value.func, value.args, value.keywords])}"
    kind = type(value)
    if hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    if OURS.match(kind.__module__):
        state = getattr(value, "state_names", ())  # of a balancer, which is described by itself
        shown = {key: each for key, each in vars(value).items() if not key.startswith("_") and key not in state}
        return f"{kind.__qualname__} {described(shown)}"
    return kind.__qualname__


def _joined(texts: Iterable[str]) -> str:
    return f"({', '.join(texts)})"
