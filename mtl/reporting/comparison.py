"""The numbers of one section: estimates, Δm, ranks, tests, costs, and which method validation would choose."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from statistics import fmean

from mtl.errors import UserError, suggest
from mtl.reporting.delta import Delta, delta
from mtl.reporting.estimates import Difference, Estimate, estimate, holm, mean_ranks, paired
from mtl.reporting.grouping import Method, Section
from mtl.reporting.naming import natural


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Args:
        task: the task's name.
        name: the metric's, or `loss`.
        mode: whether up (`max`) or down (`min`) is better, None if neither or not known.
        main: whether it is the task's main figure.
    """

    task: str
    name: str
    mode: str | None
    main: bool

    def __str__(self) -> str:
        return f"{self.task} {self.name}"

    @property
    def arrow(self) -> str:
        """Which way is better, for a table's head."""
        return {"max": "↑", "min": "↓"}.get(self.mode or "", "")


@dataclass(frozen=True)
class Tested:
    """One method's difference from the reference in one task's main figure, `holm` its p-value corrected."""

    method: Method
    figure: Figure
    difference: Difference
    holm: float | None


@dataclass(frozen=True)
class Choice:
    """What the validation split says of the methods.

    Args:
        order: the methods that can be ordered by it, best first; empty where none can.
        values: by seed, the same for all of them, their monitored values, in that order.
        monitor: what was monitored.
        why: why there is no choice, empty where there is one.
    """

    order: list[Method]
    values: list[dict[int, float]]
    monitor: str
    why: str


class Comparison:
    """Compares a section's methods.

    Args:
        section: with at least one method.
        reference: the label of the method that the others are tested against; None takes the one of equal weights, of
            several that which validation likes best, or else the first by name.
    """

    def __init__(self, section: Section, reference: str | None = None) -> None:
        self.section = section
        self.split = section.split
        self.choice = _choose(section.methods)
        rest = [method for method in section.methods if method not in self.choice.order]
        self.methods = [*self.choice.order, *rest]  # never in the order of the figures that are compared
        named = [method for method in section.methods if method.label == reference]
        self.asked = bool(named)
        self.equals = [method for method in self.methods if _is_equal(method)]
        self.reference = [*named, *self.equals, *section.methods][0]
        self.tasks = list(dict.fromkeys(task for method in section.methods for task in method.tasks))
        self.figures = _figures(section, self.tasks)

    @property
    def everything(self) -> list[Method]:
        """Methods and single-task runs."""
        return [*self.methods, *(single for group in self.section.singles.values() for single in group)]

    @cached_property
    def mains(self) -> list[Figure]:
        """Each task's main figure."""
        return [figure for figure in self.figures if figure.main]

    def estimate(self, method: Method, figure: Figure) -> Estimate | None:
        """The figure's mean over the method's seeds."""
        return estimate(list(method.values(self.split, figure.task, figure.name).values()))

    def alone(self, figure: Figure) -> Estimate | None:
        """The figure's mean over the task's single runs, where these have one setting."""
        singles = self.section.singles.get(figure.task, [])
        return self.estimate(singles[0], figure) if len(singles) == 1 else None

    def delta(self, method: Method, figures: Sequence[Figure] | None = None) -> Delta:
        """Δm over the tasks' main figures, or over those that are given."""
        chosen = [f for f in self.mains if f.task in method.tasks] if figures is None else list(figures)
        ours, alone, signs = {}, {}, {}
        for figure in chosen:
            if figure.mode is None:
                return Delta(None, "", f"it isn't known which way {figure} is better")
            single, _ = self.section.baseline(method, figure.task)
            if single is None:
                several = f"several settings of {figure.task} alone, none of them this method's"
                why = several if self.section.singles.get(figure.task) else f"no run of {figure.task} alone"
                return Delta(None, "", why)
            ours[figure.task] = method.values(self.split, figure.task, figure.name)
            alone[figure.task] = single.values(self.split, figure.task, figure.name)
            signs[figure.task] = 1 if figure.mode == "max" else -1
        return delta(ours, alone, signs) if chosen else Delta(None, "", "no figures")

    @cached_property
    def common_seeds(self) -> list[int]:
        """Seeds that all methods have."""
        return sorted(set.intersection(*(set(method.runs) for method in self.methods)))

    @cached_property
    def ranks(self) -> tuple[list[float], int] | None:
        """Each method's mean rank, and of how many columns, one for each task and seed; None where there are none."""
        columns = []
        for figure in self.mains:
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
        """Every other method against the reference, in each task's main figure."""
        found = []
        for method in self.methods:
            for figure in self.mains:
                if method is not self.reference and figure.task in method.tasks:
                    found.append((method, figure, self._difference(method, figure)))
        there = [difference.p for *_, difference in found if difference.p is not None]
        corrected = iter(holm(there))
        return [Tested(m, f, d, next(corrected) if d.p is not None else None) for m, f, d in found]

    def _difference(self, method: Method, figure: Figure) -> Difference:
        if figure.task not in self.reference.tasks:
            return Difference(None, None, "the reference hasn't this task")
        ours, theirs = (m.values(self.split, figure.task, figure.name) for m in (method, self.reference))
        found = paired(ours, theirs)
        if found.estimate is None and set(method.runs) & set(self.reference.runs):
            return Difference(None, None, "no seed in which both have a number")
        return found

    @cached_property
    def num_tests(self) -> int:
        """How many p-values there are, for which they are corrected."""
        return sum(test.holm is not None for test in self.tests)


