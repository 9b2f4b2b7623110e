"""Δm: how much better a method is than a model for each task (Maninis et al. 2019, arXiv 1904.08918)."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from mtl.reporting.estimates import Estimate, estimate, welch

Values = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Delta:
    """Δm in percent, above 0 where the method is better.

    Args:
        estimate: None where it isn't defined.
        how: `paired` over common seeds, or `unpaired`.
        why: why there is none, or no interval.
    """

    estimate: Estimate | None
    how: str
    why: str


def delta(ours: Mapping[str, Values], alone: Mapping[str, Values], signs: Mapping[str, int]) -> Delta:
    """The mean over tasks of (ours - alone) / alone, in percent, by sign.

    With at least two seeds in common it is taken for each of these, and the interval is over them. Otherwise it is
    taken of the means, and the interval is by the delta method: the seeds of the method, of which each has all tasks,
    and those of every task's single runs are independent, so their variances add up.

    Args:
        ours: by task.
        alone: by task, of its single-task runs; their spread is in the interval.
        signs: by task 1 where more is better, -1 where less is.
    """
    tasks = list(signs)
    for task in tasks:
        if not ours.get(task) or not alone.get(task):
            return Delta(None, "", f"no figures of {task}" + (" alone" if ours.get(task) else ""))
        if min(alone[task].values()) <= 0:
            return Delta(
                None, "", f"{task} alone is {min(alone[task].values()):.3g}, of which no percentage can be told"
            )
    own = set.intersection(*(set(ours[task]) for task in tasks))
    common = [seed for seed in sorted(own) if all(seed in alone[task] for task in tasks)]
    if len(common) > 1:
        gains = [
            100 * fmean(signs[t] * (ours[t][seed] - alone[t][seed]) / alone[t][seed] for t in tasks) for seed in common
        ]
        return Delta(estimate(gains), "paired", "")
    if not own:
        return Delta(None, "", "no seed has all tasks")
    base = {task: fmean(alone[task].values()) for task in tasks}
    scale = {task: 100 * signs[task] / (len(tasks) * base[task]) for task in tasks}
    sums = [sum(scale[t] * (ours[t][seed] - base[t]) for t in tasks) for seed in sorted(own)]
    if len(own) < 2 or any(len(alone[task]) < 2 for task in tasks):
        return Delta(
            Estimate(fmean(sums), None, min(len(own), *(len(alone[t]) for t in tasks))), "unpaired", "one seed"
        )
    parts: list[tuple[float, list[float]]] = [(1.0, sums)]
    for task in tasks:
        mean = fmean(ours[task][seed] for seed in own)
        parts.append((-scale[task] * mean / base[task], list(alone[task].values())))
    return Delta(welch([fmean(sums)], parts), "unpaired", "")
