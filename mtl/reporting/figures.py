"""The figures of a section, and the names on the command line that stand for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from mtl.errors import UserError, suggest
from mtl.reporting.grouping import Section
from mtl.reporting.naming import natural


@dataclass(frozen=True)
class Figure:
    """A metric or loss of a task.

    Args:
        task: The name of the task.
        name: The name of the metric, or `loss`.
        mode: Whether higher (`max`) or lower (`min`) is better; None if neither or unknown.
        main: Whether this is the main metric of the task.
    """

    task: str
    name: str
    mode: str | None
    main: bool

    def __str__(self) -> str:
        return f"{self.task} {self.name}"

    @property
    def arrow(self) -> str:
        """An arrow in the better direction, for table headings."""
        return {"max": "↑", "min": "↓"}.get(self.mode or "", "")


def figures_of(section: Section, tasks: Sequence[str]) -> list[Figure]:
    """Returns all metrics of the split, by task; a task's main metric is its first one that isn't the loss."""
    runs = [run for method in section.methods for run in method.runs.values()]
    kinds: dict[str, str | None] = {}
    for run in runs:
        kinds |= run.metrics.get("kinds") or {}
    figures = []
    for task in tasks:
        named = dict.fromkeys(name for run in runs for name in (run.metrics.get(section.split) or {}).get(task) or {})
        names = [name for name in named if name != "loss"] + ["loss"] * ("loss" in named)
        for name in names:
            mode = kinds.get(f"{task}/{name}", "min" if name == "loss" else None)
            figures.append(Figure(task, name, mode, main=name == names[0]))
    return figures


def is_named(name: str, figure: Figure) -> bool:
    """Returns whether a name, `task/figure`, `task/metric` or `all`, stands for the figure, see `Comparison`."""
    if name == "all":
        return figure.mode is not None and figure.name != "loss"
    full = f"{figure.task}/{figure.name}"
    return full == name or full.startswith(f"{name}.")


def check_names(
    sections: Sequence[Section], reference: str | None, pairs: Sequence[Sequence[str]], delta: Sequence[str] = ()
) -> None:
    """Checks that each name from the command line is in at least one section.

    Raises:
        UserError: If a name is in no section.
    """
    methods = [method for section in sections for method in section.methods]
    labels = sorted({method.label for method in methods}, key=natural)
    tasks = sorted({task for method in methods for task in method.tasks}, key=natural)
    if reference is not None and reference not in labels:
        near, _, _ = suggest(reference, labels).partition(" (")
        possible = "; ".join(labels)  # labels may contain commas
        raise UserError(f"--reference: there is no method '{reference}'{near} (possible: {possible})")
    for pair in pairs:
        if len(set(pair)) < 2:
            raise UserError(f"--pair: '{pair[0]}' twice; name two tasks of {', '.join(tasks)}")
        for name in pair:
            if name not in tasks:
                raise UserError(f"--pair: there is no task '{name}'{suggest(name, tasks)}")
    figures = [figure for section in sections for figure in figures_of(section, tasks)]
    for name in delta:
        if not any(is_named(name, figure) for figure in figures):
            known = list(dict.fromkeys(f"{figure.task}/{figure.name}" for figure in figures))
            raise UserError(f"--delta: there is no figure '{name}'{suggest(name, known)}")
