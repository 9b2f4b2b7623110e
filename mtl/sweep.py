"""A multirun: its folder, its jobs' names, what its sweeps go over, and how its jobs ended."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from math import comb
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mtl.errors import UserError
from mtl.resume import IRRELEVANT, write_whole

ABOUT = "sweep.json"  # what was typed
JOURNAL = "jobs.jsonl"  # how each job ended, a line of JSON each, by whichever process it ran in
MOST_POINTS = 12  # of a grid of weights
FINEST = 10  # parts that a grid cuts the weights' sum into


class Sweep:
    """One multirun, from its start or from where an earlier one was interrupted to its end.

    It goes with the jobs into other processes.

    Args:
        typed: the command line, without the program's name.
        new: the name of a new multirun's folder.

    Attributes:
        folder: where the jobs' folders are, once it has been asked for.
        began_at: how long the journal was then.
    """

    def __init__(self, typed: Sequence[str], new: str) -> None:
        self.typed = list(typed)
        self.new = new
        self.folder: Path | None = None
        self.began_at = 0

    def choose_folder(self, root: str, resume: str | None) -> str:
        """The folder of the multirun: a new one, or that of the one that is to go on.

        Args:
            root: where multiruns are.
            resume: null, `auto` for the newest that was started with the same arguments, if any, or its folder.

        Raises:
            UserError: for a folder that isn't a multirun's, or one of other arguments.
        """
        folder = Path(root) / self.new
        if resume == "auto":
            folder = next((path for path in _newest_first(root) if _same(arguments(path), self.typed)), folder)
        elif resume is not None:
            folder = Path(resume)
            if not (folder / ABOUT).is_file():
                raise UserError(f"resume: '{resume}' is not the folder of a multirun; it would hold a {ABOUT}")
            if not _same(arguments(folder), self.typed):
                theirs = shlex.join(arguments(folder))
                raise UserError(f"resume: '{resume}' was begun with other arguments: {theirs}")
        if self.folder is None:
            journal = folder / JOURNAL
            self.began_at = journal.stat().st_size if journal.is_file() else 0
        self.folder = folder
        return str(folder)

    def begin(self, job: Path) -> None:
        """Writes down, before a job of that folder begins, of which multirun it is."""
        if not (job.parent / ABOUT).exists():
            write_whole(job.parent / ABOUT, json.dumps({"arguments": self.typed}) + "\n")

    def job_name(self, number: int, overrides: Sequence[str]) -> str:
        """`0_lr-0.001_seed-0` for a job whose optimizer.lr and seed are swept: short, and a valid name everywhere."""
        swept = [override for override in overrides if override not in self.typed]
        names = [name for override in swept if "=" in override for name in _names(*override.split("=", 1))]
        return "_".join([str(number), *(re.sub(r"[^\w.]+", "-", name).strip("-") for name in names)])[:100]

    def ended(self) -> list[dict[str, Any]]:
        """What was noted of the jobs that ended since the beginning, in the order of their numbers."""
        journal = self.folder / JOURNAL if self.folder else None
        if journal is None or not journal.is_file():
            return []
        with journal.open(encoding="utf-8") as file:
            file.seek(self.began_at)
            jobs = [json.loads(line) for line in file]
        return sorted(jobs, key=lambda job: int(str(job["job"]).split("_")[0]))


def note(job: Path, outcome: str, value: float | None = None) -> None:
    """Writes down how the job of that folder ended."""
    line = json.dumps({"job": job.name, "outcome": outcome, "value": value})
    with (job.parent / JOURNAL).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def arguments(folder: Path) -> list[str]:
    """What the multirun of the folder was started with."""
    typed: list[str] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["arguments"]
    return typed


def _newest_first(root: str) -> list[Path]:
    return [path.parent for path in sorted(Path(root).glob(f"*/{ABOUT}"), reverse=True)]


def _same(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether both command lines mean the same jobs."""
    return list(_telling(theirs)) == list(_telling(ours))


def _telling(typed: Sequence[str]) -> Iterator[str]:
    for argument in typed:
        key = argument.lstrip("+~").split("=")[0]
        elsewhere = key in ("-m", "--multirun", "hydra/launcher") or key.startswith("hydra.launcher.")
        if not elsewhere and not any(key == name or key.startswith(f"{name}.") for name in IRRELEVANT):
            yield argument


def _names(key: str, value: str) -> list[str]:
    """What of a swept value is shown in the job's name; of a mapping what is in it, of a task's weight the task."""
    parts = key.lstrip("+").split(".")
    if value.startswith("{"):
        plain = OmegaConf.to_container(OmegaConf.create(re.sub(r":(?=\S)", ": ", value)))
        return [f"{name}-{_short(each)}" for name, each in _leaves(plain)]
    weight = parts[0] == "tasks" and parts[-1] == "weight"
    return [f"{parts[-2 if weight else -1]}-{_short(value)}"]


def _short(value: Any) -> str:
    """A number in few digits."""
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _leaves(value, str(key))
        else:
            yield (name if key == "weight" and name else str(key)), value


def _tasks(config: Any) -> list[str]:
    """The names of those that are trained."""
    only = config.get("only")
    wanted = [only] if isinstance(only, str) else only
    return [str(name) for name in config.tasks if wanted is None or name in wanted]


def task_names(config: Any) -> str:
    """The tasks' names, to be swept over."""
    return ",".join(_tasks(config))


def weight_grid(config: Any) -> str:
    """Sets of task weights that sum to the number of tasks, on a grid without its edges, to be swept over.

    On the edges a task has no weight. Equal weights are among them.
    """
    names = _tasks(config)
    count = len(names)
    parts = max((n for n in range(count, FINEST + 1) if comb(n - 1, count - 1) <= MOST_POINTS), default=count)
    points = [_shares(cuts, parts, count) for cuts in combinations(range(1, parts), count - 1)]
    if [1.0] * count not in points:
        points.insert(0, [1.0] * count)
    return ",".join(
        "{" + ",".join(f"{name}:{{weight:{round(w, 4)!r}}}" for name, w in zip(names, point, strict=True)) + "}"
        for point in points
    )


def _shares(cuts: Sequence[int], parts: int, count: int) -> list[float]:
    ends = [0, *cuts, parts]
    return [count * (end - start) / parts for start, end in pairwise(ends)]


def search_space(config: Any, trial: Any) -> None:
    """What Optuna searches: the learning rate, up to ten times the config's own, and each task's weight by the first's.

    What the command line fixes, or searches itself, is left alone.
    """
    taken = {*trial.params, *trial.user_attrs}
    taken |= {name.lstrip("+") for name in taken}
    rate = config.optimizer.get("lr")
    ranges = {"optimizer.lr": (rate / 10, rate * 10)} if rate else {}
    ranges |= {f"++tasks.{name}.weight": (0.1, 10.0) for name in _tasks(config)[1:]}
    for name, (low, high) in ranges.items():
        if name.lstrip("+") not in taken:
            trial.suggest_float(name, low, high, log=True)


def direction(config: Any) -> str:
    """Which way Optuna is to go: that of `trainer.monitor`; up where it names no mode, which the jobs then check."""
    terms = config.trainer.monitor
    modes = {
        term.get("mode") if isinstance(term, Mapping) else term
        for term in (terms.values() if terms is not None else ())
    }
    scaled = any(isinstance(term, Mapping) and "scale" in term for term in (terms or {}).values())
    return "minimize" if modes == {"min"} and not scaled else "maximize"
