"""Axes of plots: panels, scales, and labels next to points."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from mtl.reporting.svg import INK, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 10.5  # inches
MOST_ACROSS, MOST_LINES = 22, 3  # characters per line and lines of a point's label
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top


def logarithmic(ax: "Axes", low: float, high: float) -> None:
    """Gives the y axis a logarithmic scale with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def name_points(ax: "Axes", named: Sequence[tuple[str, Point]], points: Sequence[Point]) -> None:
    """Labels some of the points, inside the axes and where labels overlap other labels and points the least."""
    scale = 72 / ax.figure.dpi

    def place(point: Point) -> Point:
        x, y = ax.transData.transform(point) * scale
        return float(x), float(y)

    left, bottom, right, top = (float(end) * scale for end in ax.bbox.extents)
    covered: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in map(place, points)]
    for label, point in named:
        x, y = place(point)
        lines = wrap(label, MOST_ACROSS, max_lines=MOST_LINES, placeholder=" …") or [label]
        wide, tall = 4.4 * max(map(len, lines)), 9.0 * len(lines)
        offsets = [(a, up) for up in (2.0, -2 - tall, 12.0, -12 - tall) for a in (6.0, -6 - wide)]
        boxes = [(x + across, y + up, x + across + wide, y + up + tall) for across, up in offsets]
        outside = [wide * tall - _overlap(box, (left, bottom, right, top)) for box in boxes]
        overlaps = [sum(_overlap(box, other) for other in covered) for box in boxes]
        costs = [out + over for out, over in zip(outside, overlaps, strict=True)]
        best = costs.index(min(costs))
        covered.append(boxes[best])
        style: Any = {"textcoords": "offset points", "fontsize": 7.5, "color": INK, "va": "bottom"}
        text = ax.annotate("\n".join(lines), point, xytext=offsets[best], **style)
        text.set_in_layout(False)  # or the longest label would leave no room for the panels


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, tall)


def staircase(front: Sequence[Point], reference: Point, maximise: Sequence[bool]) -> list[Point]:
    """Returns the corners of the area between a front, sorted by the first metric, and the reference point."""
    ordered = list(front) if maximise[0] else list(front)[::-1]  # ordered by distance from the reference point
    corners = [reference, (reference[0], ordered[0][1])]
    for index, point in enumerate(ordered):
        corners.append(point)
        following = ordered[index + 1][1] if index + 1 < len(ordered) else reference[1]
        corners.append((point[0], following))
    return corners


@contextmanager
def figure_of(
    count: int, across: int, height: float, *, width: float = WIDTH, sharey: bool = False
) -> Iterator[tuple[Any, list["Axes"]]]:
    """Yields a figure of `count` panels, `across` in a row, and the list of the panels."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(math.ceil(count / across), across, sharey=sharey, squeeze=False).ravel().tolist()
        for ax in axes[count:]:
            ax.set_visible(False)
        yield figure, axes[:count]
