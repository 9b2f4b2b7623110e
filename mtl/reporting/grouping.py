"""Which runs belong together: those of one problem are compared, those that differ in the seed alone are one method."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mtl.reporting.naming import Name, differences, names, natural
from mtl.reporting.reading import Run, without

OF_SEVERAL = {"balancer", "gradients", "passes", "trainer.monitor"}  # what means nothing to a task by itself


@dataclass
class Method:
    """Finished runs that differ in the seed alone.

    Args:
        label: what tells it from the other methods of its section.
        runs: by seed, one each.
        settings: the config that they have in common.
        name: what the label is made of.
        lost: its runs that didn't finish.
        repeated: finished runs whose seed a newer one has too; they don't count.
    """

    label: str
    runs: dict[int, Run]
    settings: dict[str, Any]
    name: Name
    lost: list[Run] = field(default_factory=list)
    repeated: list[Run] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """Its tasks' names."""
        return list(self.settings["tasks"])

    def values(self, split: str, task: str, name: str) -> dict[int, float]:
        """By seed what was measured; what isn't there, or isn't a finite number, is left out."""
        found = {}
        for seed, run in self.runs.items():
            value = ((run.metrics.get(split) or {}).get(task) or {}).get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                found[seed] = float(value)
        return found


@dataclass
class Section:
    """Methods that can be compared, since they have one problem and one evaluation.

    Args:
        title: the problem's name, and that of its data where a problem has several.
        methods: in the order of their names.
        split: whose figures are compared, `test` or `val`.
        singles: by task the groups of runs that had this task alone, while the methods have several.
    """

    title: str
    split: str
    methods: list[Method]
    singles: dict[str, list[Method]]

    def baseline(self, method: Method, task: str) -> tuple[Method | None, list[str]]:
        """The single-task runs that a method's task is measured against, and the keys in which they differ otherwise.

        Those of the method's own settings where there are such; else those that there are, if they have one setting.
        """
        there = self.singles.get(task, [])
        own = _alone(method.settings, task)
        for single in there:
            if _alone(single.settings, task) == own:
                return single, []
        if len(there) == 1:
            both = differences([_alone(there[0].settings, task), own], [{}, {}])
            return there[0], list(dict.fromkeys([*both[0], *both[1]]))
        return None, []


def sections(runs: Sequence[Run], split: str | None) -> list[Section]:
    """Puts the runs into sections, and there into methods and single-task runs.

    Runs of one problem whose data have other settings are in one section if they are known to be measured on the same
    data, by fingerprints of the split, or each on the same as a third.

    Args:
        runs: in any state.
        split: the one whose figures are compared, `test` or `val`; None: the test split where a problem has one.
    """
    runs = _without_seeds_that_follow(runs)
    problems: dict[str | None, list[Run]] = {}
    for run in runs:
        if run.status == "finished":
            problems.setdefault(run.problem, []).append(run)
    found: list[Section] = []
    for problem, theirs in problems.items():
        chosen = split or ("test" if any(run.metrics.get("test") for run in theirs) else "val")
        parts = _by_data(theirs, chosen)
        data = [{"data": part[0].settings["data"]} for part in parts]
        called = [name.text for name in names(data, [part[0].choices for part in parts])]
        title = problem or "a problem whose name isn't known"
        for part, name in zip(parts, called, strict=True):
            found.append(_section(f"{title} ({name})" if len(parts) > 1 else title, chosen, part))
    _give_lost(found, [run for run in runs if run.status != "finished"])
    return sorted(found, key=lambda section: natural(section.title))


def _without_seeds_that_follow(runs: Sequence[Run]) -> Sequence[Run]:
    """The runs without keys `seed` of parts, such as a balancer's, that have the run's own seed in every run."""
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
    """The same text for the same config, whatever the order of its keys, and whether 1 is written 1 or 1.0."""
    return json.dumps(_with_floats(config), sort_keys=True, default=str)


def _with_floats(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {name: _with_floats(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_with_floats(value) for value in node]
    return float(node) if type(node) is int else node


def _alone(config: dict[str, Any], task: str) -> dict[str, Any]:
    """What of a config has to do with one task that is trained by itself; its weight has not."""
    tasks = {task: {k: v for k, v in config["tasks"][task].items() if k != "weight"}}
    return without(config | {"tasks": tasks}, OF_SEVERAL)


def _by_data(runs: Sequence[Run], split: str) -> list[list[Run]]:
    """The runs, those that are measured on the same data together."""
    parts: dict[str, list[Run]] = {}
    for run in runs:
        data = without(run.settings["data"] or {}, {"batch_size", "collate"})
        parts.setdefault(key(data), []).append(run)
    joined: list[tuple[set[str], list[Run]]] = []
    for part in parts.values():
        known, there, others = {p for run in part if (p := run.fingerprint(split)) is not None}, part, []
        for prints, theirs in joined:
            if known & prints:
                known, there = known | prints, theirs + there
            else:
                others.append((prints, theirs))
        joined = [*others, (known, there)]
    return [there for _, there in joined]


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
    """A method for each group of runs; `alone` is the one task that they have, if they are single-task runs."""
    configs = [group[0].settings for group in groups]
    compared = configs if alone is None else [_alone(config, alone) for config in configs]
    found = []
    called = names(compared, [group[0].choices for group in groups])
    for name, config, group in zip(called, configs, groups, strict=True):
        label = name.text if alone is None else f"{alone} alone, {name.text}" if len(groups) > 1 else f"{alone} alone"
        newest: dict[int, Run] = {}
        repeated = []
        for run in sorted(group, key=lambda run: run.written):
            if run.seed in newest:
                repeated.append(newest[run.seed])
            newest[run.seed] = run
        found.append(Method(label, dict(sorted(newest.items())), config, name, repeated=repeated))
    return found


def _give_lost(sections: Sequence[Section], lost: Sequence[Run]) -> None:
    """Gives runs that didn't finish to the methods, or single-task runs, whose settings they have."""
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
        if method is not None and run.seed not in method.runs:  # else it was repeated, and with success
            method.lost.append(run)
