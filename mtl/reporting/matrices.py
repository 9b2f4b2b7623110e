"""Plots of metrics whose values are square matrices, such as confusion matrices."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl.loggers.pictures import MOST_NUMBERS, Array, shares
from mtl.reporting.axes import WIDTH, figure_of
from mtl.reporting.document import Picture
from mtl.reporting.grouping import Method
from mtl.reporting.svg import INK, SERIES, take
from mtl.reporting.writing import listed, shortened, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_METHODS = 6  # the most methods in a plot
MOST_CLASSES = 40  # the most classes in a plot
ACROSS = 3  # panels in a row
MOST_OF_NAME, MOST_OF_CLASS = 40, 12  # characters


def matrices(methods: Sequence[Method], split: str, name: str) -> list[Picture]:
    """Plots each metric whose values are matrices, with a panel for each method: the mean over its seeds.

    Args:
        methods: The methods of a section, in their order.
        split: The split of the matrices, `val` or `test`.
        name: The name of the section, used in file names.
    """
    runs = [run for method in methods for run in method.runs.values()]
    found = dict.fromkeys(
        (task, metric) for run in runs for task, named in _of(run.metrics, split).items() for metric in named
    )
    drawn = []
    for task, metric in found:
        panels = [(m.label, mean) for m in methods if (mean := _mean(m, split, task, metric)) is not None]
        classes = next((c for run in runs if (c := (run.metrics.get("classes") or {}).get(task))), None)
        if panels and len(panels[0][1]) <= MOST_CLASSES:
            drawn.append(_picture(f"{task} {metric}, {split} split", panels, classes, name))
    return drawn


def _of(metrics: Mapping[str, Any], split: str) -> dict[str, dict[str, Any]]:
    return (metrics.get("matrices") or {}).get(split) or {}


def _mean(method: Method, split: str, task: str, metric: str) -> Array | None:
    """Returns the mean over the method's seeds; None without any, or if their sizes differ."""
    values = [_of(run.metrics, split).get(task, {}).get(metric) for run in method.runs.values()]
    arrays = [np.array(value, dtype=np.float64) for value in values if value is not None]
    if not arrays or len({array.shape for array in arrays}) > 1:
        return None
    with np.errstate(all="ignore"):
        mean: Array = np.mean([shares(array)[0] for array in arrays], axis=0)
    return mean


def _picture(title: str, panels: Sequence[tuple[str, Array]], classes: Sequence[str] | None, section: str) -> Picture:
    shown = panels[:MOST_METHODS]
    across = min(len(shown), ACROSS)
    height = WIDTH / ACROSS * math.ceil(len(shown) / across)
    with figure_of(len(shown), across, height, width=WIDTH / ACROSS * across) as (figure, axes):
        for (label, values), ax in zip(shown, axes, strict=True):
            count = len(values)
            names = classes if classes is not None and len(classes) == count else [str(i) for i in range(count)]
            _panel(ax, values, [shortened(each, MOST_OF_CLASS) for each in names])
            ax.set_title(shortened(label, MOST_OF_NAME))
        name = f"{section}-{slug(title)}"
        few = f" The first {len(shown)} of {len(panels)} methods." * (len(shown) < len(panels))
        sizes = sorted({str(len(values)) for _, values in shown})
        note = f"Mean over seeds, {listed(sizes)} classes. Counts are shown as percentages of each true class.{few}"
        return Picture(name, title, take(figure, name, title, []), note)


def _panel(ax: "Axes", values: Array, names: Sequence[str]) -> None:
    from matplotlib.colors import ListedColormap, to_rgba

    finite = values[np.isfinite(values)]
    low, high = min(0.0, finite.min(initial=0.0)), finite.max(initial=0.0)
    steps = [to_rgba(SERIES[1], level) for level in np.linspace(0.02, 0.85, 64)]
    ax.pcolormesh(np.ma.masked_invalid(values), cmap=ListedColormap(steps), vmin=low, vmax=high or 1.0)
    ax.set_xticks(np.arange(len(names)) + 0.5, names, rotation=45, ha="right")
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.invert_yaxis()
    ax.set_aspect("equal")
    ax.grid(visible=False)
    ax.set_xlabel("predicted")
    ax.set_ylabel("truth")
    if len(names) <= MOST_NUMBERS:
        form = "{:.0f}" if high > 1 else "{:.2f}"
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                text = form.format(value)
                ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6, color=INK)
