"""Metrics over the steps: of each run from its metrics.csv, and of each method with a band over seeds."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from mtl import tags
from mtl.errors import UserError
from mtl.reporting.checking import LARGEST
from mtl.reporting.estimates import quantile
from mtl.reporting.grouping import Method
from mtl.safety.bounded import read_lines

Array = NDArray[np.float64]
Series = tuple[list[int], list[float]]  # steps, values
LAST = 2**53  # the largest step
LARGEST_FILE, LONGEST_LINE = 2**29, 2**12  # limits in bytes
KINDS = tuple(f"{kind}/" for kind in (tags.LOSS, tags.METRIC, tags.COSINE))
PARTS = 3  # the number of parts of training for which conflict is counted
FEW = 8  # fewer measured steps say nothing about a pair of tasks


@dataclass(frozen=True)
class Band:
    """A curve: a method's mean over seeds, with an interval if there are several seeds."""

    steps: Array
    mean: Array
    low: Array | None
    high: Array | None


def read(folder: Path) -> dict[str, Series]:
    """Reads the logged losses, metrics and cosines by tag; returns an empty dict if no CSV file can be read.

    Invalid lines are left out.
    """
    series_by_tag: dict[str, Series] = {}
    with suppress(OSError, UserError):
        for row in _rows(folder / "metrics.csv"):
            if len(row) == 4 and row[2].startswith(KINDS):
                steps, values = series_by_tag.setdefault(row[2], ([], []))
                with suppress(ValueError):  # a truncated line
                    step, value = int(row[0]), float(row[3])
                    if 0 < step < LAST and (abs(value) <= LARGEST or not math.isfinite(value)):
                        steps.append(step)
                        values.append(value)
    return {tag: series for tag, series in series_by_tag.items() if series[0]}


def _rows(path: Path) -> Iterator[list[str]]:
    """Yields the cells of each line. Lines are parsed separately, so that an open quote affects only one line."""
    for line in read_lines(path, LARGEST_FILE, LONGEST_LINE):
        with suppress(csv.Error):
            yield next(csv.reader([line]), []) if '"' in line else line.rstrip("\r\n").split(",")


class Curves:
    """The logged curves of some methods' runs.

    Args:
        methods: The methods whose runs are read, each run once.
    """

    def __init__(self, methods: Iterable[Method]) -> None:
        self._read = {m.label: {seed: read(run.folder) for seed, run in m.runs.items()} for m in methods}

    def tags(self) -> list[str]:
        """Returns the tags of all runs."""
        return list(dict.fromkeys(tag for runs in self._read.values() for logged in runs.values() for tag in logged))

    def missing(self, method: Method) -> bool:
        """Returns whether a run of the method has no CSV file."""
        return not all(self._read[method.label].values())

    def band(self, method: Method, tag: str, points: int) -> Band | None:
        """Returns the curve of the tag over the steps that all seeds have; None if there are none.

        Args:
            method: One of the methods in `methods`.
            tag: A tag in metrics.csv.
            points: The maximal number of points; longer curves are first averaged over this number of windows per run.
        """
        runs = [logged.get(tag) for logged in self._read[method.label].values()]
        return band([run for run in runs if run], points) if all(runs) else None

    def below_zero(self, method: Method, pair: str) -> list[float | None]:
        """Returns, for each part of training, the share of the pair's negative cosines, as a mean over seeds.

        The share is None for a part in which no seed has `FEW` cosines. A pair is written `a~b`.
        """
        shares = []
        for seed, run in method.runs.items():
            logged = self._read[method.label][seed].get(tags.cosine_of(pair))
            if logged:
                shares.append(_below_zero(logged, max(run.metrics.get("steps") or 0, *logged[0])))
        parts = [[share[part] for share in shares] for part in range(PARTS)]
        return [fmean(s for s in part if s is not None) if any(s is not None for s in part) else None for part in parts]


def band(runs: list[Series], points: int) -> Band:
    """Returns the runs' mean and its interval at the steps that all runs have."""
    columns: list[Mapping[int, float]] = [dict(zip(*run, strict=True)) for run in runs]
    steps = sorted(set(columns[0]).intersection(*columns[1:]))
    values = np.array([[column[step] for step in steps] for column in columns], dtype=np.float64)
    at = np.array(steps, dtype=np.float64)
    if len(steps) > points:
        cuts = np.linspace(0, len(steps), points + 1).astype(int)
        at = np.array([at[a:b].mean() for a, b in pairwise(cuts)])
        values = np.stack([values[:, a:b].mean(axis=1) for a, b in pairwise(cuts)], axis=1)
    mean = values.mean(axis=0)
    if len(runs) == 1:
        return Band(at, mean, None, None)
    half = quantile(len(runs) - 1) * values.std(axis=0, ddof=1) / math.sqrt(len(runs))
    return Band(at, mean, mean - half, mean + half)


def _below_zero(run: Series, last: int) -> list[float | None]:
    """Returns the share of negative cosines in each part of training; None for parts with few measured steps."""
    parts: list[list[bool]] = [[] for _ in range(PARTS)]
    for step, value in zip(*run, strict=True):
        if math.isfinite(value):
            parts[min(PARTS - 1, (step - 1) * PARTS // last)].append(value < 0)
    return [fmean(part) if len(part) >= FEW else None for part in parts]
