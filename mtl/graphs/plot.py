"""Plots the memory over a step, with the phases in their tasks' colours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl.graphs.colours import MANY, colours
from mtl.graphs.life import Event, Life

LETTER = 0.0075  # the width of a letter as a fraction of the panel
EXPLAINED = 12  # the most colours in the legend


def plot(lives: Mapping[str, Life], path: Path) -> list[Path]:
    """Plots the bytes held for the backward pass over a step, one panel per kind of passes, as SVG and PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(name for life in lives.values() for e in life.events for name in e.phase.of))
    palette = colours(names)
    peak = max(life.peak for life in lives.values()) or 1
    power = next(power for power in (3, 2, 1, 0) if peak >= 1000**power)
    figure = Figure(figsize=(9, 0.7 + 2.2 * len(lives)), layout="constrained")
    panels = figure.subplots(len(lives), squeeze=False)[:, 0]
    for panel, (kind, life) in zip(panels, lives.items(), strict=True):
        alive = [tick / 1000**power for tick in life.ticks]
        top = 1.25 * peak / 1000**power
        panel.step(range(len(alive)), alive, where="post", color="#222222", linewidth=1.2, zorder=3)
        panel.fill_between(range(len(alive)), alive, step="post", color="#222222", alpha=0.3, linewidth=0, zorder=2)
        for event in life.events:
            _shade(panel, event, palette, top, room=(event.end - event.start) / len(alive))
        panel.set(xlim=(0, max(len(alive) - 1, 1)), ylim=(0, top), ylabel=("B", "kB", "MB", "GB")[power])
        panel.set_title(f"{kind}: peak {life.peak / 1000**power:.4g} {('B', 'kB', 'MB', 'GB')[power]}", loc="left")
    panels[-1].set_xlabel("saved and released tensors, in order")
    handles = [Patch(facecolor=colour, label=name) for name, colour in palette.items()][:EXPLAINED]
    if len(handles) < len(names):
        handles.append(Patch(facecolor="white", label="…"))
    if any(not event.phase.of for life in lives.values() for event in life.events):
        handles.append(Patch(facecolor=MANY, label="trunk"))
    handles.append(Patch(facecolor="white", edgecolor="#888888", hatch="///", label="backward"))
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    files = [path.with_suffix(".svg"), path.with_suffix(".png")]
    for file in files:
        figure.savefig(file, dpi=110)
    return files


def _shade(panel: Any, event: Event, palette: Mapping[str, str], top: float, *, room: float) -> None:
    """Shades a phase with stripes in the tasks' colours; backward phases are hatched."""
    if event.phase.kind == "between":
        return
    of = event.phase.of or ("",)
    hatch = "///" if event.phase.kind == "backward" else None
    for index, name in enumerate(of):
        low, high = index / len(of), (index + 1) / len(of)
        panel.axvspan(
            event.start,
            event.end,
            low,
            high,
            facecolor=palette.get(name, MANY),
            edgecolor="#ffffff",
            hatch=hatch,
            linewidth=0,
        )
    label = str(event.phase).rsplit(" ", 1)
    if room > LETTER * max(map(len, label)):
        middle = (event.start + event.end) / 2
        panel.text(middle, 0.97 * top, "\n".join(label), ha="center", va="top", fontsize=7)
