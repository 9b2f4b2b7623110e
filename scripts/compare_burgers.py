"""Solves Burgers' equation with some balancers, and with L-BFGS after Adam, for docs/burgers.md and docs/burgers.png.

    pip install matplotlib && python scripts/compare_burgers.py [--seeds 3] [--write docs/burgers.md]

Each run is a command, `python -m mtl.train task=burgers … seed=…`. The commands run one after the other with one thread
each, and take half an hour of processor time together. Runs are saved in the folder of `--runs`; existing runs are not
repeated.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

import mtl
from mtl.cli import CONFIG_DIR
from mtl.config.data import build_loaders, build_splits
from mtl.config.model import build_model
from mtl.config.tasks import build_tasks
from mtl.config.training import build_step
from mtl.problems import burgers
from mtl.process.seeding import seed_all

PICTURE = Path(__file__).parents[1] / "docs" / "burgers.png"
ALL, ADAM, LBFGS, ITERATIONS = 8000, 5000, 500, 5  # numbers of steps, and of iterations in a step of L-BFGS
THEN = f"{{_target_: mtl.optimizers.LBFGS, after: {ADAM}, max_iter: {ITERATIONS}, line_search_fn: strong_wolfe}}"
STEPS = 50  # the number of steps in a round of the timing
LAST = "equal, then L-BFGS"
SHOWN = "equal"  # the way that the picture shows, with seed 0
WAYS = {
    "equal": [],
    "conflict_free": ["balancer=conflict_free"],
    "nash_mtl": ["balancer=nash_mtl"],
    "upgrad": ["balancer=upgrad"],
    LAST: [f"trainer.max_epochs={(ADAM + LBFGS) // 500}", f"optimizer.then={THEN}"],
}


def run(folder: Path, arguments: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the figures of the run in this folder, which is trained if there is none."""
    done = list(folder.glob("*/*/metrics.json"))
    if not done:
        command = [sys.executable, "-m", "mtl.train", *arguments, f"output_root={folder}", "logger=[]"]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        done = list(folder.glob("*/*/metrics.json"))
    (metrics,) = done
    figures: dict[str, dict[str, dict[str, float]]] = json.loads(metrics.read_text())
    return figures


def solution(folder: Path, point: Tensor) -> Tensor:
    """Returns u at the points, by the network at the end of the run in this folder."""
    (checkpoints,) = folder.glob("*/*/checkpoints")
    model = mtl.load(checkpoints.parent, checkpoint="last")
    with torch.no_grad():
        return model.trunk(point)


def step_times(rounds: int = 5) -> dict[str, float]:
    """Returns, for each way, the seconds per step with the last optimizer, the best of some interleaved rounds."""
    steps = {}
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        for name, arguments in WAYS.items():
            config: Any = OmegaConf.to_container(compose("train", ["task=burgers", *arguments]), resolve=True)
            if config["optimizer"]["then"]:
                config["optimizer"]["then"]["after"] = 1
            seed_all(0)
            tasks = build_tasks(config)
            steps[name] = build_step(config, build_model(config, tasks), tasks, total_steps=10_000)
    loader = build_loaders(config, build_splits(config), torch.device("cpu"))["train"]
    first, *batches = islice(loader.batches(1), STEPS + 1)
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            step(first)
            start = time.perf_counter()
            for batch in batches:
                step(batch)
            best[name] = min(best[name], (time.perf_counter() - start) / STEPS)
    return best


def draw(folder: Path) -> None:
    """Draws the exact solution, the network's solution, and their difference."""
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


