"""What the numbers of a section can't honestly say."""

import math
from collections.abc import Iterator
from typing import Any

from mtl.reporting.comparison import Comparison, side_by_side
from mtl.reporting.curves import Curves
from mtl.reporting.estimates import SAME, smallest_p
from mtl.reporting.grouping import Method
from mtl.reporting.writing import listed


def caveats(comparison: Comparison, curves: Curves) -> list[str]:
    """A sentence or two each, the gravest first."""
    found = [
        *_choosing(comparison),
        *_confounded(comparison),
        *_seeds(comparison),
        *_lost(comparison),
        *_budgets(comparison),
        *_data(comparison),
        *_versions(comparison),
        *_times(comparison),
        *_monitors(comparison),
        *_figures(comparison),
        *_baselines(comparison),
    ]
    if silent := [method.label for method in comparison.methods if curves.missing(method)]:
        found.append(f"No curves of {listed(silent)}: a run has no metrics.csv (logger=csv writes one).")
    return found


def _choosing(comparison: Comparison) -> Iterator[str]:
    runs = [run for method in comparison.methods for run in method.runs.values()]
    if any(run.fingerprint("val") is not None and run.fingerprint("val") == run.fingerprint("test") for run in runs):
        yield (
            "The test split was used for choosing: validation and test are the same data, so each run's best epoch was "
            "chosen on the figures that are shown here. They are too good, and so is a choice of a method by them."
        )
    elif comparison.split == "test" and not any(run.metrics.get("val") for run in runs):
        yield (
            "There is no validation: whoever chooses a method by these figures chooses on the test split, and has none "
            "left to say how good it is."
        )
    elif comparison.split == "val":
        yield (
            "These are figures of the validation split, at the epoch that was chosen by it: they are too good. A test "
            "split would say by how much."
        )


def _confounded(comparison: Comparison) -> Iterator[str]:
    """Keys that the names leave out: each of them may be why methods differ."""
    hidden = list(dict.fromkeys(key for method in comparison.methods for key in method.name.left_out))
    if hidden:
        keys = listed(hidden, 12)
        yield f"The methods differ in more than their names say: {keys}. A difference in figures may come from these."


def _seeds(comparison: Comparison) -> Iterator[str]:
    single = [method.label for method in comparison.everything if len(method.runs) == 1]
    if len(single) == len(comparison.everything):
        yield "One seed only: there are no intervals and no tests, and any difference here may be chance."
    elif single:
        yield f"One seed only of {listed(single)}: no intervals and no tests of these."
    several = {tuple(method.runs) for method in comparison.methods}
    if len(several) > 1:
        every = sorted({seed for seeds in several for seed in seeds})
        lacking = [
            f"{m.label} lacks {listed([str(seed) for seed in every if seed not in m.runs])}"
            for m in comparison.methods
            if set(every) - set(m.runs)
        ]
        yield (
            f"Not every method has every seed, so their means are over different ones: {'; '.join(lacking)}. Tests and "
            "ranks use the common ones."
        )
    most = max(len(method.runs) for method in comparison.methods)
    if 1 < most < 6:
        yield (
            f"With {most} seeds the intervals and the t-test take the seeds' figures for normally distributed, which "
            "so few can't show, and a small p may only mean that a few differences happened to be alike. A test by "
            f"signed ranks, which doesn't, can't get below p = {smallest_p(most):g} with {most}; it takes 6 seeds to "
            "get below 0.05."
        )
    stiff = [method.label for method in comparison.everything if _same_in_all_seeds(method, comparison)]
    if stiff:
        yield f"All seeds of {listed(stiff)} have the same figures: the seed seems to have no effect there."
    if repeated := [run for method in comparison.everything for run in method.repeated]:
        yield (
            "Run more than once with the same settings and seed, of which the newest counts: "
            f"{listed([str(run.folder) for run in repeated])} left out."
        )


def _same_in_all_seeds(method: Method, comparison: Comparison) -> bool:
    if len(method.runs) < 2:
        return False
    for figure in comparison.figures:
        values = list(method.values(comparison.split, figure.task, figure.name).values())
        if values and max(values) - min(values) > SAME * max(map(abs, values)):
            return False
    return True


def _lost(comparison: Comparison) -> Iterator[str]:
    for method in comparison.everything:
        if method.lost:
            states = listed(sorted({run.status for run in method.lost}))
            yield (
                f"{method.label}: {len(method.lost)} of {len(method.lost) + len(method.runs)} runs didn't finish "
                f"({states}). Its figures are of those that did, which may be the better ones."
            )


