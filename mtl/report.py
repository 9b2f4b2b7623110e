"""python -m mtl.report outputs/… [more]: compares finished runs, on the terminal, in Markdown, CSV and HTML."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl.errors import UserError
from mtl.safety.regular import make_folder
from mtl.text import plain

if TYPE_CHECKING:
    from mtl.reporting.comparison import Comparison
    from mtl.reporting.document import Block


def report(
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    split: str | None = None,
    reference: str | None = None,
    pairs: Sequence[Sequence[str]] = (),
) -> None:
    """Reads all runs in the folders and below, prints the comparison, and writes report.md, .csv and .html.

    Args:
        folders: of runs and multiruns, or of many of these.
        out: where the files are written; None: a folder `report` in the first folder.
        split: whose figures are compared, `test` or `val`; None: the test split where a problem has one.
        reference: the label of the method that the others are tested against; None: that of equal weights.
        pairs: of tasks that are shown against each other; none: every pair, where the tasks are few.

    Raises:
        UserError: where there is nothing to compare, or nothing can be written or printed.
    """
    from mtl.process.screen import Screen
    from mtl.reporting import pages, reading, terminal
    from mtl.reporting.comparison import Comparison, check_names
    from mtl.reporting.grouping import sections
    from mtl.reporting.packages import check_packages

    check_packages()
    runs = reading.find(folders)
    finished = [run for run in runs if run.status == "finished"]
    if not finished:
        states = "".join(f"\n  {run.status + '  ':<12}{plain(str(run.folder))}  {run.error}" for run in runs)
        raise UserError(f"no run is finished, so there is nothing to compare:{states}")

    parts = sections(runs, split)
    check_names(parts, reference, pairs)
    comparisons = [Comparison(part, reference) for part in parts]
    blocks = pages.introduction(runs, [str(folder) for folder in folders])
    for number, comparison in enumerate(comparisons, 1):
        blocks += pages.page(comparison, pairs, number)
    blocks += pages.explanation()

    place = out or folders[0] / "report"
    _write(place, blocks, comparisons, beside_runs=out is None)
    written = f"Written to {place}: report.html, report.md, report.csv"
    console = Screen()
    try:
        terminal.show(console, blocks)
        console.print(f"\n{plain(written)}", soft_wrap=True)
    except OSError as error:
        raise UserError(f"it can't be printed: {error.strerror or error}. {written}") from error


def _write(place: Path, blocks: "Sequence[Block]", comparisons: "Sequence[Comparison]", *, beside_runs: bool) -> None:
    """Writes the report's files.

    Args:
        place: their folder.
        blocks: of the report.
        comparisons: for the table.
        beside_runs: whether the folder is in that of runs, which may be anybody's.

    Raises:
        UserError: where nothing can be written.
    """
    from mtl.files import write_whole
    from mtl.reporting import html, markdown, tidy
    from mtl.reporting.document import Picture
    from mtl.reporting.svg import alone

    try:
        if beside_runs:
            make_folder(place)
        make_folder(place / markdown.FIGURES)
        for block in blocks:
            if isinstance(block, Picture):
                write_whole(place / markdown.FIGURES / f"{block.name}.svg", alone(block.svg))
        write_whole(place / "report.md", markdown.write(blocks))
        write_whole(place / "report.html", html.write(blocks))
        tidy.write(place / "report.csv", comparisons)
    except OSError as error:
        raise UserError(f"{place} can't be written: {error.strerror or error}; --out names another folder") from error
    except UserError as error:
        raise UserError(f"the report isn't written: {error}; --out names another folder") from error


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mtl.report" if sys.argv[0].endswith(".py") else sys.argv[0],
        description="Compares finished runs: means with intervals over seeds, the gain over single-task runs, tests, "
        "time and memory, curves, conflict, fronts. Written as report.html, report.md and report.csv.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="of runs or multiruns; all below is read"
    )
    parser.add_argument("--out", type=Path, help="where the report is written (default: FOLDER/report)")
    parser.add_argument("--split", choices=["test", "val"], help="whose figures are compared (default: test, if any)")
    parser.add_argument("--reference", metavar="METHOD", help="what the others are tested against (default: equal)")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        default=[],
        dest="pairs",
        metavar="TASK",
        help="two tasks to be shown against each other; may be repeated (default: all pairs of up to 5 tasks)",
    )
    given = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal knows ± and Δ
    try:
        report(given.folders, out=given.out, split=given.split, reference=given.reference, pairs=given.pairs)
    except UserError as error:
        try:
            sys.stdout.flush()
        except OSError:  # what couldn't be printed would be tried again at the end
            sys.stdout = io.StringIO()
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell says of a command that Ctrl-C ended


if __name__ == "__main__":
    main()
