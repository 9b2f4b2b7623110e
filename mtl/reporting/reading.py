"""Runs as they are on the disk, whatever their state."""

import copy
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtl.errors import UserError, first_line
from mtl.reporting.checking import checked_config, checked_metrics
from mtl.runs.resume import IRRELEVANT, locked
from mtl.safety.bounded import read_json, read_yaml
from mtl.schema import narrowed
from mtl.text import plain

UNREADABLE = "can't be read"
UNSEEN = {*IRRELEVANT, "seed", "only", "data.root"}  # what makes no other method


@dataclass(frozen=True)
class Run:
    """One run's folder.

    Args:
        folder: as it was given, or below what was given.
        config: the whole config, with the tasks that were trained; empty where the run ended before it was written.
        metrics: what metrics.json holds; empty where there is none.
        status: finished, failed, stopped, running, unfinished (killed, that is) or can't be read.
        written: when its metrics.json was, in seconds since 1970.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    status: str
    written: float = 0.0

    @property
    def problem(self) -> str | None:
        """What `task=` named, None where it isn't known."""
        if self.metrics.get("problem"):
            return str(self.metrics["problem"])
        named = [str(a).split("=", 1)[1] for a in self.metrics.get("arguments", []) if str(a).startswith("task=")]
        return named[-1] if named else None

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that were trained."""
        return list(self.config.get("tasks") or {})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config without what makes no other method; not to be changed."""
        found = without(self.config, UNSEEN)
        found.setdefault("data", None)
        found.setdefault("vars", {})  # a run older than the key
        return found

    @property
    def choices(self) -> dict[str, str]:
        """From each of Hydra's groups to the option that was taken; empty where it isn't known."""
        return {str(group): str(option) for group, option in (self.metrics.get("choices") or {}).items()}

    @property
    def error(self) -> str:
        """The first line of what ended the run; a dash where none was written."""
        return (str(self.metrics.get("error", "")).strip() or "–").splitlines()[0]

    def fingerprint(self, split: str) -> str | None:
        """What tells a split's data from others, None where it isn't known."""
        return (self.metrics.get("fingerprints") or {}).get(split)

    @property
    def chosen_on_test(self) -> bool:
        """Whether validation and test are the same data, so that its best epoch was chosen on its test figures."""
        return self.fingerprint("val") is not None and self.fingerprint("val") == self.fingerprint("test")

    @property
    def validated(self) -> bool:
        """Whether there was validation; without, the last epoch counts as the best."""
        return bool(self.metrics.get("val"))


def find(folders: Iterable[Path]) -> list[Run]:
    """All runs in the folders and below, by the folders' names, each once.

    A folder that can't be listed, or that holds a run that can't be read, hides no other.

    Raises:
        UserError: where there is no such folder, or no run in any.
    """
    found: dict[Path, Run] = {}
    given = list(folders)

    def closed(error: OSError) -> None:
        folder = Path(error.filename)
        found.setdefault(folder, _unreadable(folder, f"the folder can't be listed: {error.strerror}"))

    for folder in given:
        if not folder.is_dir():
            raise UserError(
                f"'{folder}' is not a folder; give those of runs or multiruns, such as outputs/mnist_two_head"
            )
        for place, below, files in os.walk(folder, onerror=closed):
            below.sort()
            if "config.yaml" in files or "metrics.json" in files:
                run = read(Path(place))
                if run is not None:
                    found.setdefault(run.folder.resolve(), run)
                    if run.status != UNREADABLE:
                        below.clear()  # a run's own folders hold no runs
    if not found:
        raise UserError(f"there is no run in {', '.join(map(str, given))}; a run's folder holds a config.yaml")
    return list(found.values())


def read(folder: Path) -> Run | None:
    """The run in the folder; None where the files are of something else."""
    try:
        metrics = checked_metrics(_there(read_json, folder / "metrics.json"))
        config = checked_config(_there(read_yaml, folder / "config.yaml"))
        is_whole = {"seed", "tasks", "trainer"} <= set(config)
        config = narrowed(config) if is_whole else {}
        status = str(metrics.get("status") or "running")
        if not is_whole and status in ("finished", "stopped"):
            return _unreadable(folder, "its config.yaml is gone, or isn't a run's", metrics)
        if not is_whole:
            return Run(folder, {}, metrics, status) if status == "failed" else None
        if status == "running":
            with locked(folder) as free:
                status = "unfinished" if free else "running"
        written = (folder / "metrics.json").stat().st_mtime if metrics else 0.0
    except (OSError, UserError) as error:
        return _unreadable(folder, first_line(error).replace(f"{plain(str(folder))}{os.sep}", ""))
    return Run(folder, config, metrics, status, written)


def _there(read: Callable[[Path], Any], path: Path) -> Any:
    """What is read from the file; nothing where there is none."""
    try:
        return read(path)
    except FileNotFoundError:
        return {}


def _unreadable(folder: Path, why: str, metrics: Mapping[str, Any] = MappingProxyType({})) -> Run:
    return Run(folder, {}, {**metrics, "error": why}, UNREADABLE)


def without(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A copy of the config without the keys, which are written with dots."""
    config = copy.deepcopy(config)
    for name in names:
        *path, last = name.split(".")
        node: Any = config
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return config
