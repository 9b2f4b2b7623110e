"""Reads runs from disk, whatever their status."""

import copy
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtl.chosen_tasks import narrowed
from mtl.errors import UserError, first_line
from mtl.reporting.checking import checked_config, checked_metrics
from mtl.runs.resume import IRRELEVANT, locked
from mtl.safety.bounded import read_json, read_yaml
from mtl.text import plain

UNREADABLE = "can't be read"
UNSEEN = {*IRRELEVANT, "seed", "only", "data.root"}  # keys that don't distinguish methods


@dataclass(frozen=True)
class Run:
    """The folder of a run.

    Args:
        folder: The path of the folder, which begins with a folder of the command line.
        config: The whole config with the trained tasks; empty if the run ended before it was written.
        metrics: The content of metrics.json; empty if there is no such file.
        status: finished, failed, stopped, running, unfinished (killed), or can't be read.
        written: The time at which metrics.json was written, in seconds since 1970.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    status: str
    written: float = 0.0

    @property
    def problem(self) -> str | None:
        """The option of `task=`; None if unknown."""
        if self.metrics.get("problem"):
            return str(self.metrics["problem"])
        named = [str(a).split("=", 1)[1] for a in self.metrics.get("arguments", []) if str(a).startswith("task=")]
        return named[-1] if named else None

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.config["seed"])

    @property
    def tasks(self) -> list[str]:
        """The names of the trained tasks."""
        return list(self.config.get("tasks") or {})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config without keys that don't distinguish methods; must not be modified."""
        config = without(self.config, UNSEEN)
        config.setdefault("data", None)
        config.setdefault("vars", {})  # a run from before the config had this key
        return config

    @property
    def choices(self) -> dict[str, str]:
        """The chosen option of each Hydra group; empty if unknown."""
        return {str(group): str(option) for group, option in (self.metrics.get("choices") or {}).items()}

    @property
    def error(self) -> str:
        """The first line of the error that ended the run; a dash if there is none."""
        return (str(self.metrics.get("error", "")).strip() or "–").splitlines()[0]

    def fingerprint(self, split: str) -> str | None:
        """Returns the fingerprint of a split's data; None if unknown."""
        return (self.metrics.get("fingerprints") or {}).get("val" if split == "last" else split)

    @property
    def chosen_on_test(self) -> bool:
        """Whether validation and test use the same data, so that the best epoch was chosen by test metrics."""
        return self.fingerprint("val") is not None and self.fingerprint("val") == self.fingerprint("test")

    @property
    def validated(self) -> bool:
        """Whether the run was validated; otherwise the last epoch counts as the best one."""
        return bool(self.metrics.get("val"))


def find(folders: Iterable[Path]) -> list[Run]:
    """Finds all runs in the folders and their subfolders, each once, sorted by folder name.

    Folders that can't be listed and runs that can't be read don't hide other runs.

    Raises:
        UserError: If a folder doesn't exist, or if there are no runs.
    """
    runs: dict[Path, Run] = {}
    roots = list(folders)

    def closed(error: OSError) -> None:
        folder = Path(error.filename)
        runs.setdefault(folder, _unreadable(folder, f"the folder can't be listed: {error.strerror}"))

    for folder in roots:
        if not folder.is_dir():
            raise UserError(
                f"'{folder}' is not a folder; name folders of runs or multiruns, such as outputs/mnist_two_head"
            )
        for place, below, files in os.walk(folder, onerror=closed):
            below.sort()
            if "config.yaml" in files or "metrics.json" in files:
                run = read(Path(place))
                if run is not None:
                    runs.setdefault(run.folder.resolve(), run)
                    if run.status != UNREADABLE:
                        below.clear()  # a run's own folders hold no runs
    if not runs:
        raise UserError(f"there is no run in {', '.join(map(str, roots))}; a run's folder contains a config.yaml")
    return list(runs.values())


def read(folder: Path) -> Run | None:
    """Reads the run in the folder; returns None if the files belong to something else."""
    try:
        metrics = checked_metrics(_if_present(read_json, folder / "metrics.json"))
        config = checked_config(_if_present(read_yaml, folder / "config.yaml"))
        is_whole = {"seed", "tasks", "trainer"} <= set(config)
        config = narrowed(config) if is_whole else {}
        status = str(metrics.get("status") or "running")
        if not is_whole and status in ("finished", "stopped"):
            return _unreadable(folder, "its config.yaml is missing, or isn't that of a run", metrics)
        if not is_whole:
            return Run(folder, {}, metrics, status) if status == "failed" else None
        if status == "running":
            with locked(folder) as free:
                status = "unfinished" if free else "running"
        written = (folder / "metrics.json").stat().st_mtime if metrics else 0.0
    except (OSError, UserError) as error:
        return _unreadable(folder, first_line(error).replace(f"{plain(str(folder))}{os.sep}", ""))
    return Run(folder, config, metrics, status, written)


def _if_present(read: Callable[[Path], Any], path: Path) -> Any:
    """Reads the file; returns an empty dict if it doesn't exist."""
    try:
        return read(path)
    except FileNotFoundError:
        return {}


def _unreadable(folder: Path, why: str, metrics: Mapping[str, Any] = MappingProxyType({})) -> Run:
    return Run(folder, {}, {**metrics, "error": why}, UNREADABLE)


def without(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Returns a copy of the config without the given dotted keys."""
    config = copy.deepcopy(config)
    for name in names:
        *path, last = name.split(".")
        node: Any = config
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return config
