"""Two tasks against each other: which methods no other one beats in both, and how much they cover together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from mtl.reporting.comparison import Comparison, Figure
from mtl.reporting.estimates import Estimate, estimate
from mtl.reporting.grouping import Method

MOST_TASKS = 5  # of which every pair is shown without being asked for

Point = tuple[float, float]


def front(points: Sequence[Point], maximise: Sequence[bool]) -> list[bool]:
    """For each point whether no other one is at least as good in both and better in one."""
    import moocore

    return [bool(on) for on in moocore.is_nondominated(list(points), maximise=list(maximise), keep_weakly=True)]


def hypervolume(points: Sequence[Point], reference: Point, maximise: Sequence[bool]) -> float:
    """The area between the points' front and the reference point."""
    import moocore

    return float(moocore.hypervolume(list(points), ref=list(reference), maximise=list(maximise)))


@dataclass(frozen=True)
class Pair:
    """Two tasks' main figures of all methods that have both.

    Args:
        comparison: of whose methods.
        x, y: the figures.
        methods: those with both figures.
        points: their means.
    """

    comparison: Comparison
    x: Figure
    y: Figure
    methods: list[Method]
    points: list[tuple[Estimate, Estimate]]

    @property
    def maximise(self) -> list[bool]:
        """Whether more is better, of each figure."""
        return [figure.mode == "max" for figure in (self.x, self.y)]

    @cached_property
    def means(self) -> list[Point]:
        """The methods' means as plain points."""
        return [(x.mean, y.mean) for x, y in self.points]

    @cached_property
    def on_front(self) -> list[bool]:
        """For each method whether its mean is on the front of means."""
        return front(self.means, self.maximise)

    @cached_property
    def reference(self) -> Point:
        """The worst of either figure in any run of any of the methods."""
        worst = []
        for figure, more in zip((self.x, self.y), self.maximise, strict=True):
            values = [
                value
                for method in self.methods
                for value in method.values(self.comparison.split, figure.task, figure.name).values()
            ]
            worst.append(min(values) if more else max(values))
        return worst[0], worst[1]

    @cached_property
    def volume(self) -> float:
        """The hypervolume of the front of means."""
        return hypervolume(self.means, self.reference, self.maximise)

    @cached_property
    def volume_over_seeds(self) -> Estimate | None:
        """The hypervolume of each common seed's own front, from the same reference point; None without such seeds."""
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
    """The pairs of tasks that are wanted and there; all pairs where none is named and the tasks are few."""
    mains = {figure.task: figure for figure in comparison.mains}
    few = list(combinations(mains, 2)) if len(mains) <= MOST_TASKS else []
    found = []
    for one, other in [tuple(pair) for pair in wanted] or few:
        if one not in mains or other not in mains:
            continue
        x, y = mains[one], mains[other]
        pair = [(m, comparison.estimate(m, x), comparison.estimate(m, y)) for m in comparison.methods]
        there = [(m, (a, b)) for m, a, b in pair if a is not None and b is not None]
        if x.mode and y.mode and len(there) > 1:
            found.append(Pair(comparison, x, y, [m for m, _ in there], [p for _, p in there]))
    return found
