"""The plots: final metrics, curves with bands, conflict over time, and pairs of tasks."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtl import tags
from mtl.reporting.axes import WIDTH, figure_of, logarithmic, name_points, staircase
from mtl.reporting.comparison import Comparison, hardest
from mtl.reporting.curves import Curves
from mtl.reporting.document import Picture
from mtl.reporting.estimates import Estimate
from mtl.reporting.pareto import Pair
from mtl.reporting.svg import INK, MUTED, PALE, SERIES, take
from mtl.reporting.writing import number, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL_COLOURED = len(SERIES)  # the most methods with a colour each; further methods are grey
HIGHLIGHTED = 6  # the number of methods in colour if there are more methods than colours
MOST_OF_NAME = 60  # characters of a name next to a plot
MOST_SHOWN = 12  # the most tasks, or pairs of tasks, in one plot
POINTS = 40_000  # the most points of all curves of a plot together
MOST_POINTS = 150  # the most points of one curve
MOST_COSINES = 30  # the most points of a curve of cosines, which are noisy
DASHED: Any = {"color": MUTED, "ls": (0, (4, 3)), "lw": 1}
DASHES = ["-", "-", "-", "-", "-", "--", "--", "--"]


class Plots:
    """The plots of one section.

    Args:
        comparison: The comparison of the section.
        curves: The logged curves of the section's methods.
        name: The name of the section, used in file names.
    """

    def __init__(self, comparison: Comparison, curves: Curves, name: str) -> None:
        self.comparison = comparison
        self.curves = curves
        self.name = name
        methods = comparison.methods
        rest = [method for method in methods if method is not comparison.reference]
        shown = [comparison.reference, *rest]
        shown = shown if len(shown) <= ALL_COLOURED else shown[:HIGHLIGHTED]
        self.highlighted = [method for method in methods if method in shown]
        self._colours = {method.label: SERIES[index] for index, method in enumerate(shown)}
        self._dashes = {method.label: DASHES[index] for index, method in enumerate(shown)}
        self._numbers = {method.label: index for index, method in enumerate(methods)}

    @property
    def legend(self) -> str:
        """Explains the colours if not every method has its own colour."""
        if len(self.highlighted) == len(self.comparison.methods):
            return ""
        by = f"the first {len(self.highlighted) - 1} by {'validation' if self.comparison.choice.order else 'name'}"
        return f"In colour: the reference and {by}; others are grey, with their names on hover."

    def reached(self) -> Picture:
        """Plots all methods' main metrics and Δm as points with intervals."""
        comparison = self.comparison
        deltas = {m.label: d.estimate for m in comparison.methods if (d := comparison.delta(m)).estimate}
        mains = comparison.mains[: MOST_SHOWN - 1 if deltas else MOST_SHOWN]
        panels: list[tuple[str, dict[str, Estimate], Estimate | float | None]] = [
            (
                f"{figure}{figure.arrow}",
                {m.label: e for m in comparison.methods if (e := comparison.estimate(m, figure))},
                comparison.alone(figure),
            )
            for figure in mains
        ]
        if deltas:
            panels.append(("Δm, %↑", deltas, 0.0))
        across = min(len(panels), 4)
        down = math.ceil(len(panels) / across)
        tall = 0.62 + 0.19 * len(comparison.methods)
        with figure_of(len(panels), across, tall * down, sharey=True) as (figure, axes):
            for place, ax in zip(panels, axes, strict=True):
                self._rows(ax, *place)
            labels = [method.label for method in comparison.methods]
            axes[0].set_yticks(range(len(labels)), [shortened(label, MOST_OF_NAME) for label in labels])
            axes[0].set_ylim(len(labels) - 0.4, -0.6)
            for tick, method in zip(axes[0].get_yticklabels(), comparison.methods, strict=True):
                tick.set_color(self._colours.get(method.label, MUTED))
            title = f"Figures of the methods, {comparison.data} split{comparison.means}"
            few = f" The first {len(mains)} of {len(comparison.mains)} tasks." * (len(mains) < len(comparison.mains))
            alone = any(single is not None for *_, single in panels)
            dashed = " Dashed: the task alone, with a shaded interval; for Δm, zero." * alone
            return Picture(
                f"{self.name}-reached",
                title,
                take(figure, f"{self.name}-reached", title, labels),
                f"Mean over seeds and 95 % interval.{dashed}{few} {self.legend}".strip(),
            )

    def training(self) -> Picture | None:
        """Plots loss and main metric of each task over the steps, if they were logged."""
        tasks = self.comparison.tasks[:MOST_SHOWN]
        mains = {main.task: main for main in self.comparison.mains if main.name != "loss"}
        panels: list[tuple[str, str, bool | None]] = []
        for task in tasks:
            panels.append((f"{task} loss, training", tags.loss(task, "train"), True))
            panels.append((f"{task} loss, validation", tags.loss(task, "val"), True))
            if main := mains.get(task):
                panels.append((f"{main}, validation", tags.metric(task, main.name, "val"), False))
        logged = set(self.curves.tags())
        few = f" The first {len(tasks)} of {len(self.comparison.tasks)} tasks." * (tasks != self.comparison.tasks)
        return self._curves(
            "training",
            "Losses and figures during training",
            [panel for panel in panels if panel[1] in logged],
            3 if mains else 2,
            MOST_POINTS,
            "Mean over seeds, with the 95 % interval as a band, at the steps that all seeds of a method have. Losses "
            f"that span more than a factor of 10 have a logarithmic scale. Long curves are averaged over windows.{few}",
        )

    def conflict(self) -> Picture | None:
        """Plots the cosine between the gradients of each pair of tasks over the steps."""
        logged = set(self.curves.tags())
        pairs = [pair for pair in hardest(self.comparison.methods, MOST_SHOWN) if tags.cosine_of(pair) in logged]
        return self._curves(
            "conflict",
            "Conflict between tasks during training",
            [(" and ".join(tags.tasks_of(pair)), tags.cosine_of(pair), None) for pair in pairs],
            min(3, len(pairs)),
            MOST_COSINES,
            "Cosine between the tasks' gradients over the shared parameters, mean over seeds with the 95 % interval; "
            "below zero the gradients conflict. Long curves are averaged over windows.",
        )

    def pareto(self, pairs: Sequence[Pair]) -> Picture:
        """Plots the main metrics of each pair of tasks against each other."""
        across = min(len(pairs), 2 if len(pairs) < 5 else 3)
        down = math.ceil(len(pairs) / across)
        title = "Two tasks against each other"
        dashed = " Dashed: the tasks alone." * bool(self.comparison.section.singles)
        tall = down * (3.3 if across == 3 else 3.9)
        with figure_of(len(pairs), across, tall, width=6.2 if across == 1 else WIDTH) as (figure, axes):
            for pair, ax in zip(pairs, axes, strict=True):
                self._pair(ax, pair)
            self._legend(figure)
            figure.draw_without_rendering()  # determines the positions of the points
            for pair, ax in zip(pairs, axes, strict=True):
                self._name(ax, pair)
            name = f"{self.name}-pareto"
            return Picture(
                name,
                title,
                take(figure, name, title, [method.label for method in self.comparison.methods]),
                "Mean over seeds and 95 % interval of the methods' main figures. Circles and line: the front, the "
                "methods that no other method beats in both means. The shaded area, up to the reference point (cross), "
                f"is the hypervolume.{dashed} {self.legend}".strip(),
            )

    def _rows(self, ax: "Axes", title: str, estimates: dict[str, Estimate], alone: Estimate | float | None) -> None:
        ax.set_title(title)
        ax.grid(visible=False, axis="y")
        if alone is not None:
            ax.axvline(alone.mean if isinstance(alone, Estimate) else alone, **DASHED)
        if isinstance(alone, Estimate) and alone.low is not None and alone.high is not None:
            ax.axvspan(alone.low, alone.high, color=MUTED, alpha=0.13, lw=0)
        for method in self.comparison.methods:
            entry = estimates.get(method.label)
            if entry is not None:
                row, colour = self._numbers[method.label], self._colours.get(method.label, MUTED)
                gid = f"method-{row}"
                if entry.half is not None:
                    ax.plot(
                        [entry.mean - entry.half, entry.mean + entry.half], [row, row], color=colour, gid=gid, lw=1.6
                    )
                ax.plot([entry.mean], [row], "o", color=colour, gid=gid, ms=4.5)

    def _curves(
        self, kind: str, title: str, panels: Sequence[tuple[str, str, bool | None]], across: int, most: int, note: str
    ) -> Picture | None:
        """Plots curves with bands, one panel per title and tag; returns None if nothing was logged.

        Each panel is a tuple (title, tag, log); `log` is True if a logarithmic scale is allowed, and None if a line is
        drawn at zero instead.
        """
        if not panels:
            return None
        methods = self.comparison.methods
        points = max(20, min(most, POINTS // (len(panels) * len(methods))))
        down = math.ceil(len(panels) / across)
        with figure_of(len(panels), across, 0.6 + 1.95 * down) as (figure, axes):
            order = sorted(methods, key=lambda method: method in self.highlighted)
            for (name, tag, may_be_log), ax in zip(panels, axes, strict=True):
                ax.set_title(name)
                bands = [(m, band) for m in order if (band := self.curves.band(m, tag, points)) is not None]
                for method, band in bands:
                    colour = self._colours.get(method.label, PALE)
                    strong = method in self.highlighted
                    gid = f"method-{self._numbers[method.label]}"
                    if strong and band.low is not None and band.high is not None:
                        ax.fill_between(band.steps, band.low, band.high, color=colour, alpha=0.16, lw=0, gid=gid)
                    dash = self._dashes.get(method.label, "-")
                    one = "o" if len(band.steps) == 1 else None
                    ax.plot(
                        band.steps, band.mean, dash, color=colour, lw=1.5 if strong else 0.6, gid=gid, marker=one, ms=3
                    )
                means = [value for _, band in bands for value in band.mean.tolist() if math.isfinite(value)]
                if may_be_log is None:
                    ax.axhline(0, color=MUTED, lw=0.8)
                    low, high = ax.get_ylim()
                    ax.set_ylim(max(low, -1.05), min(high, 1.05))  # few seeds have wide intervals
                elif means:
                    low, high = min(means), max(means)
                    if may_be_log and low > 0 and high > 10 * low:
                        logarithmic(ax, low / 1.3, high * 1.3)
                    else:
                        room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
                        ax.set_ylim(low - room, high + room)
            for ax in axes[-across:]:
                ax.set_xlabel("step")
            self._legend(figure)
            name = f"{self.name}-{kind}"
            svg = take(figure, name, title, [method.label for method in methods])
            return Picture(name, title, svg, f"{note} {self.legend}".strip())

    def _legend(self, figure: Any) -> None:
        from matplotlib.lines import Line2D

        names = {m.label: shortened(m.label, MOST_OF_NAME) for m in self.highlighted}
        handles = [
            Line2D([], [], color=self._colours[label], ls=self._dashes[label], label=name)
            for label, name in names.items()
        ]
        if len(self.highlighted) < len(self.comparison.methods):
            handles.append(Line2D([], [], color=PALE, lw=0.8, label="others"))
        longest = max(map(len, names.values()))
        columns = max(1, min(len(handles), 150 // (longest + 8)))
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.8, borderpad=0.2)

    def _pair(self, ax: "Axes", pair: Pair) -> None:
        comparison = self.comparison
        ax.set_xlabel(f"{pair.x}{'→' if pair.maximise[0] else '←'}")
        ax.set_ylabel(f"{pair.y}{pair.y.arrow}")
        for figure, line in ((pair.x, ax.axvline), (pair.y, ax.axhline)):
            if (alone := comparison.alone(figure)) is not None:
                line(alone.mean, **DASHED)
        front = sorted(point for point, on in zip(pair.means, pair.on_front, strict=True) if on)
        corners = staircase(front, pair.reference, pair.maximise)
        ax.fill(*zip(*corners, strict=True), color=MUTED, alpha=0.08, lw=0)
        ax.plot(*zip(*corners[1:-1], strict=True), color=MUTED, lw=0.9)
        ax.plot(*pair.reference, "x", color=MUTED, ms=5)
        drawn = list(zip(pair.methods, pair.points, pair.on_front, strict=True))
        for method, (x, y), on in sorted(drawn, key=lambda each: each[0] in self.highlighted):
            strong = method in self.highlighted
            colour = self._colours.get(method.label, PALE)
            gid = f"method-{self._numbers[method.label]}"
            if strong or on:
                ax.errorbar(x.mean, y.mean, xerr=x.half, yerr=y.half, color=colour, lw=0.9, alpha=0.7, gid=gid)
            if on:
                ax.plot(x.mean, y.mean, "o", color=INK, ms=9.5, fillstyle="none", markeredgewidth=0.9)
            ax.plot(x.mean, y.mean, "o", color=colour, ms=6, gid=gid)
        ax.margins(0.06)
        volume = ax.text(0.02, 0.02, f"hypervolume {number(pair.volume)}", color=MUTED, fontsize=7.5)
        volume.set_transform(ax.transAxes)
        volume.set_in_layout(False)

    def _name(self, ax: "Axes", pair: Pair) -> None:
        """Labels the methods on the front, except those in the legend."""
        on_front = zip(pair.methods, pair.means, pair.on_front, strict=True)
        named = [(method.label, point) for method, point, on in on_front if on and method not in self.highlighted]
        name_points(ax, named, pair.means)
