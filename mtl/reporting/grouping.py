"""Groups runs: runs of one problem form a section, and runs that differ only in the seed form a method."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mtl.reporting.naming import Name, differences, names, natural
from mtl.reporting.reading import Run, without

OF_SEVERAL = {"balancer", "gradients", "passes", "trainer.monitor"}  # keys without meaning for a single task


@dataclass
class Method:
    """Finished runs that differ only in the seed.

    Args:
        label: The name in the report, different for each method of the section.
        runs: The run for each seed.
        settings: The config that the runs have in common.
        name: The name of the config, of which the label consists.
        lost: The runs of the method that didn't finish.
        repeated: Finished runs for whose seed there is a newer run; they don't count.
    """

    label: str
    runs: dict[int, Run]
    settings: dict[str, Any]
    name: Name
    lost: list[Run] = field(default_factory=list)
    repeated: list[Run] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """The names of the method's tasks."""
        return list(self.settings["tasks"])

    def values(self, split: str, task: str, name: str) -> dict[int, float]:
        """Returns a figure of a task for each seed; seeds without a finite number are left out."""
        values = {}
        for seed, run in self.runs.items():
            value = ((run.metrics.get(split) or {}).get(task) or {}).get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                values[seed] = float(value)
        return values


@dataclass
class Section:
    """Methods that can be compared, since they have the same problem and are measured on the same data.

    Args:
        title: The name of the problem, with the name of the data if the problem has several sections.
        split: The split whose figures are compared, `test` or `val`.
        methods: The methods, sorted by name.
        singles: For each task, the groups of single-task runs; only for tasks that are in runs of several tasks.
    """

    title: str
    split: str
    methods: list[Method]
    singles: dict[str, list[Method]]

    def baseline(self, method: Method, task: str) -> tuple[Method | None, list[str]]:
        """Returns the single-task runs with which a method's task is compared, and the config keys that differ.

        The single-task runs with the method's own settings are returned. If there are none, and all single-task runs of
        the task have the same settings, those runs are returned, with the config keys whose values differ from the
        method's; otherwise the result is None, without keys.
        """
        singles = self.singles.get(task, [])
        own = _alone(method.settings, task)
        for single in singles:
            if _alone(single.settings, task) == own:
                return single, []
        if len(singles) == 1:
            both = differences([_alone(singles[0].settings, task), own], [{}, {}])
            return singles[0], list(dict.fromkeys([*both[0], *both[1]]))
        return None, []


def sections(runs: Sequence[Run], split: str | None) -> list[Section]:
    """Groups runs into sections, and the runs of each section into methods and single-task runs.

    Runs of one problem with different settings of the data are in one section if fingerprints of the split show that
    they are measured on the same data, directly or via other runs.

    Args:
        runs: Runs with any status.
        split: The split whose figures are compared, `test` or `val`; None for test if any run of the problem has
            figures of the test split, else val.
    """
    runs = _without_seeds_that_follow(runs)
    problems: dict[str | None, list[Run]] = {}
    for run in runs:
        if run.status == "finished":
            problems.setdefault(run.problem, []).append(run)
    result: list[Section] = []
    for problem, of_problem in problems.items():
        chosen = split or ("test" if any(run.metrics.get("test") for run in of_problem) else "val")
        groups = _by_data(of_problem, chosen)
        data = [{"data": group[0].settings["data"]} for group in groups]
        data_names = [name.text for name in names(data, [group[0].choices for group in groups])]
        title = problem or "a problem whose name isn't known"
        for group, name in zip(groups, data_names, strict=True):
            result.append(_section(f"{title} ({name})" if len(groups) > 1 else title, chosen, group))
    _add_lost(result, [run for run in runs if run.status != "finished"])
    return sorted(result, key=lambda section: natural(section.title))


def _without_seeds_that_follow(runs: Sequence[Run]) -> Sequence[Run]:
    """Removes nested keys `seed`, such as a balancer's, that are equal to the run's seed in every run."""
    follows: dict[str, bool] = {}
    for run in runs:
        for name, seed in _seeds(run.config):
            follows[name] = follows.get(name, True) and seed == run.seed
    names = {name for name, always in follows.items() if always}
    return [replace(run, config=without(run.config, names)) for run in runs] if names else runs


