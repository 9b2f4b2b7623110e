"""The report, from its parts: what is said, shown and put into tables of each section."""

from collections.abc import Sequence

from mtl.reporting.caveats import caveats
from mtl.reporting.comparison import Comparison, Figure, conflict, cost, pairs_of
from mtl.reporting.curves import Curves
from mtl.reporting.document import Block, Bullets, Heading, Picture, Table, Text
from mtl.reporting.estimates import paired
from mtl.reporting.grouping import Method
from mtl.reporting.pareto import MOST_TASKS, pictures
from mtl.reporting.plots import Plots
from mtl.reporting.reading import Run
from mtl.reporting.writing import listed, number, p_value, plus_minus, signed, slug

WIDE = 6  # figures; more of them have a table for each task
METHOD = [
    "A method is the finished runs whose configs differ in the seed alone. It is named by what differs from the others.",
    "Figures are those of the best epoch on validation. ± and [ ] are 95 % confidence intervals by Student's t over "
    "seeds. They say how far another set of seeds would move the mean, with the same data: not what other test samples "
    "would.",
    "Δm is the mean over tasks of (method - alone) / alone in percent, of each task's main figure (its first that isn't "
    "the loss), with the sign turned where less is better, so that above 0 the method beats the tasks alone (Maninis et "
    "al. 2019, arXiv 1904.08918). With at least two seeds in common it is taken seed by seed, and the interval is over "
    "these; otherwise of the means, with the interval by the delta method and Welch's and Satterthwaite's degrees of "
    "freedom. Either way the spread of the single-task runs is in it.",
    "The mean rank is over tasks and the seeds that all methods have; 1 is the best, and equal figures share a rank.",
    "Tests are paired t-tests against the reference over common seeds, two-sided. Holm's correction is for all tests of "
    "their table together; p-values of two tables aren't corrected for each other.",
    "Time and memory are the runs' own measurements: seconds per step, logging included, and peak bytes beyond what is "
    "alive between steps.",
    "The front and its hypervolume are of the methods' means (moocore). The reference point is the worst of either "
    "figure in any run of these methods, so volumes of different reports can't be compared.",
]


def introduction(runs: Sequence[Run], folders: Sequence[str]) -> list[Block]:
    """What the report is of, and the runs that don't count."""
    finished = sum(run.status == "finished" for run in runs)
    blocks: list[Block] = [
        Heading("Comparison of runs", 1),
        Text(f"{finished} finished of {len(runs)} runs in {listed(list(folders))}."),
    ]
    lost = [run for run in runs if run.status != "finished"]
    if lost:
        rows = [[run.status, run.problem or "–", str(run.folder), run.error] for run in lost]
        blocks.append(
            Table(
                f"{len(lost)} runs don't count, since they aren't finished",
                ["status", "problem", "folder", "why"],
                rows,
                texts=4,
            )
        )
    return blocks


def explanation() -> list[Block]:
    """How the numbers are made."""
    return [Heading("How the numbers are made", 2), Bullets(METHOD)]


def page(comparison: Comparison, pairs: Sequence[Sequence[str]]) -> list[Block]:
    """Everything about one section."""
    curves = Curves(comparison.methods)
    plots = Plots(comparison, curves, slug(comparison.section.title))
    return [
        Heading(comparison.section.title, 2),
        Text(_what(comparison)),
        Text(_which(comparison)),
        *_warnings(comparison, curves),
        *_figures(comparison),
        plots.reached(),
        *_deltas(comparison),
        *_tests(comparison),
        *_costs(comparison),
        *_pareto(comparison, plots, pairs),
        *_training(plots),
        *_conflict(comparison, curves, plots),
        _runs(comparison),
    ]


def _what(comparison: Comparison) -> str:
    methods, singles = comparison.methods, comparison.everything[len(comparison.methods) :]
    runs = [run for method in methods for run in method.runs.values()]
    seeds = sorted({run.seed for run in runs})
    samples = {(run.metrics.get("samples") or {}).get(comparison.split) for run in runs} - {None}
    size = f" of {samples.pop():,} samples" if len(samples) == 1 else ""
    alone = f", and {sum(len(single.runs) for single in singles)} of single tasks" if singles else ""
    order = "by validation, the best first" if comparison.choice.order else "by name"
    return (
        f"{len(runs)} runs of {len(methods)} method{'s' * (len(methods) > 1)}{alone}. "
        f"Seed{'s' * (len(seeds) > 1)} {listed([str(seed) for seed in seeds], 10)}. Figures of the {comparison.split} "
        f"split{size}. Methods are in order {order}."
    )


