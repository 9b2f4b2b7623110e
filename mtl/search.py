"""What the sweeps of configs/sweep go over."""

import re
from collections.abc import Sequence
from itertools import combinations, pairwise
from math import comb
from typing import Any

from omegaconf import OmegaConf

from mtl.errors import UserError
from mtl.schema import trained

MOST_POINTS = 12  # of a grid of weights
FINEST = 10  # parts that a grid cuts the weights' sum into


def _tasks(config: Any) -> list[str]:
    return trained(config.get("only"), config.tasks)


def task_names(config: Any) -> str:
    """The tasks' names, to be swept over."""
    return ",".join(_tasks(config))


def weight_grid(config: Any) -> str:
    """Sets of task weights that sum to the number of tasks, on a grid without its edges, to be swept over.

    On the edges a task has no weight. Equal weights are among them.
    """
    names = _tasks(config)
    count = len(names)
    if count < 2:
        raise UserError(f"+sweep=weights: {names[0]} is the only task, so there is nothing to weigh it against")
    for override in config.hydra.overrides.task:
        if re.match(r"\+*tasks\.\w+\.weight=", override):
            raise UserError(f"+sweep=weights sets the tasks' weights itself; leave {override} out")
    parts = max((n for n in range(count, FINEST + 1) if comb(n - 1, count - 1) <= MOST_POINTS), default=count)
    points = [_shares(cuts, parts, count) for cuts in combinations(range(1, parts), count - 1)]
    if [1.0] * count not in points:
        points.insert(0, [1.0] * count)
    return ",".join(
        "{" + ",".join(f"{name}:{{weight:{round(w, 4)!r}}}" for name, w in zip(names, point, strict=True)) + "}"
        for point in points
    )


def _shares(cuts: Sequence[int], parts: int, count: int) -> list[float]:
    ends = [0, *cuts, parts]
    return [count * (end - start) / parts for start, end in pairwise(ends)]


def search_space(config: Any, trial: Any) -> None:
    """What Optuna searches: the learning rate, up to ten times the config's own, and each task's weight by the first's.

    What the command line fixes, or searches itself, is left alone.
    """
    taken = {*trial.params, *trial.user_attrs}
    taken |= {name.lstrip("+") for name in taken}
    rate = config.optimizer.get("lr")
    ranges = {"optimizer.lr": (rate / 10, rate * 10)} if rate else {}
    ranges |= {f"++tasks.{name}.weight": (0.1, 10.0) for name in _tasks(config)[1:]}
    for name, (low, high) in ranges.items():
        if name.lstrip("+") not in taken:
            trial.suggest_float(name, low, high, log=True)


def direction(config: Any) -> str:
    """Which way Optuna is to go: that of `trainer.monitor`; up where it names no mode, which the jobs then check."""
    trainer: Any = OmegaConf.to_container(config.trainer)
    monitor = trainer.get("monitor") or {}
    terms = [term for name, term in monitor.items() if str(name).split("/")[0] in _tasks(config)]
    if len(terms) == 1 and isinstance(terms[0], dict):
        terms = [terms[0].get("mode")]  # the scale of one figure alone counts for nothing
    down = bool(terms) and all(term == "min" for term in terms)  # those with a scale make up the better way
    return "minimize" if down else "maximize"