def _seeds(config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _seeds(value, f"{where}{name}.")
        elif where and name == "seed":
            yield f"{where}{name}", value


def key(config: Mapping[str, Any]) -> str:
    """Returns a text that is the same for equal configs, regardless of the order of keys; 1 and 1.0 are equal."""
    return json.dumps(_with_floats(config), sort_keys=True, default=str)


def _with_floats(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {name: _with_floats(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_with_floats(value) for value in node]
    return float(node) if type(node) is int else node


def _alone(config: dict[str, Any], task: str) -> dict[str, Any]:
    """Returns the part of a config that matters if one task is trained alone; the task's weight doesn't."""
    tasks = {task: {k: v for k, v in config["tasks"][task].items() if k != "weight"}}
    return without(config | {"tasks": tasks}, OF_SEVERAL)


def _by_data(runs: Sequence[Run], split: str) -> list[list[Run]]:
    """Groups runs by the data on which they are measured."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        data = without(run.settings["data"] or {}, {"batch_size", "collate"})
        by_settings.setdefault(key(data), []).append(run)
    groups: list[tuple[set[str], list[Run]]] = []
    for group in by_settings.values():
        known, joined, others = {p for run in group if (p := run.fingerprint(split)) is not None}, group, []
        for prints, other in groups:
            if known & prints:
                known, joined = known | prints, other + joined
            else:
                others.append((prints, other))
        groups = [*others, (known, joined)]
    return [group for _, group in groups]


def _section(title: str, split: str, runs: Sequence[Run]) -> Section:
    several = {task for run in runs if len(run.tasks) > 1 for task in run.tasks}
    methods: dict[str, list[Run]] = {}
    singles: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if len(run.tasks) == 1 and run.tasks[0] in several:
            alone = _alone(run.settings, run.tasks[0])
            singles.setdefault(run.tasks[0], {}).setdefault(key(alone), []).append(run)
        else:
            methods.setdefault(key(run.settings), []).append(run)
    named = sorted(_methods(list(methods.values())), key=lambda method: natural(method.label))
    baselines = {task: _methods(list(groups.values()), alone=task) for task, groups in singles.items()}
    return Section(title, split, named, baselines)


def _methods(groups: Sequence[Sequence[Run]], *, alone: str | None = None) -> list[Method]:
    """Returns a method for each group of runs; `alone` is the task if the runs are single-task runs."""
    configs = [group[0].settings for group in groups]
    compared = configs if alone is None else [_alone(config, alone) for config in configs]
    methods = []
    config_names = names(compared, [group[0].choices for group in groups])
    for name, config, group in zip(config_names, configs, groups, strict=True):
        label = name.text if alone is None else f"{alone} alone, {name.text}" if len(groups) > 1 else f"{alone} alone"
        newest: dict[int, Run] = {}
        repeated = []
        for run in sorted(group, key=lambda run: run.written):
            if run.seed in newest:
                repeated.append(newest[run.seed])
            newest[run.seed] = run
        methods.append(Method(label, dict(sorted(newest.items())), config, name, repeated=repeated))
    return methods


def _add_lost(sections: Sequence[Section], lost: Sequence[Run]) -> None:
    """Adds runs that didn't finish to the methods, or to the single-task runs, with the same settings."""
    own = {key(method.settings): method for section in sections for method in section.methods}
    alone = {
        key(_alone(single.settings, task)): single
        for section in sections
        for task, singles in section.singles.items()
        for single in singles
    }
    for run in lost:
        if not run.config:
            continue
        method = own.get(key(run.settings))
        if method is None and len(run.tasks) == 1:
            method = alone.get(key(_alone(run.settings, run.tasks[0])))
        if method is not None and run.seed not in method.runs:  # otherwise the run was repeated successfully
            method.lost.append(run)
