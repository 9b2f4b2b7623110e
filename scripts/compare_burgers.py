"""Solves Burgers' equation with some balancers, and with L-BFGS after Adam: docs/burgers.md and docs/burgers.png.

    pip install matplotlib && python scripts/compare_burgers.py [--seeds 3] [--write docs/burgers.md]

Each run is the command line of a user, `python -m mtl.train task=burgers … seed=…`, one after the other, one thread
each: half an hour of processor time. Runs are kept in the folder of `--runs`, and one that is there already is not made
again.
"""

import argparse
import os
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.pyplot as plt
import torch
from compare_balancers import run
from torch import Tensor

import mtl
from mtl.problems import burgers

PICTURE = Path(__file__).parents[1] / "docs" / "burgers.png"
ADAM, ITERATIONS = 5000, 5
THEN = f"{{_target_: torch.optim.LBFGS, after: {ADAM}, max_iter: {ITERATIONS}, line_search_fn: strong_wolfe}}"
SHOWN = "equal"  # in the picture, with seed 0
WAYS = {
    "equal": [],
    "conflict_free": ["balancer=conflict_free"],
    "nash_mtl": ["balancer=nash_mtl"],
    "upgrad": ["balancer=upgrad"],
    "equal, then L-BFGS": ["trainer.max_epochs=11", f"optimizer.then={THEN}"],
}


def solution(folder: Path, point: Tensor) -> Tensor:
    """u at the points by the run's network as it was at the end."""
    (checkpoints,) = folder.glob("*/*/checkpoints")
    model = mtl.load(checkpoints.parent, checkpoint="last")
    with torch.no_grad():
        return model.trunk(point)


def draw(folder: Path) -> None:
    """The exact solution, the network's, and their difference."""
    times, places = torch.linspace(0, 1, 201), torch.linspace(-1, 1, 401)
    point = torch.cartesian_prod(times, places)
    exact, u = burgers.exact(point).float(), solution(folder, point)
    bound = float((u - exact).abs().max())
    panels = (
        ("exact", exact, "RdBu_r", 1.0),
        (f"network, {SHOWN}, seed 0", u, "RdBu_r", 1.0),
        ("network − exact", u - exact, "PuOr_r", bound),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.9), sharey=True)
    for axis, (title, values, colours, limit) in zip(axes, panels, strict=True):
        image = axis.imshow(
            values.view(len(times), len(places)).T,
            origin="lower",
            extent=(0, 1, -1, 1),
            aspect="auto",
            cmap=colours,
            vmin=-limit,
            vmax=limit,
        )
        figure.colorbar(image, ax=axis)
        axis.set(title=title, xlabel="t")
    axes[0].set_ylabel("x")
    figure.tight_layout(pad=0.6)
    figure.savefig(PICTURE, dpi=90)


def apart(errors: dict[str, list[float]]) -> str:
    """Which ways' seeds are all on one side of all of `equal`'s."""
    base = errors["equal"]
    below = [name for name, values in errors.items() if max(values) < min(base)]
    above = [name for name, values in errors.items() if min(values) > max(base)]
    among = [name for name in errors if name not in {"equal", *below, *above}]

    def told(names: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in names) or "none"

    return (
        f"All seeds below all of `equal`'s: {told(below)}. All above: {told(above)}. "
        f"Among them: {told(among)}."
    )


def report(figures: dict[tuple[str, int], Any], errors: dict[str, list[float]]) -> str:
    """The page in Markdown."""
    seeds = len(errors["equal"])
    lines = [
        f"| | relative L2 error | {' | '.join(f'seed {seed}' for seed in range(seeds))} | steps | ms a step |",
        "|---" * (seeds + 4) + "|",
    ]
    for name, values in errors.items():
        own = [figures[name, seed] for seed in range(seeds)]
        time = min(each["seconds_per_step"] for each in own)
        cells = " | ".join(f"{value:.4f}" for value in values)
        lines.append(
            f"| `{name}` | {fmean(values):.4f} ± {stdev(values):.4f} | {cells} | {own[0]['steps']:,} | {1000 * time:.1f} |"
        )
    return "\n".join(
        [
            "# Burgers' equation",
            "",
            "`python -m mtl.train task=burgers` trains a network u(t, x) until it solves u_t + u·u_x = ν u_xx, with",
            "ν = 0.01/π, u(0, x) = −sin πx and u(t, ±1) = 0, for t from 0 to 1. There are no data: the tasks are the mean",
            "square of the equation's residual at 1,000 points, of u at 100 points of the boundary, and of u + sin πx at",
            "100 points with t = 0, all drawn anew in each step. What is measured is the error against the exact solution",
            "(Cole–Hopf, by quadrature), ‖u − exact‖ / ‖exact‖, on a grid of 100 times and 255 places.",
            "",
            f"![The exact solution, a network's, and their difference]({PICTURE.name})",
            "",
            *lines,
            "",
            f"Made by `scripts/compare_burgers.py`: mean ± standard deviation over {seeds} seeds, then each seed. The error is",
            "that of the parameters at the end, since whoever solves an equation has no solution to choose the best ones",
            "by. Network, learning rate and steps are those of the task's config for all; they were chosen with `equal` and",
            "seed 0. Times are the least of the seeds', validation left out, one CPU thread on a machine with other work.",
            "",
            apart(errors),
            f"With {seeds} seeds of each, one of two equal methods is that far apart from the other in 1 of 10 comparisons;"
            if seeds == 3
            else "",
            "so the table shows what each does on this problem, and does not rank those whose seeds lie among each other's.",
            "",
            f"The last row is Adam for {ADAM:,} steps, then L-BFGS, each of whose steps goes up to {ITERATIONS} iterations along the",
            "loss of its own points, the tasks' weights held fixed:",
            "",
            "```bash",
            "python -m mtl.train task=burgers trainer.max_epochs=11 \\",
            f"  'optimizer.then={THEN}'",
            "```",
            "",
            "Many iterations on one draw of 1,000 points fit these alone: `max_iter` is small, or `data.batch_size.interior`",
            "large.",
            "",
        ]
    )


def main() -> None:
    """Trains what is to be trained, draws, and prints or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("outputs/compare_burgers"))
    parser.add_argument("--write", type=Path, help="a Markdown file for the page")
    options = parser.parse_args()
    test: Any = burgers.interior_points().test
    point, exact = test.fields["point"], test.fields["u"]
    figures: dict[tuple[str, int], Any] = {}
    errors: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(options.seeds):
        for name, arguments in WAYS.items():
            folder = options.runs / name.replace(", ", "_").replace(" ", "_") / str(seed)
            figures[name, seed] = run(folder, ["task=burgers", f"seed={seed}", *arguments])
            error = float((solution(folder, point) - exact).norm() / exact.norm())
            errors[name].append(error)
            print(f"{name}, seed {seed}: {error:.4f}, {figures[name, seed]['seconds_per_step'] * 1000:.1f} ms a step", flush=True)
    draw(options.runs / SHOWN / "0")
    page = report(figures, errors)
    print(page)
    if options.write:
        options.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
