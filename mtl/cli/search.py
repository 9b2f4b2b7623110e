"""What the sweeps of configs/sweep go over."""

import random
import re
from itertools import combinations, pairwise
from math import comb
from typing import Any

from omegaconf import OmegaConf

from mtl.errors import UserError
from mtl.schema import trained

MOST_POINTS = 12  # of weights, beside equal ones
FINEST = 10  # parts that a grid cuts the weights' sum into
LARGEST_GRID = 4  # tasks


def _tasks(config: Any) -> list[str]:
    return trained(config.get("only"), config.tasks)


def task_names(config: Any) -> str:
    """The tasks' names, to be swept over."""
    return ",".join(_tasks(config))


def weight_grid(config: Any) -> str:
    """Sets of task weights that sum to the number of tasks, equal ones among them, to be swept over.

    Of two to four tasks a grid on the simplex without its edges, on which a task has no weight. A grid that coarse
    would weigh more tasks equally but for one, so of more they are drawn evenly from the simplex, the same ones always.

    Raises:
        UserError: for a single task, and where the command line sets weights too.
    """
    names = _tasks(config)
    count = len(names)
    if count < 2:
        raise UserError(f"+sweep=weights: {names[0]} is the only task, so there is nothing to weigh it against")
    for override in config.hydra.overrides.task:
        if re.match(r"\+*tasks(\.\w+)?(\.weight)?=", override) and "weight" in override:
            raise UserError(f"+sweep=weights sets the tasks' weights itself; leave {override} out")
    equal = [1.0] * count
    points = [equal, *_drawn(count)] if count > LARGEST_GRID else _grid(count)
    if equal not in points:
        points.insert(0, equal)
    return ",".join(
        "{" + ",".join(f"{name}:{{weight:{round(w, 4)!r}}}" for name, w in zip(names, point, strict=True)) + "}"
        for point in points
    )


def _grid(count: int) -> list[list[float]]:
    parts = max(n for n in range(count + 1, FINEST + 1) if comb(n - 1, count - 1) <= MOST_POINTS)
    ends = ([0, *cuts, parts] for cuts in combinations(range(1, parts), count - 1))
    return [[count * (end - start) / parts for start, end in pairwise(each)] for each in ends]


def _drawn(count: int) -> list[list[float]]:
    draws = random.Random(0)
    shares = [[draws.expovariate(1.0) for _ in range(count)] for _ in range(MOST_POINTS)]
    return [[count * share / sum(each) for share in each] for each in shares]


def search_space(config: Any, trial: Any) -> None:
    """What Optuna searches: the learning rate, and the weights of all tasks but the first.

    They go from a tenth to ten times the config's own rate, and the first task's weight. What the command line
    fixes, or searches itself, is left alone.
    """
    taken = {*trial.params, *trial.user_attrs}
    taken |= {name.lstrip("+") for name in taken}
    rate = config.optimizer.get("lr")
    ranges = {"optimizer.lr": (rate / 10, rate * 10)} if rate else {}
    first, *others = _tasks(config)
    weight = config.tasks[first].get("weight", 1.0)
    weight = weight if isinstance(weight, int | float) and weight > 0 else 1.0
    ranges |= {f"++tasks.{name}.weight": (weight / 10, weight * 10) for name in others}
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