def _budgets(comparison: Comparison) -> Iterator[str]:
    methods = comparison.everything
    told: list[tuple[str, dict[str, set[Any]]]] = [
        ("steps", {m.label: {run.metrics.get("steps") for run in m.runs.values()} for m in methods}),
        ("epochs", {m.label: {run.metrics.get("epochs") for run in m.runs.values()} for m in methods}),
        ("batch size", {m.label: {str((m.settings.get("data") or {}).get("batch_size"))} for m in methods}),
    ]
    differing = []
    for name, by_method in told:
        known = {label: values - {None} for label, values in by_method.items() if values - {None}}
        if len({value for values in known.values() for value in values}) > 1:
            groups: dict[str, list[str]] = {}
            for label, values in known.items():
                groups.setdefault("–".join(map(str, sorted({min(values), max(values)}))), []).append(label)
            differing.append(f"{name} {'; '.join(f'{value} ({listed(who)})' for value, who in groups.items())}")
    if differing:
        early = any((m.settings.get("trainer") or {}).get("patience") is not None for m in methods)
        why = " trainer.patience ends runs early." if early else ""
        yield f"Different budgets: {', '.join(differing)}.{why} Differences may come from these."


def _data(comparison: Comparison) -> Iterator[str]:
    for split in ("train", "val", "test"):
        prints: dict[int, dict[str, list[str]]] = {}
        for method in comparison.everything:
            for seed, run in method.runs.items():
                if (told := run.fingerprint(split)) is not None:
                    prints.setdefault(seed, {}).setdefault(told, []).append(method.label)
        if differing := next((by for by in prints.values() if len(by) > 1), None):
            who = "; ".join(f"{told[:8]} for {listed(labels)}" for told, labels in differing.items())
            yield f"Different data: the {split} split isn't the same for all, with the same seed ({who})."
    missing = [
        m.label for m in comparison.everything if any(r.fingerprint(comparison.split) is None for r in m.runs.values())
    ]
    if missing:
        yield f"Whether all had the same data isn't known: {listed(missing)} can't tell, or didn't write it down."


def _versions(comparison: Comparison) -> Iterator[str]:
    for what, name in (("versions of torch", "torch"), ("devices", "device"), ("numbers of threads", "threads")):
        versions: dict[str, list[str]] = {}
        for method in comparison.everything:
            told = ((run.metrics.get("versions") or {}).get(name) or "unknown" for run in method.runs.values())
            for version in dict.fromkeys(map(str, told)):
                versions.setdefault(version, []).append(method.label)
        if len(versions) > 1:
            who = "; ".join(f"{version} ({listed(labels)})" for version, labels in versions.items())
            yield f"Different {what}: {who}. Figures may differ a little by that, time and memory by more."


def _times(comparison: Comparison) -> Iterator[str]:
    if together := side_by_side(comparison):
        yield (
            f"Jobs ran side by side (hydra/launcher={listed(together)}), so their times say as much of the machine's "
            "load as of the methods, whatever their intervals; they aren't compared."
        )


def _monitors(comparison: Comparison) -> Iterator[str]:
    monitors = {
        str((run.metrics.get("best") or {}).get("monitor")) for m in comparison.methods for run in m.runs.values()
    }
    if len(monitors) > 1:
        yield f"Their best epochs were chosen by different figures: {'; '.join(sorted(monitors))}."


def _figures(comparison: Comparison) -> Iterator[str]:
    silent = [task for task in comparison.tasks if not any(figure.task == task for figure in comparison.figures)]
    if silent:
        yield f"There are no figures of {listed(silent)} on {comparison.split}, so nothing here speaks of them."
    unknown = [str(figure) for figure in comparison.mains if figure.mode is None]
    if unknown:
        yield f"Which way {listed(unknown)} is better isn't known, so there is no Δm, rank or front with it."
    broken = []
    for method in comparison.everything:
        for seed, run in method.runs.items():
            figures = run.metrics.get(comparison.split) or {}
            if not figures:
                broken.append(f"{method.label}, seed {seed}: no figures of that split")
            broken += [
                f"{method.label}, seed {seed}: {task} {name} is {value}"
                for task, named in figures.items()
                for name, value in named.items()
                if isinstance(value, float) and not math.isfinite(value)
            ]
    if broken:
        yield f"Left out, since there is no number: {listed(broken)}."


def _baselines(comparison: Comparison) -> Iterator[str]:
    differing: dict[str, list[str]] = {}
    for method in comparison.methods:
        if len(method.tasks) > 1:
            for task in method.tasks:
                _, keys = comparison.section.baseline(method, task)
                if keys:
                    differing.setdefault(f"{task} alone differs in {listed(keys)}", []).append(method.label)
    for what, labels in differing.items():
        yield f"Δm of {listed(labels)} is against runs of other settings: {what}."
