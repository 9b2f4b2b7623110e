"""Caveats: what the numbers of a section can't show."""

import math
from collections.abc import Iterator
from typing import Any

from mtl.reporting.comparison import Comparison, side_by_side
from mtl.reporting.curves import Curves
from mtl.reporting.estimates import SAME, smallest_p
from mtl.reporting.grouping import Method
from mtl.reporting.writing import listed, number

UNSTEADY = 3.0  # the largest ratio between seeds of a single task's metric that isn't reported


def caveats(comparison: Comparison, curves: Curves) -> list[str]:
    """Returns the caveats as one or two sentences each, the most important ones first."""
    sentences = [
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
        *_unsteady(comparison),
        *_tasks(comparison),
    ]
    if silent := [method.label for method in comparison.methods if curves.missing(method)]:
        sentences.append(f"No curves of {listed(silent)}: a run has no metrics.csv (logger=csv writes one).")
    return sentences


def _choosing(comparison: Comparison) -> Iterator[str]:
    blind = [m.label for m in comparison.methods if not all(run.validated for run in m.runs.values())]
    who = f" of {listed(blind)}" * (len(blind) < len(comparison.methods))
    if any(run.chosen_on_test for method in comparison.methods for run in method.runs.values()):
        yield (
            "The test split was used for choosing: validation and test are the same data, so the best epoch of each "
            "run was chosen by the figures that are shown here. These figures are too good, also for choosing a method."
        )
    elif comparison.split == "test" and blind:
        yield (
            f"There is no validation{who}: choosing a method by these figures uses the test split, so that no unused "
            "data remain to evaluate the chosen method."
        )
    elif comparison.split == "val":
        yield (
            "These are figures of the validation split at the epoch that was chosen by validation, so they are too "
            "good. A test split would show by how much."
        )
    elif comparison.split == "last":
        yield (
            "These are figures of the validation split, so that those of a method that is chosen by validation are too "
            "good."
        )


def _confounded(comparison: Comparison) -> Iterator[str]:
    """Yields a caveat about keys that aren't part of the methods' names and may also explain differences."""
    hidden = list(dict.fromkeys(key for method in comparison.methods for key in method.name.left_out))
    if hidden:
        keys = listed(hidden, 12)
        yield f"The methods differ in more than their names say: {keys}. These may also explain differences in figures."


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
            f"Not every method has every seed, so the means are over different seeds: {listed(lacking)}. Ranks are "
            "over the seeds that all methods have, tests over the seeds in common with the reference, and the choice "
            "by validation over the seeds that most methods have."
        )
    counts = _counts(comparison)
    few = min((n for ns in counts.values() for n in ns if n > 1), default=6)
    if few < 6:
        those = [label for label, ns in counts.items() if few in ns]
        who = f" ({listed(those)})" * (len(those) < len(counts))
        yield (
            f"With {few} seeds{who} the intervals and the t-test assume normally distributed figures, which so few "
            "seeds can't confirm, and a small p may only mean that a few differences happened to be similar. A "
            f"signed-rank test, which doesn't assume this, can't get below p = {smallest_p(few):g} with {few} seeds; "
            "it takes 6 seeds to get below 0.05."
        )
    stiff = [method.label for method in comparison.everything if _same_in_all_seeds(method, comparison)]
    if stiff:
        yield f"All seeds of {listed(stiff)} have the same figures: the seed seems to have no effect."
    if repeated := [run for method in comparison.everything for run in method.repeated]:
        yield (
            "Run more than once with the same settings and seed, of which only the newest run counts. Left out: "
            f"{listed([str(run.folder) for run in repeated])}."
        )


def _counts(comparison: Comparison) -> dict[str, set[int]]:
    """Returns, by method, the numbers of seeds of the means and of the differences from the reference."""
    counts: dict[str, set[int]] = {}
    for method in comparison.everything:
        means = (comparison.estimate(method, figure) for figure in comparison.figures)
        counts[method.label] = {len(method.runs), *(mean.n for mean in means if mean)}
    for test in comparison.tests:
        if test.difference.estimate:
            counts[test.method.label].add(test.difference.estimate.n)
    return counts


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
                f"({states}). Its figures are those of the finished runs, which may be the better ones."
            )


def _budgets(comparison: Comparison) -> Iterator[str]:
    methods = comparison.everything
    budgets: list[tuple[str, dict[str, set[Any]]]] = [
        ("steps", {m.label: {run.metrics.get("steps") for run in m.runs.values()} for m in methods}),
        ("epochs", {m.label: {run.metrics.get("epochs") for run in m.runs.values()} for m in methods}),
        ("batch size", {m.label: {str((m.settings.get("data") or {}).get("batch_size"))} for m in methods}),
    ]
    differing = []
    for name, by_method in budgets:
        values_by_label = {label: values - {None} for label, values in by_method.items() if values - {None}}
        if len({value for values in values_by_label.values() for value in values}) > 1:
            groups: dict[str, list[str]] = {}
            for label, values in values_by_label.items():
                groups.setdefault("–".join(map(str, sorted({min(values), max(values)}))), []).append(label)
            differing.append(f"{name} {'; '.join(f'{value} ({listed(who)})' for value, who in groups.items())}")
    if differing:
        early = any((m.settings.get("trainer") or {}).get("patience") is not None for m in methods)
        why = " trainer.patience ends runs early." if early else ""
        yield f"Different budgets: {', '.join(differing)}.{why} These may also explain differences in figures."


