"""Assembles the report: the texts, plots and tables of each section."""

from collections.abc import Sequence
from textwrap import shorten

from mtl.reporting import tables
from mtl.reporting.caveats import caveats
from mtl.reporting.comparison import Comparison
from mtl.reporting.curves import Curves
from mtl.reporting.document import Block, Bullets, Heading, Picture, Table, Text
from mtl.reporting.estimates import estimate, paired
from mtl.reporting.grouping import Method
from mtl.reporting.matrices import matrices
from mtl.reporting.pareto import MOST_TASKS, pairs_to_show
from mtl.reporting.plots import Plots
from mtl.reporting.reading import UNSEEN, Run
from mtl.reporting.writing import listed, number, plus_minus, signed, slug

SHOWN = 6  # the most metrics listed for the chosen method
METHOD = [
    "A method consists of the finished runs whose configs differ only in the seed, and in keys that don't affect the "
    f"figures ({listed(sorted(UNSEEN - {'seed', 'only'}), 20)}). Its name has the values that distinguish it from "
    "other methods.",
    "Figures are those of the best epoch on validation, or of the last epoch for runs without validation; with --split "
    "last, they are means over the last epochs of validation. ± and [ ] are 95 % confidence intervals by Student's t "
    "over seeds. They describe how much other seeds would change the mean on the same data, not how much other test "
    "samples would.",
    "Δm is the mean of (method - alone) / alone in percent over the figures of --delta, each of which counts once; by "
    "default over the main figures of the tasks, the first that isn't the loss. The sign is reversed if lower is "
    "better, so values above 0 mean that the method is better than single-task runs (Maninis et al. 2019, arXiv "
    "1904.08918; some papers have the opposite sign). With at least two common seeds, Δm is computed for each seed, "
    "and the interval is over the seeds; otherwise Δm is computed from the means, with an interval by the delta method "
    "and Welch's and Satterthwaite's degrees of freedom. Both intervals include the spread of the single-task runs.",
    "The mean rank is over the figures of Δm and the seeds that all methods have; 1 is the best, and equal figures "
    "share a rank.",
    "Tests are two-sided paired t-tests against the reference over common seeds. Holm's correction is for all tests of "
    "one table, without those of other tables. It changes p only: the intervals of differences aren't corrected, so an "
    "interval may exclude zero although the corrected p is above 0.05.",
    "Bands of curves are 95 % intervals for each step separately; a whole curve leaves the band more often.",
    "Time and memory are the runs' own measurements: seconds per step, logging included, and the peak beyond "
    "parameters, buffers and the optimizer's state, in MB of a million bytes.",
    "Data count as the same if their fingerprints are equal: a digest of the whole split if it is in memory, otherwise "
    "of its length and 16 samples.",
    "The front and its hypervolume are computed from the methods' means (moocore). The reference point has the worst "
    "value of each figure in any run of these methods, so volumes of different reports can't be compared.",
]


def introduction(runs: Sequence[Run], folders: Sequence[str]) -> list[Block]:
    """Describes what the report covers, and lists runs that are left out."""
    finished = sum(run.status == "finished" for run in runs)
    blocks: list[Block] = [
        Heading("Comparison of runs", 1),
        Text(f"{finished} finished of {len(runs)} runs in {listed(list(folders))}."),
    ]
    lost = [run for run in runs if run.status != "finished"]
    if lost:
        rows = [
            [run.status, run.problem or "–", str(run.folder), shorten(run.error, 160, placeholder=" …")] for run in lost
        ]
        blocks.append(
            Table(
                f"{len(lost)} runs don't count, since they aren't finished"
                if len(lost) > 1
                else "One run doesn't count, since it isn't finished",
                ["status", "problem", "folder", "why"],
                rows,
                texts=4,
            )
        )
    return blocks


def explanation() -> list[Block]:
    """Explains how the numbers are computed."""
    return [Heading("How the numbers are computed", 2), Bullets(METHOD)]


def page(comparison: Comparison, pairs: Sequence[Sequence[str]], number: int) -> list[Block]:
    """Returns all blocks of the section with this number."""
    heading = Heading(comparison.section.title, 2)
    if not comparison.figures:
        return [heading, Text(f"No run has figures of the {comparison.split} split."), _runs(comparison)]
    curves = Curves(comparison.methods)
    plots = Plots(comparison, curves, f"{slug(comparison.section.title)}-{number}")
    return [
        heading,
        Text(_what(comparison)),
        Text(_which(comparison)),
        *_warnings(comparison, curves),
        *tables.settings(comparison),
        *tables.figures(comparison),
        plots.reached(),
        *tables.gains(comparison),
        *tables.tests(comparison),
        *tables.costs(comparison),
        *_pareto(comparison, plots, pairs),
        *matrices(comparison.methods, comparison.split, plots.name),
        *_plot(plots.training()),
        *_plot(plots.conflict()),
        *tables.conflicts(comparison, curves),
        _runs(comparison),
    ]