def cost(method: Method, name: str) -> Estimate | None:
    """The mean over seeds of `seconds_per_step` or `memory_per_step` (bytes)."""
    found = [run.metrics.get(name) for run in method.runs.values()]
    return estimate([float(value) for value in found if value is not None])


def pairs_of(methods: Sequence[Method]) -> list[str]:
    """The pairs of tasks, `a~b`, whose gradients were compared in any run."""
    runs = [run for method in methods for run in method.runs.values()]
    return list(dict.fromkeys(pair for run in runs for pair in run.metrics.get("cosine") or {}))


def hardest(methods: Sequence[Method], most: int) -> list[str]:
    """The pairs of tasks, or so many of them: those with the lowest mean cosine over the methods."""
    pairs = pairs_of(methods)
    if len(pairs) <= most:
        return pairs
    means = {pair: fmean(e.mean for m in methods if (e := conflict(m, pair, "mean"))) for pair in pairs}
    return sorted(pairs, key=means.__getitem__)[:most]


def conflict(method: Method, pair: str, name: str) -> Estimate | None:
    """The mean over seeds of a pair's `mean` cosine, or of the share of measured steps that had it `below_zero`."""
    found = [(run.metrics.get("cosine") or {}).get(pair) for run in method.runs.values()]
    return estimate([float(told[name]) for told in found if told and told.get(name) is not None])


def side_by_side(comparison: Comparison) -> list[str]:
    """The launchers of runs that may have shared a machine with others."""
    runs = [run for method in comparison.everything for run in method.runs.values()]
    return sorted({str(run.metrics.get("launcher") or "basic") for run in runs} - {"basic"})


def check_names(sections: Sequence[Section], reference: str | None, pairs: Sequence[Sequence[str]]) -> None:
    """Looks whether any section has what was named on the command line.

    Raises:
        UserError: where none has.
    """
    methods = [method for section in sections for method in section.methods]
    labels = sorted({method.label for method in methods}, key=natural)
    tasks = sorted({task for method in methods for task in method.tasks}, key=natural)
    if reference is not None and reference not in labels:
        near, _, _ = suggest(reference, labels).partition(" (")
        possible = "; ".join(labels)  # they may hold commas
        raise UserError(f"--reference: there is no method '{reference}'{near} (possible: {possible})")
    for pair in pairs:
        if len(set(pair)) < 2:
            raise UserError(f"--pair: '{pair[0]}' twice; name two tasks of {', '.join(tasks)}")
        for name in pair:
            if name not in tasks:
                raise UserError(f"--pair: there is no task '{name}'{suggest(name, tasks)}")


def _is_equal(method: Method) -> bool:
    """Whether it is the plain sum of the losses."""
    weights = [task.get("weight", 1.0) for task in method.settings["tasks"].values()]
    alike = all(weight == weights[0] for weight in weights)
    return alike and str((method.settings.get("balancer") or {}).get("_target_")) == "mtl.balancers.Equal"


def _figures(section: Section, tasks: Sequence[str]) -> list[Figure]:
    """All figures of the split, task by task; a task's main one is its first that isn't the loss."""
    runs = [run for method in section.methods for run in method.runs.values()]
    kinds: dict[str, str | None] = {}
    for run in runs:
        kinds |= run.metrics.get("kinds") or {}
    found = []
    for task in tasks:
        named = dict.fromkeys(name for run in runs for name in (run.metrics.get(section.split) or {}).get(task) or {})
        names = [name for name in named if name != "loss"] + ["loss"] * ("loss" in named)
        for name in names:
            mode = kinds.get(f"{task}/{name}", "min" if name == "loss" else None)
            found.append(Figure(task, name, mode, main=name == names[0]))
    return found


def _monitor(method: Method) -> str | None:
    """What all of the method's runs monitor, None where there is no one thing, or no validation."""
    named = {str((run.metrics.get("best") or {}).get("monitor")) for run in method.runs.values() if run.validated}
    return named.pop() if len(named) == 1 and all(run.validated for run in method.runs.values()) else None


def _choose(methods: Sequence[Method]) -> Choice:
    """Orders the methods by what was monitored on validation, over common seeds, where that is honest.

    Methods that monitor another thing than more than half of them do have no place. The seeds are those that more than
    half of the rest have, and methods without all of these have none either: a few runs that failed, each with another
    seed, would leave no seed for anybody. If that leaves no two methods, the seeds are those that all of them have.
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
        return none("validation and test are the same data, so choosing by either uses the test split")
    if not any(run.validated for run in runs):
        return none("there is no validation")
    if not all(isinstance(b.get("value"), int | float) and isfinite(b["value"]) for b in best):
        return none("not every run has a monitored value on validation")
    different = {str(b.get("monitor")) for b in best}
    if len(different) > 1:
        return none(f"the runs monitor different things: {'; '.join(sorted(different))}")
    mode = best[0].get("mode")
    if mode not in ("max", "min"):
        return none("it isn't known which way the monitored value is better")
    held = Counter(seed for method in methods for seed in method.runs)
    seeds = sorted(seed for seed, count in held.items() if 2 * count > len(methods))
    placed = [method for method in methods if set(seeds) <= set(method.runs)]
    if len(placed) < 2:
        seeds, placed = sorted(seed for seed, count in held.items() if count == len(methods)), list(methods)
    if not seeds:
        return none("no seed is common to all methods, and means over different ones may differ by these alone")
    values = {m.label: {seed: float(m.runs[seed].metrics["best"]["value"]) for seed in seeds} for m in placed}
    order = sorted(placed, key=lambda m: fmean(values[m.label].values()), reverse=mode == "max")
    return Choice(order, [values[m.label] for m in order], different.pop(), "")
