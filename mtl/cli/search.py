"""The values that the configs in configs/sweep sweep over."""

import random
import re
from itertools import combinations, pairwise
from math import comb
from typing import Any

from omegaconf import OmegaConf

from mtl.chosen_tasks import trained
from mtl.errors import UserError

MOST_POINTS = 12  # the most sets of weights, not counting equal weights
FINEST = 10  # the finest grid: the number of parts of the weights' sum
LARGEST_GRID = 4  # the most tasks for which a grid is used


def _tasks(config: Any) -> list[str]:
    return trained(config.get("only"), config.tasks)


def task_names(config: Any) -> str:
    """Returns the names of the tasks as values of a sweep."""
    return ",".join(_tasks(config))


def weight_grid(config: Any) -> str:
    """Returns sets of task weights that sum to the number of tasks, including equal weights, as values of a sweep.

    For two to four tasks, the sets are a grid on the interior of the simplex. For more tasks, a grid of the same size
    would give equal weights to all tasks but one, so the sets are drawn uniformly from the simplex, with a fixed seed.

    Raises:
        UserError: If there is only one task, or if the command line sets weights as well.
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
    """Defines Optuna's search space: the learning rate, and the weights of all tasks but the first.

    The ranges are from a tenth to ten times the learning rate of the config and the weight of the first task. Options
    that the command line sets or searches are left out.
    """
    taken = {*trial.params, *trial.user_attrs}
    taken |= {name.lstrip("+") for name in taken}
    rate = config.optimizer.get("lr")
    ranges = {"optimizer.lr": (rate / 10, rate * 10)} if rate else {}
    first, *remaining = _tasks(config)
    weight = config.tasks[first].get("weight", 1.0)
    weight = weight if isinstance(weight, int | float) and weight > 0 else 1.0
    ranges |= {f"++tasks.{name}.weight": (weight / 10, weight * 10) for name in remaining}
    for name, (low, high) in ranges.items():
        if name.lstrip("+") not in taken:
            trial.suggest_float(name, low, high, log=True)


def direction(config: Any) -> str:
    """Returns Optuna's direction: that of `trainer.monitor`, and `maximize` if it has no mode, which the jobs check."""
    trainer: Any = OmegaConf.to_container(config.trainer)
    monitor = trainer.get("monitor") or {}
    terms = [term for name, term in monitor.items() if str(name).split("/")[0] in _tasks(config)]
    if len(terms) == 1 and isinstance(terms[0], dict):
        terms = [terms[0].get("mode")]  # the scale of a single metric doesn't matter
    down = bool(terms) and all(term == "min" for term in terms)  # scaled terms: higher is better
    return "minimize" if down else "maximize"
