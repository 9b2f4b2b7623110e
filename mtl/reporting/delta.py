"""Δm: the mean improvement of a method over single-task models (Maninis et al. 2019, arXiv 1904.08918)."""

from collections.abc import Mapping, Sequence
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
    """Computes the mean over figures of the signed relative difference (ours - alone) / alone, in percent.

    With at least two common seeds, Δm is computed for each seed, and the interval is over the seeds. Otherwise it is
    computed from the means, with an interval by the delta method: the seeds of the method, each of which has all
    figures, and the seeds of each task's single-task runs are independent, so that their variances add up. The figures
    of one task are measured in the same single-task runs, so that they are summed for each seed first.

    Args:
        ours: The method's values, by figure: `task/name`, or `task` if there is one figure for each task.
        alone: The values of the single-task runs, by figure; the interval includes the spread of these values.
        signs: By figure, 1 if higher is better and -1 if lower is better.
    """
    figures = list(signs)
    for figure in figures:
        if not ours.get(figure) or not alone.get(figure):
            return Delta(None, "", f"no value of {figure}" + (" alone" if ours.get(figure) else ""))
        if min(alone[figure].values()) <= 0:
            lowest = min(alone[figure].values())
            return Delta(None, "", f"{figure} alone is {lowest:.3g}, so relative differences have no meaning")
    seeds = _common(ours, figures)
    paired = [seed for seed in seeds if all(seed in alone[figure] for figure in figures)]
    if len(paired) > 1:
        gains = [
            100 * fmean(signs[f] * (ours[f][seed] - alone[f][seed]) / alone[f][seed] for f in figures)
            for seed in paired
        ]
        return Delta(estimate(gains), "paired", "")
    if not seeds:
        return Delta(None, "", f"no seed has all {'figures' if any('/' in f for f in figures) else 'tasks'}")
    by_task: dict[str, list[str]] = {}
    for figure in figures:
        by_task.setdefault(figure.split("/")[0], []).append(figure)
    single = {task: _common(alone, named) for task, named in by_task.items()}
    if lacking := [task for task, of_task in single.items() if not of_task]:
        return Delta(None, "", f"no seed of {lacking[0]} alone has all figures")
    return _of_means(ours, alone, signs, seeds, {task: (named, single[task]) for task, named in by_task.items()})


def _common(values: Mapping[str, Values], figures: Sequence[str]) -> list[int]:
    """Returns the seeds that have all figures."""
    return sorted(set.intersection(*(set(values[figure]) for figure in figures)))


def _of_means(
    ours: Mapping[str, Values],
    alone: Mapping[str, Values],
    signs: Mapping[str, int],
    seeds: Sequence[int],
    tasks: Mapping[str, tuple[Sequence[str], Sequence[int]]],
) -> Delta:
    """Computes Δm from means over seeds, with an interval by the delta method if there are several seeds.

    Args:
        ours, alone, signs: See `delta`.
        seeds: The seeds of the method.
        tasks: By task, the names of its figures and the seeds of its single-task runs.
    """
    base = {f: fmean(alone[f][seed] for seed in singles) for figures, singles in tasks.values() for f in figures}
    scale = {figure: 100 * signs[figure] / (len(signs) * base[figure]) for figure in signs}
    sums = [sum(scale[f] * (ours[f][seed] - base[f]) for f in signs) for seed in seeds]
    fewest = min(len(seeds), *(len(singles) for _, singles in tasks.values()))
    if fewest < 2:
        return Delta(Estimate(fmean(sums), None, fewest), "unpaired", "one seed")
    parts: list[tuple[float, list[float]]] = [(1.0, sums)]
    for figures, singles in tasks.values():
        slopes = {f: -scale[f] * fmean(ours[f][seed] for seed in seeds) / base[f] for f in figures}
        parts.append((1.0, [sum(slopes[f] * alone[f][seed] for f in figures) for seed in singles]))
    return Delta(welch([fmean(sums)], parts), "unpaired", "")