def _which(comparison: Comparison) -> str:
    """What validation would have one choose, and how sure that is."""
    choice = comparison.choice
    if len(comparison.methods) < 2:
        return "There is one method, so there is nothing to choose."
    if choice.why:
        return f"Which method to choose can't be said: {choice.why}."
    first, second = choice.order[:2]
    values = [{seed: float(run.metrics["best"]["value"]) for seed, run in m.runs.items()} for m in (first, second)]
    ahead = paired(*values)
    text = (
        f"By validation one would choose {first.label}: {plus_minus(choice.values[0])} in {choice.monitor}, "
        f"before {second.label} with {plus_minus(choice.values[1])}."
    )
    if ahead.estimate is None or ahead.estimate.half is None:
        text += " There aren't two seeds in common to say whether that is more than chance."
    else:
        more = abs(ahead.estimate.mean) > ahead.estimate.half
        text += (
            f" Their difference over {ahead.estimate.n} common seeds is {signed(ahead.estimate)}, "
            f"{'which is more than seeds explain' if more else 'which may be chance: either would do'}."
        )
    figures = [f"{f} {plus_minus(comparison.estimate(first, f))}" for f in comparison.mains[:WIDE]]
    return f"{text} What it then reaches on {comparison.split}: {listed(figures)}."


def _warnings(comparison: Comparison, curves: Curves) -> list[Block]:
    found = caveats(comparison, curves)
    return [Heading("What this can't say", 3), Bullets(found, warning=True)] if found else []


def _figures(comparison: Comparison) -> list[Block]:
    """A table of all figures, or one for each task where they are many."""
    if len(comparison.figures) <= WIDE:
        return [_table(comparison, f"Figures on {comparison.split}", comparison.figures)]
    return [
        _table(comparison, f"Figures on {comparison.split}: {task}", figures)
        for task in comparison.tasks
        if (figures := [figure for figure in comparison.figures if figure.task == task])
    ]


def _table(comparison: Comparison, title: str, figures: Sequence[Figure]) -> Table:
    rows = [
        [method.label, *(plus_minus(comparison.estimate(method, f)) for f in figures), str(len(method.runs))]
        for method in comparison.methods
    ]
    for task in dict.fromkeys(figure.task for figure in figures):
        for single in comparison.section.singles.get(task, []):
            cells = [plus_minus(comparison.estimate(single, f)) if f.task == task else "" for f in figures]
            rows.append([single.label, *cells, str(len(single.runs))])
    columns = ["method", *(f"{figure}{figure.arrow}" for figure in figures), "seeds"]
    chosen = {0} if comparison.choice.order and len(comparison.methods) > 1 else set[int]()
    note = "Bold: what validation would choose." if chosen else ""
    return Table(title, columns, rows, strong=chosen, note=note)


def _deltas(comparison: Comparison) -> list[Block]:
    """Δm with that of each task, and mean ranks."""
    columns, rows, reasons = ["method"], [], []
    deltas = {method.label: comparison.delta(method) for method in comparison.methods}
    any_delta = any(found.estimate for found in deltas.values())
    tasks = comparison.mains if any_delta and 1 < len(comparison.mains) <= WIDE else []
    columns += [f"Δ {figure.task}, %" for figure in tasks] + ["Δm, % ↑"] * any_delta
    ranks = comparison.ranks
    columns += ["seeds"] * any_delta + ["mean rank ↓"] * (ranks is not None)
    for index, method in enumerate(comparison.methods):
        found = deltas[method.label]
        if found.why:
            reasons.append((found.why, method.label, found.estimate is None))
        each = [
            signed(comparison.delta(method, [f]).estimate) if f.task in method.tasks else "" for f in tasks
        ]
        row = [method.label, *each]
        if any_delta:
            row += [signed(found.estimate), str(found.estimate.n) if found.estimate else "–"]
        rows.append(row + ([f"{ranks[0][index]:.2f}"] if ranks else []))
    blocks: list[Block] = []
    if len(columns) > 1:
        title = " and ".join(["Gain over the tasks alone"] * any_delta + ["mean rank"] * (ranks is not None))
        note = f"Ranks are over {ranks[1]} pairs of task and seed." if ranks else ""
        how = {found.how for found in deltas.values() if found.estimate}
        note = " ".join([*(["Δm seed by seed." if how == {"paired"} else "Δm of means."] if len(how) == 1 else []), note])
        blocks.append(Table(title[0].upper() + title[1:], columns, rows, note=note.strip()))
    if len(comparison.tasks) > 1 and not any_delta and len({why for why, *_ in reasons}) == 1:
        why = f"Δm isn't defined: {reasons[0][0]}."
        blocks.append(Text(f"{why} The tasks alone are trained by only=TASK, with the same seeds." * ("no run" in why) or why))
    elif len(comparison.tasks) > 1:
        groups: dict[tuple[str, bool], list[str]] = {}
        for why, label, undefined in reasons:
            groups.setdefault((why, undefined), []).append(label)
        texts = [
            f"{'No Δm' if undefined else 'No interval for Δm'} of {listed(labels)}: {why}."
            for (why, undefined), labels in groups.items()
        ]
        blocks += [Bullets(texts)] if texts else []
    return blocks