def _what(comparison: Comparison) -> str:
    """Describes the methods, runs, seeds and data of the section."""
    methods, singles = comparison.methods, comparison.everything[len(comparison.methods) :]
    runs = [run for method in methods for run in method.runs.values()]
    seeds = sorted({run.seed for run in runs})
    samples = {(run.metrics.get("samples") or {}).get(comparison.data) for run in runs} - {None}
    size = f" of {samples.pop():,} samples" if len(samples) == 1 else ""
    alone = f", and {sum(len(single.runs) for single in singles)} of single tasks" if singles else ""
    placed = comparison.choice.order
    order = "by validation, the best first" if placed else "by name"
    lacking = [method.label for method in methods if method not in placed] if placed else []
    order += f"; not ranked, because of other seeds or another monitor: {listed(lacking)}" * bool(lacking)
    reference = f" {_reference(comparison)}" * (len(methods) > 1)
    return (
        f"{len(runs)} runs of {len(methods)} method{'s' * (len(methods) > 1)}{alone}. "
        f"Seed{'s' * (len(seeds) > 1)} {listed([str(seed) for seed in seeds], 10)}. Figures of the {comparison.data} "
        f"split{size}{comparison.means}. Methods are ordered {order}.{reference}"
    )


def _reference(comparison: Comparison) -> str:
    """Describes the reference method and why it is the reference."""
    count = len(comparison.equals)
    if comparison.asked:
        why = "as requested"
    elif not count:
        why = "an arbitrary choice, since no method has equal weights; --reference names another"
    elif count == 1:
        why = "which has equal weights"
    else:
        first = "best on validation" if comparison.choice.order else "first by name"
        why = f"the {first} of the {count} methods with equal weights"
    return f"Other methods are tested against {comparison.reference.label}, {why}."


def _which(comparison: Comparison) -> str:
    """Describes which method validation would choose, and how certain the choice is."""
    choice = comparison.choice
    if len(comparison.methods) < 2:
        return "There is one method, so there is nothing to choose."
    if choice.why:
        return f"Which method to choose isn't known: {choice.why}."
    first, second = choice.order[:2]
    ahead = paired(*choice.values[:2])
    reached = [plus_minus(estimate(list(values.values()))) for values in choice.values[:2]]
    seeds = list(choice.values[0])
    over = f", over the seeds {listed([str(seed) for seed in seeds], 10)}"
    text = (
        f"By validation one would choose {first.label}: {reached[0]} in {choice.monitor}, before {second.label} with "
        f"{reached[1]}{over * any(len(m.runs) > len(seeds) for m in choice.order)}."
    )
    if ahead.estimate is None or ahead.estimate.half is None:
        text += " Without two common seeds, it isn't known whether the difference is more than chance."
    else:
        sure = abs(ahead.estimate.mean) > ahead.estimate.half
        text += (
            f" Their difference over {ahead.estimate.n} common seeds is {signed(ahead.estimate)}, "
            f"{'which is more than the spread over seeds explains' if sure else 'which may be chance'}"
        )
        text += f", though these two are the first of {len(choice.order)}." if sure and len(choice.order) > 2 else "."
    figures = [f"{f} {plus_minus(comparison.estimate(first, f))}" for f in comparison.mains[:SHOWN]]
    return f"{text} Its figures on {comparison.data}{comparison.means}: {listed(figures)}."


def _warnings(comparison: Comparison, curves: Curves) -> list[Block]:
    sentences = caveats(comparison, curves)
    return [Heading("Caveats", 3), Bullets(sentences, warning=True)] if sentences else []


def _pareto(comparison: Comparison, plots: Plots, pairs: Sequence[Sequence[str]]) -> list[Block]:
    shown_pairs = pairs_to_show(comparison, pairs)
    if shown_pairs:
        return [plots.pareto(shown_pairs), tables.fronts(shown_pairs)]
    many = len(comparison.mains) > MOST_TASKS and not pairs
    hint = f"With {len(comparison.mains)} tasks, pairs of tasks aren't plotted; --pair A B plots a pair."
    return [Text(hint)] if many else []


def _plot(picture: Picture | None) -> list[Block]:
    return [picture] if picture else []


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
