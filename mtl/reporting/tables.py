"""The tables of a section."""

from collections.abc import Iterable, Sequence, Set

from mtl import tags
from mtl.reporting.comparison import Comparison, conflict, cost, hardest, pairs_of, side_by_side
from mtl.reporting.curves import FEW, PARTS, Curves
from mtl.reporting.delta import Delta
from mtl.reporting.document import Block, Bullets, Table, Text
from mtl.reporting.figures import Figure
from mtl.reporting.grouping import Method
from mtl.reporting.pareto import Pair
from mtl.reporting.writing import listed, number, p_value, plus_minus, signed

MOST_PAIRS = 12  # the most pairs of tasks in the table of conflict
WIDE = 6  # the most figures in one table; otherwise each task has a table


def settings(comparison: Comparison) -> list[Block]:
    """Returns a table of the keys in which the methods differ, if there are several such keys."""
    keys = list(dict.fromkeys(key for method in comparison.methods for key in method.name.settings))
    if len(keys) < 2:
        return []
    rows = [[method.label, *(method.name.settings.get(key, "–") for key in keys)] for method in comparison.methods]
    note = "–: the method's class has no such key."
    return [Table("How the methods differ", ["method", *keys], rows, note=note, detail=True)]


def figures(comparison: Comparison) -> list[Block]:
    """Returns a table of all figures, or a table for each task if there are many figures."""
    if len(comparison.figures) <= WIDE:
        return [_table(comparison, f"Figures on {comparison.data}{comparison.means}", comparison.figures)]
    by_task = _by_task(comparison.figures)
    return [
        _table(comparison, f"Figures on {comparison.data}{comparison.means}: {task}", by_task[task])
        for task in comparison.tasks
        if task in by_task
    ]