def _tests(comparison: Comparison) -> list[Block]:
    if not comparison.tests:
        return []
    rows = [
        [
            test.method.label,
            str(test.figure),
            signed(test.difference.estimate),
            str(test.difference.estimate.n) if test.difference.estimate else "0",
            p_value(test.difference.p) if test.difference.p is not None else test.difference.why,
            p_value(test.holm),
        ]
        for test in comparison.tests
    ]
    strong = {i for i, test in enumerate(comparison.tests) if test.holm is not None and test.holm < 0.05}
    count = comparison.num_tests
    note = f"Corrected for {count} test{'s' * (count != 1)}." if count else "There is nothing to test."
    if count:
        small = sum(test.difference.p is not None and test.difference.p < 0.05 for test in comparison.tests)
        note += (
            f" Of {count} tests of methods that don't differ, {number(0.05 * count)} would have p < 0.05 by chance; "
            f"{small} {'has' if small == 1 else 'have'}, and {len(strong)} after correction (bold)."
        )
    return [
        Table(
            f"Difference from {comparison.reference.label}, on common seeds",
            ["method", "figure", "difference", "seeds", "p", "p, Holm"],
            rows,
            texts=2,
            strong=strong,
            note=note,
        )
    ]


def _costs(comparison: Comparison) -> list[Block]:
    rows = []
    theirs = [cost(comparison.reference, name) for name in ("seconds_per_step", "memory_per_step")]
    for method in comparison.everything:
        row = [method.label]
        for name, factor, base in zip(("seconds_per_step", "memory_per_step"), (1e3, 1e-6), theirs, strict=True):
            found = cost(method, name)
            ratio = f"{found.mean / base.mean:.2f}×" if found and base and base.mean > 0 else "–"
            row += [plus_minus(found.times(factor) if found else None), ratio]
        rows.append(row)
    kept = [0, *(i for i in range(1, 5) if any(row[i] != "–" for row in rows))]
    if len(kept) == 1:
        return [Text("Time and memory per step aren't known.")]
    base = comparison.reference.label
    columns = ["method", "ms per step", f"of {base}", "MB per step", f"of {base}"]
    return [Table("Time and memory per step", [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])]


def _pareto(comparison: Comparison, plots: Plots, pairs: Sequence[Sequence[str]]) -> list[Block]:
    found = pictures(comparison, pairs)
    if not found:
        many = len(comparison.mains) > MOST_TASKS and not pairs
        ask = f"Of {len(comparison.mains)} tasks no two are shown against each other; --pair A B asks for some."
        return [Text(ask)] if many else []
    rows = [
        [
            f"{pair.x} and {pair.y}",
            listed([m.label for m, on in zip(pair.methods, pair.on_front, strict=True) if on], 8),
            number(pair.volume),
            plus_minus(pair.volume_over_seeds),
            f"({number(pair.reference[0])}, {number(pair.reference[1])})",
        ]
        for pair in found
    ]
    table = Table(
        "Fronts and hypervolumes",
        ["figures", "on the front", "hypervolume", "of each seed's front", "reference point"],
        rows,
        texts=2,
        note="The front of several methods' means needs luck too: with intervals that overlap another one may be on it.",
    )
    return [plots.pareto(found), table]


def _training(plots: Plots) -> list[Block]:
    found = plots.training()
    return [found] if found else []


def _conflict(comparison: Comparison, curves: Curves, plots: Plots) -> list[Block]:
    rows = []
    for pair in pairs_of(comparison.methods):
        for method in comparison.methods:
            cosine, below = (conflict(method, pair, name) for name in ("mean", "below_zero"))
            if cosine and below:
                parts = ["–" if share is None else f"{share:.0%}" for share in curves.below_zero(method, pair)]
                told = [signed(cosine), plus_minus(below.times(100)), *parts]
                rows.append([pair.replace("~", " and "), method.label, *told])
    if not rows:
        return []
    columns = ["tasks", "method", "mean cosine", "below 0, %", "first third", "second", "last"]
    note = "The share of measured steps in which the cosine was below zero: in all of training, and in its thirds."
    table = Table("Conflict between tasks", columns, rows, texts=2, note=note, detail=len(rows) > 30)
    picture = plots.conflict()
    return [picture, table] if isinstance(picture, Picture) else [table]


def _runs(comparison: Comparison) -> Table:
    def row(method: Method, run: Run) -> list[str]:
        best = run.metrics.get("best") or {}
        value = best.get("value")
        return [
            method.label,
            str(run.folder),
            str(run.seed),
            str(run.metrics.get("steps", "–")),
            f"{best.get('epoch', '–')} of {run.metrics.get('epochs', '–')}",
            "–" if value is None else number(float(value)),
        ]

    rows = [row(method, run) for method in comparison.everything for run in method.runs.values()]
    columns = ["method", "folder", "seed", "steps", "best epoch", "monitored"]
    return Table(f"The {len(rows)} runs", columns, rows, texts=2, detail=True)

