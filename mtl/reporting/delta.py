"""Δm: the mean improvement of a method over single-task models (Maninis et al. 2019, arXiv 1904.08918)."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from mtl.reporting.estimates import Estimate, estimate, welch

Values = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Delta:
    """Δm in percent; positive if the method is better.

    Args:
        estimate: The estimate; None if Δm is undefined.
        how: `paired` over common seeds, or `unpaired`.
        why: Why there is no estimate or no interval.
    """

    estimate: Estimate | None
    how: str
    why: str


def delta(ours: Mapping[str, Values], alone: Mapping[str, Values], signs: Mapping[str, int]) -> Delta:
    """Computes the mean over tasks of the signed relative difference (ours - alone) / alone, in percent.

    With at least two common seeds, Δm is computed for each seed, and the interval is over the seeds. Otherwise it is
    computed from the means, with an interval by the delta method: the seeds of the method, each of which has all tasks,
    and the seeds of each task's single-task runs are independent, so that their variances add up.

    Args:
        ours: The method's values, by task.
        alone: The values of the single-task runs, by task; the interval includes the spread of these values.
        signs: By task, 1 if higher is better and -1 if lower is better.
    """
    tasks = list(signs)
    for task in tasks:
        if not ours.get(task) or not alone.get(task):
            return Delta(None, "", f"no figures of {task}" + (" alone" if ours.get(task) else ""))
        if min(alone[task].values()) <= 0:
            lowest = min(alone[task].values())
            return Delta(None, "", f"{task} alone is {lowest:.3g}, so relative differences have no meaning")
    seeds = set.intersection(*(set(ours[task]) for task in tasks))
    common = [seed for seed in sorted(seeds) if all(seed in alone[task] for task in tasks)]
    if len(common) > 1:
        gains = [
            100 * fmean(signs[t] * (ours[t][seed] - alone[t][seed]) / alone[t][seed] for t in tasks) for seed in common
        ]
        return Delta(estimate(gains), "paired", "")
    if not seeds:
        return Delta(None, "", "no seed has all tasks")
    base = {task: fmean(alone[task].values()) for task in tasks}
    scale = {task: 100 * signs[task] / (len(tasks) * base[task]) for task in tasks}
    sums = [sum(scale[t] * (ours[t][seed] - base[t]) for t in tasks) for seed in sorted(seeds)]
    if len(seeds) < 2 or any(len(alone[task]) < 2 for task in tasks):
        return Delta(
            Estimate(fmean(sums), None, min(len(seeds), *(len(alone[t]) for t in tasks))), "unpaired", "one seed"
        )
    parts: list[tuple[float, list[float]]] = [(1.0, sums)]
    for task in tasks:
        mean = fmean(ours[task][seed] for seed in seeds)
        parts.append((-scale[task] * mean / base[task], list(alone[task].values())))
    return Delta(welch([fmean(sums)], parts), "unpaired", "")