def _data(comparison: Comparison) -> Iterator[str]:
    for split in ("train", "val", "test"):
        prints: dict[int, dict[str, list[str]]] = {}
        seeds: dict[str, list[str]] = {}
        for method in comparison.everything:
            for seed, run in method.runs.items():
                if (digest := run.fingerprint(split)) is not None:
                    prints.setdefault(seed, {}).setdefault(digest, []).append(method.label)
        for seed, by in sorted(prints.items()):
            for digest in by:
                seeds.setdefault(digest, []).append(str(seed))
        if differing := next((by for by in prints.values() if len(by) > 1), None):
            who = "; ".join(f"{digest[:8]} ({listed(labels)})" for digest, labels in differing.items())
            yield f"Different data: the {split} split isn't the same for all, with the same seed: {who}."
        elif 1 < len(seeds) < len(prints):  # a split that is drawn from the seed differs between seeds
            who = "; ".join(f"{digest[:8]} (seeds {listed(of)})" for digest, of in seeds.items())
            yield f"Different data: the {split} split isn't the same for all seeds: {who}."
    missing = [
        m.label for m in comparison.everything if any(r.fingerprint(comparison.split) is None for r in m.runs.values())
    ]
    if missing:
        yield (
            f"Whether all had the same data isn't known: there is no fingerprint of the {comparison.split} split for "
            f"{listed(missing)}."
        )


def _versions(comparison: Comparison) -> Iterator[str]:
    packages = [(f"versions of {name}", name) for name in ("mtl", "torch", "numpy", "python")]
    for what, name in (*packages, ("devices", "device"), ("numbers of threads", "threads")):
        versions: dict[str, list[str]] = {}
        for method in comparison.everything:
            of_runs = ((run.metrics.get("versions") or {}).get(name) or "unknown" for run in method.runs.values())
            for version in dict.fromkeys(map(str, of_runs)):
                versions.setdefault(version, []).append(method.label)
        if len(versions) > 1:
            who = "; ".join(f"{version} ({listed(labels)})" for version, labels in versions.items())
            yield f"Different {what}: {who}. Figures may differ a little because of this, time and memory more."


def _times(comparison: Comparison) -> Iterator[str]:
    if together := side_by_side(comparison):
        yield (
            f"Jobs ran side by side (hydra/launcher={listed(together)}), so their times depend on the load of the "
            "machine as well as on the methods, whatever the intervals; they aren't compared."
        )


def _monitors(comparison: Comparison) -> Iterator[str]:
    runs = [run for method in comparison.methods for run in method.runs.values() if run.validated]
    monitors = {str((run.metrics.get("best") or {}).get("monitor")) for run in runs}
    if len(monitors) > 1:
        yield f"The best epochs were chosen by different figures: {'; '.join(sorted(monitors))}."


def _figures(comparison: Comparison) -> Iterator[str]:
    silent = [task for task in comparison.tasks if not any(figure.task == task for figure in comparison.figures)]
    if silent:
        yield (
            f"There are no figures of {listed(silent)} on {comparison.data}{comparison.means}, so this section shows "
            "nothing about these tasks."
        )
    unknown = [str(f) for f in dict.fromkeys([*comparison.mains, *comparison.gained]) if f.mode is None]
    if unknown:
        yield (
            f"Whether higher or lower is better isn't known for {listed(unknown)}, so there is no Δm, rank or front "
            "with these figures."
        )
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
        yield (
            f"Left out, since there is no number: {listed(broken)}. If a run diverged, the mean of the other runs "
            "is biased in the method's favour."
        )


def _baselines(comparison: Comparison) -> Iterator[str]:
    differing: dict[str, list[str]] = {}
    for method in comparison.methods:
        if len(method.tasks) > 1:
            for task in method.tasks:
                _, keys = comparison.section.baseline(method, task)
                if keys:
                    differing.setdefault(f"{task} alone differs in {listed(keys)}", []).append(method.label)
    for what, labels in differing.items():
        yield f"Δm of {listed(labels)} compares with single-task runs of other settings: {what}."


def _unsteady(comparison: Comparison) -> Iterator[str]:
    """Yields a caveat if single-task metrics differ much between seeds, because Δm divides by them."""
    for figure in comparison.gained:
        for single in comparison.section.singles.get(figure.task, []):
            values = single.values(comparison.split, figure.task, figure.name).values()
            low, high = min(map(abs, values), default=1.0), max(map(abs, values), default=1.0)
            if high > UNSTEADY * low:
                yield (
                    f"{figure} of {single.label} goes from {number(low)} to {number(high)} over seeds. Δm divides by "
                    "this figure, so the seeds in which it is small dominate Δm, whatever the means are."
                )


def _tasks(comparison: Comparison) -> Iterator[str]:
    """Yields a caveat if methods have different tasks, because Δm isn't comparable then and ranks use common tasks."""
    groups: dict[str, list[str]] = {}
    for method in comparison.methods:
        if comparison.delta(method).estimate:
            groups.setdefault(", ".join(method.tasks), []).append(method.label)
    if len(groups) > 1:
        who = "; ".join(f"{tasks} ({listed(labels)})" for tasks, labels in groups.items())
        yield (
            "Δm is the mean over each method's own tasks, so it can't be compared between methods with different "
            f"tasks: {who}."
        )
