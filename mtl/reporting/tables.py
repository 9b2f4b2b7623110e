"""The tables of a section."""

from collections.abc import Iterable, Sequence, Set

from mtl import tags
from mtl.reporting.comparison import Comparison, Figure, conflict, cost, hardest, pairs_of, side_by_side
from mtl.reporting.curves import FEW, PARTS, Curves
from mtl.reporting.delta import Delta
from mtl.reporting.document import Block, Bullets, Table, Text
from mtl.reporting.grouping import Method
from mtl.reporting.pareto import Pair
from mtl.reporting.writing import listed, number, p_value, plus_minus, signed

MOST_PAIRS = 12  # of tasks in the table of their conflict
WIDE = 6  # figures; more of them have a table for each task


def settings(comparison: Comparison) -> list[Block]:
    """In what the methods differ, where it is more than one thing."""
    keys = list(dict.fromkeys(key for method in comparison.methods for key in method.name.told))
    if len(keys) < 2:
        return []
    rows = [[method.label, *(method.name.told.get(key, "–") for key in keys)] for method in comparison.methods]
    note = "–: the method's class has no such key."
    return [Table("In what the methods differ", ["method", *keys], rows, note=note, detail=True)]


def figures(comparison: Comparison) -> list[Block]:
    """A table of all figures, or one for each task where they are many."""
    if len(comparison.figures) <= WIDE:
        return [_table(comparison, f"Figures on {comparison.split}", comparison.figures)]
    by_task = _by_task(comparison.figures)
    return [
        _table(comparison, f"Figures on {comparison.split}: {task}", by_task[task])
        for task in comparison.tasks
        if task in by_task
    ]


def _by_task(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.task, []).append(figure)
    return found


def _table(comparison: Comparison, title: str, figures: Sequence[Figure]) -> Table:
    def row(method: Method, shown: Set[Figure]) -> list[str]:
        cells = []
        for figure in figures:
            found = comparison.estimate(method, figure) if figure in shown else None
            few = f" (n={found.n})" if found and found.n < len(method.runs) else ""
            cells.append(f"{plus_minus(found)}{few}" if figure in shown else "")
        return [method.label, str(len(method.runs)), *cells]

    rows = [row(method, frozenset(figures)) for method in comparison.methods]
    for task, of_task in _by_task(figures).items():
        rows += [row(single, frozenset(of_task)) for single in comparison.section.singles.get(task, [])]
    columns = ["method", "seeds", *(f"{figure}{figure.arrow}" for figure in figures)]
    chosen = {0} if comparison.choice.order and len(comparison.methods) > 1 else set[int]()
    note = "Bold: what validation would choose." if chosen else ""
    return Table(title, columns, rows, strong=chosen, note=note)


def gains(comparison: Comparison) -> list[Block]:
    """Δm and that of each task, mean ranks, and why there are none."""
    deltas = [comparison.delta(method) for method in comparison.methods]
    defined = any(found.estimate for found in deltas)
    ranks = comparison.ranks
    each = comparison.mains if defined and 1 < len(comparison.mains) <= WIDE else []
    columns = [
        *(["method"] + ["seeds", "Δm, %↑"] * defined),
        *(["mean rank↓"] * (ranks is not None) + [f"Δ {figure.task}, %" for figure in each]),
    ]
    rows = []
    for index, (method, found) in enumerate(zip(comparison.methods, deltas, strict=True)):
        gain = [str(found.estimate.n) if found.estimate else "–", signed(found.estimate)] if defined else []
        rank = [f"{ranks[0][index]:.2f}"] if ranks else []
        alone = [signed(comparison.delta(method, [f]).estimate) if f.task in method.tasks else "" for f in each]
        rows.append([method.label, *gain, *rank, *alone])
    how = {"paired": "Δm is taken seed by seed", "unpaired": "Δm is taken of means"}
    notes = [f"{how[way]}." for way in dict.fromkeys(found.how for found in deltas) if way]
    notes += [f"Ranks are over {ranks[1]} pairs of task and seed, those that all methods have."] if ranks else []
    title = " and ".join(["gain over the tasks alone"] * defined + ["mean rank"] * (ranks is not None))
    table = [Table(title.capitalize(), columns, rows, note=" ".join(notes))] if len(columns) > 1 else []
    return [*table, *(_no_gain(comparison, deltas) if len(comparison.tasks) > 1 else [])]


