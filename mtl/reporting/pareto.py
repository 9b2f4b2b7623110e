"""Compares methods in two tasks at once: the Pareto front and the hypervolume."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from mtl.reporting.comparison import Comparison
from mtl.reporting.estimates import Estimate, estimate
from mtl.reporting.figures import Figure
from mtl.reporting.grouping import Method

MOST_TASKS = 5  # the most tasks for which all pairs are shown by default

Point = tuple[float, float]


def front(points: Sequence[Point], maximise: Sequence[bool]) -> list[bool]:
    """Returns, for each point, whether no other point is at least as good in both metrics and better in one."""
    import moocore

    return [bool(on) for on in moocore.is_nondominated(list(points), maximise=list(maximise), keep_weakly=True)]


def hypervolume(points: Sequence[Point], reference: Point, maximise: Sequence[bool]) -> float:
    """Returns the area between the points' front and the reference point."""
    import moocore

    return float(moocore.hypervolume(list(points), ref=list(reference), maximise=list(maximise)))


@dataclass(frozen=True)
class Pair:
    """The main metrics of two tasks, for all methods that have both.

    Args:
        comparison: The comparison of the methods.
        x, y: The metrics.
        methods: The methods with both metrics.
        points: The means of the methods.
    """

    comparison: Comparison
    x: Figure
    y: Figure
    methods: list[Method]
    points: list[tuple[Estimate, Estimate]]

    @property
    def maximise(self) -> list[bool]:
        """Whether higher is better, for each of the two metrics."""
        return [figure.mode == "max" for figure in (self.x, self.y)]

    @cached_property
    def means(self) -> list[Point]:
        """The means of the methods as plain points."""
        return [(x.mean, y.mean) for x, y in self.points]

    @cached_property
    def on_front(self) -> list[bool]:
        """Whether each method's mean is on the front of the means."""
        return front(self.means, self.maximise)

    @cached_property
    def reference(self) -> Point:
        """The worst value of each metric in any run of any of the methods."""
        worst = []
        for figure, higher_is_better in zip((self.x, self.y), self.maximise, strict=True):
            values = [
                value
                for method in self.methods
                for value in method.values(self.comparison.split, figure.task, figure.name).values()
            ]
            worst.append(min(values) if higher_is_better else max(values))
        return worst[0], worst[1]

    @cached_property
    def volume(self) -> float:
        """The hypervolume of the front of the means."""
        return hypervolume(self.means, self.reference, self.maximise)

    @cached_property
    def volume_over_seeds(self) -> Estimate | None:
        """The mean hypervolume of the common seeds' fronts, for one reference point; None if there are none."""
        volumes = []
        for seed in self.comparison.common_seeds:
            pairs = [
                [method.values(self.comparison.split, f.task, f.name).get(seed) for f in (self.x, self.y)]
                for method in self.methods
            ]
            points = [(x, y) for x, y in pairs if x is not None and y is not None]
            if len(points) == len(self.methods):
                volumes.append(hypervolume(points, self.reference, self.maximise))
        return estimate(volumes)


def pairs_to_show(comparison: Comparison, wanted: Sequence[Sequence[str]] = ()) -> list[Pair]:
    """Returns the wanted pairs of tasks that exist; all pairs if none is named and there are few tasks."""
    mains = {figure.task: figure for figure in comparison.mains}
    few = list(combinations(mains, 2)) if len(mains) <= MOST_TASKS else []
    pairs = []
    for one, other in [tuple(pair) for pair in wanted] or few:
        if one not in mains or other not in mains:
            continue
        x, y = mains[one], mains[other]
        pair = [(m, comparison.estimate(m, x), comparison.estimate(m, y)) for m in comparison.methods]
        complete = [(m, (a, b)) for m, a, b in pair if a is not None and b is not None]
        if x.mode and y.mode and len(complete) > 1:
            pairs.append(Pair(comparison, x, y, [m for m, _ in complete], [p for _, p in complete]))
    return pairs