def report(errors: dict[str, list[float]], times: dict[str, float]) -> str:
    """Returns the page in Markdown."""
    seeds = len(errors["equal"])
    lines = [
        f"| | relative L2 error | {' | '.join(f'seed {seed}' for seed in range(seeds))} | time |",
        "|---" * (seeds + 3) + "|",
    ]
    for name, values in errors.items():
        cells = " | ".join(f"{value:.4f}" for value in values)
        ratio = times[name] / times["equal"]
        if name == LAST:
            ratio = (ADAM + LBFGS * ratio) / ALL
        lines.append(f"| {format_names([name])} | {fmean(values):.4f} ± {stdev(values):.4f} | {cells} | {ratio:.2f} |")
    below = [name for name, values in errors.items() if max(values) < min(errors["equal"])]
    above = [name for name, values in errors.items() if min(values) > max(errors["equal"])]
    among = [name for name in errors if name not in {"equal", *below, *above}]
    one_in = math.comb(2 * seeds, seeds) // 2
    return f"""# Burgers' equation

`python -m mtl.train task=burgers` trains a network u(t, x) to solve u_t + u·u_x = ν u_xx, with ν = 0.01/π,
u(0, x) = −sin πx and u(t, ±1) = 0, for t from 0 to 1. There are no data. The tasks are the mean squares of the
equation's residual at 1,000 points, of u at 100 points of the boundary, and of u + sin πx at 100 points with t = 0; all
points are drawn anew in each step. The table shows the error relative to the exact solution (Cole–Hopf, by quadrature),
‖u − exact‖ / ‖exact‖, on a grid of 100 times and 255 positions.

![The exact solution, a network's, and their difference]({PICTURE.name})

{chr(10).join(lines)}

The table was made by `scripts/compare_burgers.py`: mean ± standard deviation over {seeds} seeds, then each seed. The
error is that of the last parameters, because in practice there is no exact solution by which better ones could be
chosen. All methods use the network, the learning rate and the {ALL:,} steps of the task's config, which were chosen
with `equal` and seed 0. The time is that of all steps, divided by that of `equal`, on one CPU thread; the methods were
timed in turn in one process.

Methods whose errors are smaller than those of `equal` in all seeds: {format_names(below)}.
Larger in all seeds: {format_names(above)}.
Overlapping: {format_names(among)}.
The seeds of two equally good methods, {seeds} each, are separated in this way in 1 of {one_in} comparisons, and this
page has {len(errors) - 1} comparisons. So a separation is no more than a hint, and overlapping methods cannot be
ranked. The results are for one equation and one network.

The last row is Adam for {ADAM:,} steps, then {LBFGS:,} steps of L-BFGS. Each of these has up to {ITERATIONS} iterations
on the loss of its own points, with constant task weights:

```bash
python -m mtl.train task=burgers trainer.max_epochs={(ADAM + LBFGS) // 500} \\
  'optimizer.then={THEN}'
```

`mtl.optimizers.LBFGS` is PyTorch's L-BFGS, except that it takes no curvature from the gradients of two different draws.
Many iterations on one draw of 1,000 points may fit these points instead of the equation: keep `max_iter` small, or the
batches large. Balancers that work on the gradients themselves are refused with L-BFGS. `conflict_free` is not suitable,
because its weights may be negative, and a loss with such weights has no lowest value.
"""


def format_names(names: list[str]) -> str:
    """Returns the names as text; names of balancers are formatted as code."""
    return ", ".join(name if " " in name else f"`{name}`" for name in names) or "none"


def main() -> None:
    """Trains the missing runs, draws the picture, and prints or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("outputs/compare_burgers"))
    parser.add_argument("--write", type=Path, help="a Markdown file for the page")
    options = parser.parse_args()
    test: Any = burgers.interior_points().test
    point, exact = test.fields["point"], test.fields["u"]
    errors: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(options.seeds):
        for name, arguments in WAYS.items():
            folder = options.runs / name.replace(", ", "_").replace(" ", "_") / str(seed)
            run(folder, ["task=burgers", f"seed={seed}", *arguments])
            errors[name].append(float((solution(folder, point) - exact).norm() / exact.norm()))
            print(f"{name}, seed {seed}: {errors[name][-1]:.4f}", flush=True)
    draw(options.runs / SHOWN / "0")
    page = report(errors, step_times())
    print(page)
    if options.write:
        options.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
