"""Runs every balancer on the toy problem, draws docs/toy.png, and prints a table of the last point of each run.

    pip install matplotlib && python scripts/plot_toy.py [--only mgda,cagrad] [--write docs/toy.md]

Each run takes 50,000 steps of Adam with learning rate 1e-3, from each of five starts. Runs are distributed over
processes, one per core; together they take fourteen minutes of processor time.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.pyplot as plt
import numpy as np
import torch
import toy
from matplotlib.axes import Axes
from numpy.typing import NDArray

PICTURE = Path(__file__).parents[1] / "docs" / "toy.png"
COLUMNS = 5
EVERY = 100  # steps from one point of a path to the next
INTRODUCTION = f"""# The two-task toy problem

This page shows where every balancer ends on the toy problem (`scripts/toy.py`) of CAGrad, Nash-MTL and FAMO: two losses
of x ∈ R², one ten times as steep as the other, from five starting points, with Adam at a learning rate of 1e-3 and
{toy.STEPS:,} steps. The Pareto front extends from (−7, −8.43) to (7, −8.43). ✓ marks end points within 0.05 of the
front; the number after it is the number of steps, in thousands, after which the run stayed on the front. The page was
made by `python scripts/plot_toy.py --write docs/toy.md`.

The balancers have the arguments of their configs, with one exception: FAMO has no weight decay, as in its authors' code
for this problem. The balancers get the losses minus a lower bound, which matters to methods that use the losses. An
epoch is {toy.EPOCH:,} steps.

A run that is not on the front at the end may reach it later. From (9, 9) ConFIG, UPGrad, PCGrad, DualProj, CAGrad and
GradVac reach the front after 53,000 to 101,000 steps; the plain sum has not left its valley after 130,000 steps.

![The runs](toy.png)

"""

Runs = dict[str, list[NDArray[np.float64]]]


def run(method: str, start: toy.Pair) -> NDArray[np.float64]:
    """Returns the path of a method from a start, (N, 2)."""
    torch.set_num_threads(1)
    return toy.run(toy.methods()[method](), start, every=EVERY)


def end(path: NDArray[np.float64]) -> str:
    """Describes the last point and, if it is on the front, after how many steps the path stays on the front."""
    on = [toy.reached(*point) for point in path]
    since = len(on) - on[::-1].index(False) if False in on else 0
    return f"({path[-1, 0]:.2f}, {path[-1, 1]:.2f})" + (f" ✓ {since * EVERY / 1000:.0f}k" if on[-1] else "")


def table(runs: Runs) -> str:
    """Returns a Markdown table: a row per method, a column per start, and the number of runs that reached the front."""
    starts = [f"({x1:g}, {x2:g})" for x1, x2 in toy.STARTS]
    lines = [f"| method | {' | '.join(starts)} | on the front |", "|---|" + "---|" * (len(starts) + 1)]
    for name, paths in runs.items():
        arrived = sum(toy.reached(*path[-1]) for path in paths)
        lines.append(f"| `{name}` | {' | '.join(map(end, paths))} | {arrived} of {len(paths)} |")
    return "\n".join(lines) + "\n"


def draw(runs: Runs) -> None:
    """Draws a panel per method: contours of the mean loss, the front, the starts, and the runs from dark to light."""
    grid = np.linspace(-10.5, 10.5, 160)
    mean = np.array([[sum(toy.losses(x1, x2)) / 2 for x1 in grid] for x2 in grid])
    along = np.linspace(-7, 7, 50)
    front = [toy.front(x1) for x1 in along]
    rows = -(-len(runs) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(2.2 * COLUMNS, 2.3 * rows), sharex=True, sharey=True)
    panels: list[Axes] = list(np.atleast_1d(axes).flat)
    for panel in panels[len(runs) :]:
        panel.axis("off")
    for panel, (name, paths) in zip(panels, runs.items(), strict=False):
        panel.contour(grid, grid, mean, levels=14, colors="0.8", linewidths=0.5)
        panel.plot(along, front, color="0.45", linewidth=3, solid_capstyle="round")
        for path in paths:
            colours = np.linspace(0, 0.85, len(path))
            panel.scatter(path[:, 0], path[:, 1], c=colours, cmap="plasma", vmin=0, vmax=1, s=2, zorder=3)
            panel.plot(*path[0], "o", color="black", markersize=3.5, zorder=4)
            colour = "tab:green" if toy.reached(*path[-1]) else "tab:red"
            panel.plot(*path[-1], "*", color=colour, markersize=7, zorder=5)
        panel.set_title(name, fontsize=9, pad=3)
        panel.set(xlim=(-10.5, 10.5), ylim=(-10.5, 10.5), xticks=[-7, 0, 7], yticks=[-7, 0, 7])
        panel.tick_params(labelsize=7)
    figure.tight_layout(pad=0.6)
    figure.savefig(PICTURE, dpi=90)


def main() -> None:
    """Runs the methods, draws the paths and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some of the methods, separated by commas")
    parser.add_argument("--write", type=Path, help="file for the table")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(toy.methods())
    with ProcessPoolExecutor() as pool:
        paths = list(pool.map(run, *zip(*product(names, toy.STARTS), strict=True)))
    each = len(toy.STARTS)
    runs = {name: paths[each * i : each * (i + 1)] for i, name in enumerate(names)}
    draw(runs)
    print(table(runs))
    if arguments.write:
        arguments.write.write_text(INTRODUCTION + table(runs))


if __name__ == "__main__":
    main()
