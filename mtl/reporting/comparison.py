"""Computes the numbers of a section: estimates, Δm, ranks, tests, costs, and the choice by validation."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from statistics import fmean

from mtl.reporting.delta import Delta, delta
from mtl.reporting.estimates import Difference, Estimate, estimate, holm, mean_ranks, paired
from mtl.reporting.figures import Figure, figures_of, is_named
from mtl.reporting.grouping import Method, Section


@dataclass(frozen=True)
class Tested:
    """A method's difference from the reference in a task's main metric; `holm` is the corrected p-value."""

    method: Method
    figure: Figure
    difference: Difference
    holm: float | None


@dataclass(frozen=True)
class Choice:
    """The ranking of the methods by validation.

    Args:
        order: The methods that can be ranked, best first; empty if none can.
        values: The monitored values of these methods, in the same order, for each of the common seeds.
        monitor: The monitored metric.
        why: Why there is no ranking; empty if there is one.
    """

    order: list[Method]
    values: list[dict[int, float]]
    monitor: str
    why: str


class Comparison:
    """Compares the methods of a section.

    Args:
        section: A section with at least one method.
        reference: The label of the method that the others are tested against. Default: the method of equal weights; of
            several such methods the best one on validation, or the first by name.
        delta: The figures of Δm and the ranks: `task/figure`; `task/metric` for all figures of a metric that has
            several; or `all` for all figures whose better direction is known, without losses. Names that this section
            doesn't have are left out. Default: the main figure of each task.

    Attributes:
        mains: The main figure of each task.
        gained: The figures of Δm and the ranks, each of which counts once.
    """

    def __init__(self, section: Section, reference: str | None = None, delta: Sequence[str] = ()) -> None:
        self.section = section
        self.split = section.split
        self.choice = _choose(section.methods)
        rest = [method for method in section.methods if method not in self.choice.order]
        self.methods = [*self.choice.order, *rest]  # never ordered by the compared metrics
        named = [method for method in section.methods if method.label == reference]
        self.asked = bool(named)
        self.equals = [method for method in self.methods if _is_equal(method)]
        self.reference = [*named, *self.equals, *section.methods][0]
        self.tasks = list(dict.fromkeys(task for method in section.methods for task in method.tasks))
        self.figures = figures_of(section, self.tasks)
        self.mains = [figure for figure in self.figures if figure.main]
        self.gained = [f for f in self.figures if any(is_named(name, f) for name in delta)] if delta else self.mains

    @property
    def data(self) -> str:
        """Returns the name of the split on whose data the figures are measured."""
        return "val" if self.split == "last" else self.split

    @property
    def means(self) -> str:
        """Describes the means over epochs, if the figures are such means; else empty."""
        if self.split != "last":
            return ""
        runs = [run for method in self.methods for run in method.runs.values()]
        counts = sorted({run.metrics.get("last_epochs") or 0 for run in runs} - {0})
        return f", means over the last {'–'.join(map(str, dict.fromkeys([*counts[:1], *counts[-1:]])))} epochs"

    @property
    def everything(self) -> list[Method]:
        """Returns all methods and the single-task runs."""
        return [*self.methods, *(single for group in self.section.singles.values() for single in group)]

    def estimate(self, method: Method, figure: Figure) -> Estimate | None:
        """Returns the mean of the metric over the method's seeds."""
        return estimate(list(method.values(self.split, figure.task, figure.name).values()))

    def alone(self, figure: Figure) -> Estimate | None:
        """Returns the mean of the metric over the task's single-task runs, if all of them have the same settings."""
        singles = self.section.singles.get(figure.task, [])
        return self.estimate(singles[0], figure) if len(singles) == 1 else None

    def delta(self, method: Method, task: str | None = None) -> Delta:
        """Returns Δm over `gained`, or over those of one task."""
        chosen = [f for f in self.gained if f.task in ([task] if task else method.tasks)]
        ours, alone, signs = {}, {}, {}
        for figure in chosen:
            if figure.mode is None:
                return Delta(None, "", f"it isn't known whether higher or lower {figure} is better")
            single, _ = self.section.baseline(method, figure.task)
            if single is None:
                several = f"runs of {figure.task} alone have several settings, none of them this method's"
                why = several if self.section.singles.get(figure.task) else f"no run of {figure.task} alone"
                return Delta(None, "", why)
            name = f"{figure.task}/{figure.name}"
            ours[name] = method.values(self.split, figure.task, figure.name)
            alone[name] = single.values(self.split, figure.task, figure.name)
            signs[name] = 1 if figure.mode == "max" else -1
        return delta(ours, alone, signs) if chosen else Delta(None, "", "no figures")

    @cached_property
    def common_seeds(self) -> list[int]:
        """Returns the seeds that all methods have."""
        return sorted(set.intersection(*(set(method.runs) for method in self.methods)))

    @cached_property
    def ranks(self) -> tuple[list[float], int] | None:
        """Returns each method's mean rank and the number of ranked pairs of figure and seed; None if there are none."""
        columns = []
        for figure in self.gained:
            sign = {"max": -1, "min": 1}.get(figure.mode or "")
            values = [method.values(self.split, figure.task, figure.name) for method in self.methods]
            for seed in self.common_seeds if sign else []:
                if all(seed in value for value in values):
                    columns.append([(sign or 1) * value[seed] for value in values])
        if len(self.methods) < 2 or not columns:
            return None
        return mean_ranks(columns), len(columns)

    @cached_property
    def tests(self) -> list[Tested]:
        """Returns the test of each method against the reference, for each task's main metric."""
        differences = []
        for method in self.methods:
            for figure in self.mains:
                if method is not self.reference and figure.task in method.tasks:
                    differences.append((method, figure, self._difference(method, figure)))
        p_values = [difference.p for *_, difference in differences if difference.p is not None]
        corrected = iter(holm(p_values))
        return [Tested(m, f, d, next(corrected) if d.p is not None else None) for m, f, d in differences]

    def _difference(self, method: Method, figure: Figure) -> Difference:
        if figure.task not in self.reference.tasks:
            return Difference(None, None, "the reference doesn't have this task")
        ours, theirs = (m.values(self.split, figure.task, figure.name) for m in (method, self.reference))
        difference = paired(ours, theirs)
        if difference.estimate is None and set(method.runs) & set(self.reference.runs):
            return Difference(None, None, "no common seed in which both have a number")
        return difference

    @cached_property
    def num_tests(self) -> int:
        """The number of p-values, for which they are corrected."""
        return sum(test.holm is not None for test in self.tests)