def _no_gain(comparison: Comparison, deltas: Sequence[Delta]) -> list[Block]:
    """Why Δm isn't defined, or has no interval."""
    reasons: dict[str, list[str]] = {}
    for method, found in zip(comparison.methods, deltas, strict=True):
        if found.why:
            what = "no interval for Δm" if found.estimate else "Δm isn't defined"
            reasons.setdefault(f"{what}: {found.why}", []).append(method.label)
    texts = [f"{listed(labels)}: {reason}." for reason, labels in reasons.items()]
    if not comparison.section.singles:
        texts = ["Δm isn't defined: no run is of a task alone. Add some, by +sweep=single_task."]
    return [Bullets(texts)] if texts else []


def tests(comparison: Comparison) -> list[Block]:
    """Every method against the reference."""
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
    """Time and memory, as they are and beside the reference's."""
    rows = []
    theirs = [cost(comparison.reference, name) for name in ("seconds_per_step", "memory_per_step")]
    for method in comparison.everything:
        row = [method.label]
        for name, factor, base in zip(("seconds_per_step", "memory_per_step"), (1e3, 1e-6), theirs, strict=True):
            found = cost(method, name)
            comparable = name != "seconds_per_step" or not side_by_side(comparison)
            ratio = f"{found.mean / base.mean:.2f}" if comparable and found and base and base.mean > 0 else "–"
            row += [plus_minus(found.times(factor) if found else None), ratio]
        rows.append(row)
    kept = [0, *(i for i in range(1, 5) if any(row[i] != "–" for row in rows))]
    if len(kept) == 1:
        return [Text("Time and memory per step aren't known.")]
    columns = ["method", "ms per step", "× ref.", "MB per step", "× ref."]
    note = f"× ref.: as a multiple of {comparison.reference.label}'s."
    told = [[row[index] for index in kept] for row in rows]
    return [Table("Time and memory per step", [columns[index] for index in kept], told, note=note)]


def fronts(found: Sequence[Pair]) -> Table:
    """The methods on each pair's front, and its hypervolume."""
    rows = [
        [
            f"{pair.x.task} and {pair.y.task}",
            listed([m.label for m, on in zip(pair.methods, pair.on_front, strict=True) if on], 8),
            number(pair.volume),
            plus_minus(pair.volume_over_seeds),
            f"({number(pair.reference[0])}, {number(pair.reference[1])})",
        ]
        for pair in found
    ]
    return Table(
        "Fronts and hypervolumes",
        ["tasks", "on the front", "hypervolume", "of each seed's front", "reference point"],
        rows,
        texts=2,
        note="Where intervals overlap, another method may as well be on the front.",
    )


def conflicts(comparison: Comparison, curves: Curves) -> list[Block]:
    """How each two tasks' gradients get on under each method."""
    rows = []
    short: list[Method] = []  # of measured steps
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
                told = [measured, signed(cosine), "–" if few else plus_minus(below.times(100)), *parts]
                rows.append([" and ".join(tags.tasks_of(pair)), method.label, *told])
    if not rows:
        return []
    columns = ["tasks", "method", "steps", "mean cosine", "below 0, %", "first third", "second", "last"]
    note = (
        "The share of measured steps in which the cosine was below zero: in all of training, and in its thirds; there "
        f"is none where fewer than {FEW} steps were measured{_how_to_measure_more(short)}."
    )
    note += f" The {len(shown)} of {count} pairs with the lowest mean cosine; report.csv has all." * (
        len(shown) < count
    )
    return [Table("Conflict between tasks", columns, rows, texts=2, note=note, detail=len(rows) > 30)]


def _how_to_measure_more(methods: Sequence[Method]) -> str:
    """The advice to log more often, where the runs were long enough for it to help."""
    runs = [run for method in methods for run in method.runs.values()]
    every = min(((run.config.get("log") or {}).get("every") or 1 for run in runs), default=1)
    enough = min((run.metrics.get("steps") or 0 for run in runs), default=0) // (PARTS * FEW)
    return f": log.every={enough} measures often enough for all" if 0 < enough < every else ""
