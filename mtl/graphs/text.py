"""Describes a step's graph by tables for the terminal, Markdown and CSV, and by sentences."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from mtl.graphs.life import Life
from mtl.graphs.walk import Leaf, Walk

MOST = 30  # the most rows on the terminal
NAMES = 3  # the most tasks listed by name
MODULES = 8  # the most modules listed by name
LEAF_HEADS = ("leaf", "shape", "requires_grad", "tasks", "shared")
LIFE_HEADS = ("passes", "after", "alive", "peak within")


@dataclass
class Grid:
    """A table of texts.

    Attributes:
        heads: The column headings.
        rows: The rows, with one text per column.
        numbers: The columns that are aligned to the right.
        left_out: The number of further rows that are left out.
    """

    heads: Sequence[str]
    rows: list[list[str]]
    numbers: tuple[int, ...] = ()
    left_out: int = 0

    def rich(self) -> Table:
        """Returns the table for the terminal."""
        table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
        for index, head in enumerate(self.heads):
            justify: Literal["left", "right"] = "right" if index in self.numbers else "left"
            table.add_column(head.replace("_", "\n_"), justify=justify, overflow="fold", no_wrap=head != "tasks")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        ends = ["---:" if index in self.numbers else "---" for index in range(len(self.heads))]
        lines = [list(self.heads), ends, *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines) + "\n"


def leaves(walk: Walk, most: int | None = MOST) -> Grid:
    """Lists the leaves, one per row; if there are too many, leaves of a module with the same tasks share a row."""
    every = list(walk.leaves.values())
    groups = [[leaf] for leaf in every]
    depth = max(leaf.name.count(".") for leaf in every)
    while most is not None and len(groups) > most and depth:
        groups = _grouped(every, depth, each=False)
        depth -= 1
    if most is not None and len(groups) > most:
        groups = _grouped(every, 1, each=True)
    shown = groups[:most]
    return Grid(LEAF_HEADS, [_row(group, walk.names) for group in shown], (), len(groups) - len(shown))


def _grouped(every: Iterable[Leaf], depth: int, *, each: bool) -> list[list[Leaf]]:
    """Groups leaves of a module with the same tasks; with `each` also leaves that each belong to a single task."""
    groups: dict[tuple[object, ...], list[Leaf]] = {}
    for leaf in every:
        place = tuple(leaf.name.split(".")[:depth])
        tasks: object = "one each" if each and len(leaf.tasks) == 1 else tuple(leaf.tasks)
        groups.setdefault((place, leaf.kind, leaf.requires_grad, tasks), []).append(leaf)
    return list(groups.values())


def _row(group: Sequence[Leaf], names: Sequence[str]) -> list[str]:
    first = group[0]
    if len(group) == 1:
        name = " = ".join([first.name, *first.also]) + ("" if first.kind == "parameter" else f" ({first.kind})")
        sizes = "×".join(map(str, first.shape)) or "()"
    else:
        parts = [leaf.name.split(".") for leaf in group]
        common = next(n for n in range(len(parts[0]), -1, -1) if all(p[:n] == parts[0][:n] for p in parts))
        name = ".".join([*parts[0][:common], "*"])
        sizes = f"{len(group)} tensors: {sum(leaf.count for leaf in group):,}"
    tasks = listed(first.tasks) if len(first.tasks) < len(names) or len(names) < NAMES else f"all {len(names)}"
    if any(leaf.tasks != first.tasks for leaf in group):
        tasks = f"one each of {len({task for leaf in group for task in leaf.tasks})}"
    return [name, sizes, "yes" if first.requires_grad else "no", tasks or "–", "yes" if first.shared else "no"]


def life(lives: Mapping[str, Life], most: int | None = MOST) -> Grid:
    """Lists the bytes alive after each event, by kind of passes; only the first of many events are listed."""
    rows, left_out = [], 0
    for kind, each in lives.items():
        shown = each.events[: None if most is None else most // len(lives)]
        left_out += len(each.events) - len(shown)
        several = each.events[-1].phase.micro_batch > 1 if each.events else False
        for index, event in enumerate(shown):
            number = f", micro-batch {event.phase.micro_batch}" if several else ""
            rows.append([kind if not index else "", f"{event.phase}{number}", size(event.alive), size(event.peak)])
    return Grid(LIFE_HEADS, rows, (2, 3), left_out)


def notes(walk: Walk, reach: Mapping[str, Sequence[str]], until: Mapping[str, int]) -> list[str]:
    """Returns sentences about frozen parameters, modules that saved nothing, and parameters without a gradient.

    Args:
        walk: The graph.
        reach: The tasks from which each parameter received a gradient, by the parameter's name.
        until: The number of steps until which parameters are frozen, by the parameter's name.
    """
    lines = []
    absent = [name for name in walk.names if name not in walk.seen]
    if absent:
        lines.append(f"Tasks without labels in this batch, so without a graph: {listed(absent)}.")
    if walk.without_graph:
        frozen_tasks = listed(walk.without_graph)
        lines.append(f"Tasks whose losses depend on frozen parameters only, so without a graph: {frozen_tasks}.")
    kinds: dict[str, list[str]] = {}
    for name, (inside, visit) in walk.frozen().items():
        count = sum(leaf.count for leaf in inside)
        steps = {until[leaf.name] for leaf in inside if leaf.name in until}
        soon = f" until step {max(steps)}" if steps else ""
        kinds.setdefault(_state(walk, name, called=visit.called, walked=visit.walked), []).append(
            f"{name} ({count:,} numbers{soon})"
        )
    lines += [f"Frozen, {state}: {listed(names, MODULES)}." for state, names in kinds.items()]
    if not kinds:
        lines.append("Frozen: nothing.")
    lines.append(f"Modules in which nothing was saved: {listed(walk.saved_nothing(), MODULES) or 'none'}.")
    lines.append(f"Trainable parameters that no task reaches: {listed(walk.unreached(), MODULES) or 'none'}.")
    without_gradient = [
        leaf.name
        for leaf in walk.leaves.values()
        if leaf.kind == "parameter" and set(leaf.tasks) - set(reach.get(leaf.name, ()))
    ]
    if without_gradient:
        lines.append(f"In the graph, but without a gradient from some task: {listed(without_gradient, MODULES)}.")
    return lines


def _state(walk: Walk, name: str, *, called: bool, walked: bool) -> str:
    if not called:
        return "not called with this batch"
    if name in walk.leaves:
        return "in modules with trainable parameters: the backward passes through, without gradients for them"
    if walked:
        return "above trainable parameters: the backward passes through, without gradients for their own parameters"
    return "outside the graph: no backward, and nothing saved for it"


def peaks(lives: Mapping[str, Life], chosen: str) -> str:
    """Returns one sentence that compares the peaks of the kinds of passes."""
    each = [f"{kind} {size(life.peak)}{' (this config)' if kind == chosen else ''}" for kind, life in lives.items()]
    return f"Peak of saved memory: {', '.join(each)}."


def size(count: int) -> str:
    """Formats a number of bytes."""
    return decimal(count, precision=3)


def listed(names: Sequence[str], most: int = NAMES) -> str:
    """Joins the names, and shortens long lists to the first names and the number of the others."""
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def write_leaves(walk: Walk, path: Path) -> None:
    """Writes all leaves as CSV; several names in one cell are separated by spaces."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["leaf", "kind", "shape", "requires_grad", "tasks", "shared", "also"])
        for leaf in walk.leaves.values():
            shape = "×".join(map(str, leaf.shape))
            marks = [str(leaf.requires_grad).lower(), " ".join(leaf.tasks), str(leaf.shared).lower()]
            writer.writerow([leaf.name, leaf.kind, shape, *marks, " ".join(leaf.also)])


def write_life(lives: Mapping[str, Life], path: Path) -> None:
    """Writes all events as CSV, in bytes."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["passes", "micro_batch", "after", "of", "alive", "peak"])
        for kind, each in lives.items():
            for event in each.events:
                phase = event.phase
                whose = " ".join(phase.of) or ("" if phase.kind == "between" else "trunk")
                writer.writerow([kind, phase.micro_batch, phase.kind, whose, event.alive, event.peak])