def cost(method: Method, name: str) -> Estimate | None:
    """Returns the mean over seeds of `seconds_per_step` or `memory_per_step` (bytes)."""
    values = [run.metrics.get(name) for run in method.runs.values()]
    return estimate([float(value) for value in values if value is not None])


def pairs_of(methods: Sequence[Method]) -> list[str]:
    """Returns the pairs of tasks, `a~b`, whose gradients were compared in any run."""
    runs = [run for method in methods for run in method.runs.values()]
    return list(dict.fromkeys(pair for run in runs for pair in run.metrics.get("cosine") or {}))


def hardest(methods: Sequence[Method], most: int) -> list[str]:
    """Returns the pairs of tasks, at most `most`: those with the lowest mean cosine over the methods."""
    pairs = pairs_of(methods)
    if len(pairs) <= most:
        return pairs
    means = {pair: fmean(e.mean for m in methods if (e := conflict(m, pair, "mean"))) for pair in pairs}
    return sorted(pairs, key=means.__getitem__)[:most]


def conflict(method: Method, pair: str, name: str) -> Estimate | None:
    """Returns the mean over seeds of a pair's `mean` cosine, or of the share of cosines `below_zero`."""
    cosines = [(run.metrics.get("cosine") or {}).get(pair) for run in method.runs.values()]
    return estimate([float(each[name]) for each in cosines if each and each.get(name) is not None])


def side_by_side(comparison: Comparison) -> list[str]:
    """Returns the launchers of runs that may have shared a machine with other runs."""
    runs = [run for method in comparison.everything for run in method.runs.values()]
    return sorted({str(run.metrics.get("launcher") or "basic") for run in runs} - {"basic"})


def _is_equal(method: Method) -> bool:
    """Returns whether the method is the plain sum of the losses."""
    weights = [task.get("weight", 1.0) for task in method.settings["tasks"].values()]
    alike = all(weight == weights[0] for weight in weights)
    return alike and str((method.settings.get("balancer") or {}).get("_target_")) == "mtl.balancers.Equal"


def _monitor(method: Method) -> str | None:
    """Returns the monitor of all runs of the method; None if the monitors differ or if there was no validation."""
    named = {str((run.metrics.get("best") or {}).get("monitor")) for run in method.runs.values() if run.validated}
    return named.pop() if len(named) == 1 and all(run.validated for run in method.runs.values()) else None


def _choose(methods: Sequence[Method]) -> Choice:
    """Ranks the methods by the monitored values on validation over common seeds, if this is a fair comparison.

    Methods with another monitor than the majority aren't ranked. The seeds are those that a majority of the remaining
    methods has, and methods without all of these seeds aren't ranked either; otherwise a few failed runs, each with
    another seed, would leave no common seed. If fewer than two methods remain, the seeds are those that all methods
    have.
    """

    def none(why: str) -> Choice:
        return Choice([], [], "", why)

    monitors = Counter(_monitor(method) for method in methods)
    most, count = monitors.most_common(1)[0]
    if most is not None and 2 * count > len(methods):
        methods = [method for method in methods if _monitor(method) == most]
    runs = [run for method in methods for run in method.runs.values()]
    best = [run.metrics.get("best") or {} for run in runs]

    if any(run.chosen_on_test for run in runs):
        return none("validation and test are the same data, so choosing by either would use the test split")
    if not any(run.validated for run in runs):
        return none("there is no validation")
    if not all(isinstance(b.get("value"), int | float) and isfinite(b["value"]) for b in best):
        return none("not every run has a monitored value on validation")
    different = {str(b.get("monitor")) for b in best}
    if len(different) > 1:
        return none(f"the runs monitor different things: {'; '.join(sorted(different))}")
    mode = best[0].get("mode")
    if mode not in ("max", "min"):
        return none("it isn't known whether higher or lower monitored values are better")
    held = Counter(seed for method in methods for seed in method.runs)
    seeds = sorted(seed for seed, count in held.items() if 2 * count > len(methods))
    placed = [method for method in methods if set(seeds) <= set(method.runs)]
    if len(placed) < 2:
        seeds, placed = sorted(seed for seed, count in held.items() if count == len(methods)), list(methods)
    if not seeds:
        return none("no seed is common to all methods, and means over different seeds may differ for this reason alone")
    values = {m.label: {seed: float(m.runs[seed].metrics["best"]["value"]) for seed in seeds} for m in placed}
    order = sorted(placed, key=lambda m: fmean(values[m.label].values()), reverse=mode == "max")
    return Choice(order, [values[m.label] for m in order], different.pop(), "")
