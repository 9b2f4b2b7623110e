"""python -m mtl.report outputs/… [more]: compares finished runs on the terminal, in Markdown, CSV and HTML."""

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
    delta: Sequence[str] = (),
) -> None:
    """Reads all runs in the folders and their subfolders, prints the comparison, and writes report.md, .csv and .html.

    Args:
        folders: Folders of runs, of multiruns, or of several runs and multiruns.
        out: The folder to write to. Default: a folder `report` in the first folder.
        split: The figures to compare: `test`, `val`, or `last` for means over the last epochs of the validation, see
            `trainer.last_epochs`. Default: test if a problem has a test split.
        reference: The label of the method that all others are tested against. Default: the method of equal weights.
        pairs: The pairs of tasks to plot against each other. Default: all pairs if there are few tasks.
        delta: The figures of Δm and of the mean rank, `task/figure`, `task/metric` for all figures of a metric, or
            `all`. Default: the main figure of each task.

    Raises:
        UserError: If there is nothing to compare, or if the report can't be written or printed.
    """
    from mtl.process.screen import Screen
    from mtl.reporting import pages, reading, terminal
    from mtl.reporting.comparison import Comparison
    from mtl.reporting.figures import check_names
    from mtl.reporting.grouping import sections
    from mtl.reporting.packages import check_packages

    check_packages()
    runs = reading.find(folders)
    finished = [run for run in runs if run.status == "finished"]
    if not finished:
        states = "".join(f"\n  {run.status + '  ':<12}{plain(str(run.folder))}  {run.error}" for run in runs)
        raise UserError(f"no run is finished, so there is nothing to compare:{states}")

    if split == "last" and not any(run.metrics.get("last") for run in finished):
        raise UserError("--split last: no run has means over its last epochs; train with trainer.last_epochs=10")
    parts = sections(runs, split)
    check_names(parts, reference, pairs, delta)
    comparisons = [Comparison(part, reference, delta) for part in parts]
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
        raise UserError(f"the report can't be printed: {error.strerror or error}. {written}") from error


def _write(place: Path, blocks: "Sequence[Block]", comparisons: "Sequence[Comparison]", *, beside_runs: bool) -> None:
    """Writes the files of the report.

    Args:
        place: The folder to write to.
        blocks: The blocks of the report.
        comparisons: The comparisons for the CSV table.
        beside_runs: Whether the folder is inside a folder of runs, which may contain links of other users.

    Raises:
        UserError: If the files can't be written.
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
        raise UserError(f"{place} can't be written: {error.strerror or error}; choose a folder with --out") from error
    except UserError as error:
        raise UserError(f"the report isn't written: {error}; choose a folder with --out") from error


def main() -> None:
    """Parses the command line and writes the report."""
    parser = argparse.ArgumentParser(
        prog="python -m mtl.report" if sys.argv[0].endswith(".py") else sys.argv[0],
        description="Compares finished runs: means with intervals over seeds, the gain over single-task runs, tests, "
        "time and memory, curves, conflict, fronts. Written as report.html, report.md and report.csv.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="folder of runs or multiruns, read with all subfolders"
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: FOLDER/report)")
    parser.add_argument(
        "--split",
        choices=["test", "val", "last"],
        help="split of the figures; last: means over the last epochs of validation (default: test, if any)",
    )
    parser.add_argument("--reference", metavar="METHOD", help="method to test others against (default: equal)")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        default=[],
        dest="pairs",
        metavar="TASK",
        help="two tasks to plot against each other; may be repeated (default: all pairs of up to 5 tasks)",
    )
    parser.add_argument(
        "--delta",
        nargs="+",
        default=[],
        metavar="FIGURE",
        help="figures of Δm and the mean rank: TASK/FIGURE, TASK/METRIC for all figures of a metric, or all "
        "(default: the main figure of each task)",
    )
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some terminals can't display ± and Δ
    try:
        report(**vars(options))
    except UserError as error:
        try:
            sys.stdout.flush()
        except OSError:  # or Python would try to print the rest at exit
            sys.stdout = io.StringIO()
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # a shell's exit code for a command that Ctrl-C ended


if __name__ == "__main__":
    main()
