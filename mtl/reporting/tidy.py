"""Writes the numbers of a report as one CSV file."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtl.files import write_whole
from mtl.reporting.comparison import Comparison, conflict, cost, pairs_of
from mtl.reporting.estimates import Estimate
from mtl.reporting.grouping import Method
from mtl.text import plain

COLUMNS = ["problem", "method", "role", "split", "task", "figure", "mean", "low", "high", "n", "p", "p_holm"]
# The beginning of a formula, also after a semicolon, since some spreadsheets separate cells at semicolons.
FORMULA = re.compile(r"(^|;)(?=[\s\"']*[=+\-@＝＋－＠])")
Line = dict[str, str | float | int | None]


def write(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Writes a line for each method, task and figure, and for Δm, ranks, differences, time, memory and conflict.

    `role` is method, reference or single task; `low` and `high` are the ends of the interval; unknown values are empty.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for comparison in comparisons:
        writer.writerows({name: _cell(value) for name, value in line.items()} for line in _lines(comparison))
    write_whole(path, file.getvalue())


def _cell(value: str | float | int | None) -> str | float | int | None:
    """Returns the value, with an apostrophe before anything in a text that spreadsheets would read as a formula."""
    if not isinstance(value, str):
        return value
    return FORMULA.sub(r"\1'", plain(value))


def _lines(comparison: Comparison) -> Iterator[Line]:
    def line(method: Method, figure: str, estimate: Estimate | None, task: str = "", split: str = "") -> Line:
        role = "method" if method in comparison.methods else "single task"
        about: Line = {
            "problem": comparison.section.title,
            "method": method.label,
            "role": "reference" if method is comparison.reference else role,
            "split": split,
            "task": task,
            "figure": figure,
        }
        if estimate is None:
            return about
        return about | {"mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n}

    split = comparison.split
    for method in comparison.everything:
        for figure in comparison.figures:
            if (mean := comparison.estimate(method, figure)) is not None:
                yield line(method, figure.name, mean, figure.task, split)
        for name in ("seconds_per_step", "memory_per_step"):
            if (mean := cost(method, name)) is not None:
                yield line(method, name, mean)
    others = comparison.gained != comparison.mains
    of = f" of {', '.join(f'{figure.task}/{figure.name}' for figure in comparison.gained)}" if others else ""
    for method in comparison.methods:
        if (mean := comparison.delta(method).estimate) is not None:
            yield line(method, f"delta_m{of}", mean, split=split)
    for index, method in enumerate(comparison.methods if comparison.ranks else []):
        assert comparison.ranks is not None
        ranks, count = comparison.ranks
        yield line(method, f"mean_rank{of}", None, split=split) | {"mean": ranks[index], "n": count}
    for test in comparison.tests:
        name = f"difference in {test.figure.name}"
        difference = line(test.method, name, test.difference.estimate, test.figure.task, split)
        yield difference | {"p": test.difference.p, "p_holm": test.holm}
    for method in comparison.methods:
        for pair in pairs_of([method]):
            yield line(method, "cosine", conflict(method, pair, "mean"), pair)
            yield line(method, "cosine below zero", conflict(method, pair, "below_zero"), pair)