def _by_task(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    by_task: dict[str, list[Figure]] = {}
    for figure in figures:
        by_task.setdefault(figure.task, []).append(figure)
    return by_task


def _table(comparison: Comparison, title: str, figures: Sequence[Figure]) -> Table:
    def row(method: Method, shown: Set[Figure]) -> list[str]:
        cells = []
        for figure in figures:
            mean = comparison.estimate(method, figure) if figure in shown else None
            few = f" (n={mean.n})" if mean and mean.n < len(method.runs) else ""
            cells.append(f"{plus_minus(mean)}{few}" if figure in shown else "")
        return [method.label, str(len(method.runs)), *cells]

    rows = [row(method, frozenset(figures)) for method in comparison.methods]
    for task, of_task in _by_task(figures).items():
        rows += [row(single, frozenset(of_task)) for single in comparison.section.singles.get(task, [])]
    columns = ["method", "seeds", *(f"{figure}{figure.arrow}" for figure in figures)]
    chosen = {0} if comparison.choice.order and len(comparison.methods) > 1 else set[int]()
    note = "Bold: the method that validation would choose." if chosen else ""
    return Table(title, columns, rows, strong=chosen, note=note)


def gains(comparison: Comparison) -> list[Block]:
    """Returns a table of Δm, the relative difference of each task and mean ranks, and reasons why Δm is undefined."""
    deltas = [comparison.delta(method) for method in comparison.methods]
    defined = any(delta.estimate for delta in deltas)
    ranks = comparison.ranks
    tasks = list(dict.fromkeys(figure.task for figure in comparison.gained))
    each = tasks if defined and 1 < len(tasks) <= WIDE else []
    columns = [
        *(["method"] + ["seeds", "Δm, %↑"] * defined),
        *(["mean rank↓"] * (ranks is not None) + [f"Δ {task}, %" for task in each]),
    ]
    rows = []
    for index, (method, delta) in enumerate(zip(comparison.methods, deltas, strict=True)):
        gain = [str(delta.estimate.n) if delta.estimate else "–", signed(delta.estimate)] if defined else []
        rank = [f"{ranks[0][index]:.2f}"] if ranks else []
        alone = [signed(comparison.delta(method, task).estimate) if task in method.tasks else "" for task in each]
        rows.append([method.label, *gain, *rank, *alone])
    how = {"paired": "Δm is computed for each seed", "unpaired": "Δm is computed from means"}
    notes = [f"{how[way]}." for way in dict.fromkeys(delta.how for delta in deltas) if way]
    if len(comparison.gained) > len(tasks):
        names = listed([f"{figure}{figure.arrow}" for figure in comparison.gained], 12)
        notes.insert(0, f"Over {len(comparison.gained)} figures, each of which counts once: {names}.")
    notes += [f"Ranks are over the {ranks[1]} pairs of figure and seed that all methods have."] if ranks else []
    title = " and ".join(["gain over the tasks alone"] * defined + ["mean rank"] * (ranks is not None))
    table = [Table(title.capitalize(), columns, rows, note=" ".join(notes))] if len(columns) > 1 else []
    return [*table, *(_no_gain(comparison, deltas) if len(comparison.tasks) > 1 else [])]


def _no_gain(comparison: Comparison, deltas: Sequence[Delta]) -> list[Block]:
    """Returns the reasons why Δm is undefined or has no interval, as a list."""
    reasons: dict[str, list[str]] = {}
    for method, delta in zip(comparison.methods, deltas, strict=True):
        if delta.why:
            what = "no interval for Δm" if delta.estimate else "Δm isn't defined"
            reasons.setdefault(f"{what}: {delta.why}", []).append(method.label)
    texts = [f"{listed(labels)}: {reason}." for reason, labels in reasons.items()]
    if not comparison.section.singles:
        texts = ["Δm isn't defined: there are no single-task runs. Add some with +sweep=single_task."]
    return [Bullets(texts)] if texts else []


def tests(comparison: Comparison) -> list[Block]:
    """Returns a table with the test of each method against the reference."""
    if not comparison.tests:
        return []
    rows = [
        [
            test.method.label,
            str(test.figure),
            signed(test.difference.estimate),
            str(test.difference.estimate.n) if test.difference.estimate else "0",
            p_value(test.difference.p) if test.difference.p is not None else "–",
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
    untested = dict.fromkeys(test.difference.why for test in comparison.tests if test.difference.p is None)
    note += f" –: {'; '.join(untested)}." if untested else ""
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


def costs(comparison: Comparison) -> list[Block]:
    """Returns a table of time and memory per step, also as multiples of the reference's."""
    rows = []
    bases = [cost(comparison.reference, name) for name in ("seconds_per_step", "memory_per_step")]
    for method in comparison.everything:
        row = [method.label]
        for name, factor, base in zip(("seconds_per_step", "memory_per_step"), (1e3, 1e-6), bases, strict=True):
            own = cost(method, name)
            comparable = name != "seconds_per_step" or not side_by_side(comparison)
            ratio = f"{own.mean / base.mean:.2f}" if comparable and own and base and base.mean > 0 else "–"
            row += [plus_minus(own.times(factor) if own else None), ratio]
        rows.append(row)
    shown = [0, *(i for i in range(1, 5) if any(row[i] != "–" for row in rows))]
    if len(shown) == 1:
        return [Text("Time and memory per step aren't known.")]
    columns = ["method", "ms per step", "× ref.", "MB per step", "× ref."]
    note = f"× ref.: as a multiple of {comparison.reference.label}'s."
    cells = [[row[index] for index in shown] for row in rows]
    return [Table("Time and memory per step", [columns[index] for index in shown], cells, note=note)]


def fronts(pairs: Sequence[Pair]) -> Table:
    """Returns a table of the methods on the front of each pair, and of the front's hypervolume."""
    rows = [
        [
            f"{pair.x.task} and {pair.y.task}",
            listed([m.label for m, on in zip(pair.methods, pair.on_front, strict=True) if on], 8),
            number(pair.volume),
            plus_minus(pair.volume_over_seeds),
            f"({number(pair.reference[0])}, {number(pair.reference[1])})",
        ]
        for pair in pairs
    ]
    return Table(
        "Fronts and hypervolumes",
        ["tasks", "on the front", "hypervolume", "of each seed's front", "reference point"],
        rows,
        texts=2,
        note="If intervals overlap, other methods may be on the front as well.",
    )


def conflicts(comparison: Comparison, curves: Curves) -> list[Block]:
    """Returns a table of the cosines between the gradients of each pair of tasks, for each method."""
    rows = []
    short: list[Method] = []  # methods with too few measured steps for the thirds of training
    count = len(pairs_of(comparison.methods))
    shown = hardest(comparison.methods, MOST_PAIRS)
    for pair in shown:
        for method in comparison.methods:
            cosine, below = (conflict(method, pair, name) for name in ("mean", "below_zero"))
            if cosine and below:
                steps = conflict(method, pair, "steps")
                few = steps is None or steps.mean < FEW
                shares = curves.below_zero(method, pair)
                short += [method] * (steps is None or steps.mean < PARTS * FEW)
                parts = ["–" if share is None else f"{share:.0%}" for share in shares]
                measured = "–" if steps is None else f"{steps.mean:.0f}"
                cells = [measured, signed(cosine), "–" if few else plus_minus(below.times(100)), *parts]
                rows.append([" and ".join(tags.tasks_of(pair)), method.label, *cells])
    if not rows:
        return []
    columns = ["tasks", "method", "steps", "mean cosine", "below 0, %", "first third", "second", "last"]
    note = (
        "Below 0: the share of measured steps in which the cosine was below zero, in the whole training and in each "
        f"third of it, if at least {FEW} steps were measured{_how_to_measure_more(short)}."
    )
    note += f" The {len(shown)} of {count} pairs with the lowest mean cosine; report.csv has all." * (
        len(shown) < count
    )
    return [Table("Conflict between tasks", columns, rows, texts=2, note=note, detail=len(rows) > 30)]


def _how_to_measure_more(methods: Sequence[Method]) -> str:
    """Returns advice to log more often, if the runs were long enough; else an empty string."""
    runs = [run for method in methods for run in method.runs.values()]
    every = min(((run.config.get("log") or {}).get("every") or 1 for run in runs), default=1)
    enough = min((run.metrics.get("steps") or 0 for run in runs), default=0) // (PARTS * FEW)
    return f": log.every={enough} measures often enough for all" if 0 < enough < every else ""
