"""Trains all architectures with several seeds and two balancers, and writes docs/howto/architectures_measured.md.

    python scripts/study_architectures.py [--seeds 5] [--jobs 2] [--rounds 7] [--runs FOLDER]

The runs are small: some epochs of Multi-MNIST with a LeNet, and of the simulated click log with embeddings, with the
same settings for all architectures. They show that the architectures learn, and what they cost; they don't rank them.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from omegaconf import OmegaConf
from scipy.stats import t

from mtl.build import build
from mtl.config.training import build_step

ROOT = Path(__file__).parents[1]
GENERAL = (
    *("hard_sharing", "separate", "cross_stitch", "mtan", "mmoe", "cgc", "ple", "dselect_k", "learned_branching"),
    "adapters",
)
SETTINGS = ["log.every=1000", "log.pictures=null", "logger=[]", "checkpoint.keep=1"]
PROBLEMS: dict[str, tuple[tuple[str, ...], list[str], str]] = {  # architectures, settings, metric
    "multi_mnist": (GENERAL, ["trainer.max_epochs=3"], "accuracy"),
    "made_ctr": (GENERAL, ["trainer.max_epochs=1", "data.num_samples=50000"], "auc"),
    "made_ctr_chain": (
        ("hard_sharing", "esmm", "aitm"),
        ["trainer.max_epochs=1", "data.num_samples=50000"],
        "auc",
    ),
}
BALANCERS = ("equal", "upgrad")
TITLES = {"accuracy": "accuracy", "auc": "AUC"}
HEAD = """# Architectures, measured

Written by `scripts/study_architectures.py`. The figures are those of the test split: the mean over {seeds} seeds,
with its 95% confidence interval (Student's t). All architectures have the same settings, which were not tuned for any
of them: the tables show that the architectures learn, and what they cost, not which one is better. Learned branching
begins with a mixture of all branches, and has learned less than the others after so few epochs. The time is that of a
step on one thread of a CPU, the best of several rounds in which all rows took turns, and beside it the time divided
by that of hard sharing with equal weights.
"""


def train(problem: str, balancer: str, seeds: int, runs: Path) -> None:
    """Trains the architectures of a problem with a balancer, one after the other."""
    models, settings, _ = PROBLEMS[problem]
    # Separate models share no parameter, so that there is nothing to balance.
    models = tuple(model for model in models if model != "separate" or balancer == "equal")
    arguments = [f"task={problem}", f"balancer={balancer}", f"model={','.join(models)}"]
    arguments += [f"seed={','.join(map(str, range(seeds)))}", f"output_root={runs}", *settings, *SETTINGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mtl.train", "-m", *arguments]
    if len(finished(runs)) == seeds * len(models):
        return
    runs.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=runs, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{problem} with {balancer}:\n{done.stderr[-3000:]}")


def finished(runs: Path) -> list[tuple[dict[str, Any], Path]]:
    """Returns the figures and the folders of all finished runs below a folder, in the order of their names."""
    found = [(json.loads(path.read_text()), path.parent) for path in sorted(runs.rglob("metrics.json"))]
    return [(metrics, folder) for metrics, folder in found if metrics["status"] == "finished"]


def interval(values: list[float]) -> str:
    """Returns the mean and the half width of its 95% confidence interval as text."""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {half:.3f}"


def measure(folders: list[Path], rounds: int, steps: int = 10) -> list[tuple[float, int]]:
    """Returns the milliseconds per step, and the number of parameters, of the models of runs, in interleaved rounds.

    The best of all rounds counts. Each model takes its steps on batches of its own data, which are in memory.
    """
    torch.set_num_threads(1)
    cases = []
    for folder in folders:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
        built = build(config, code_folders=[])
        step = build_step(built.config, built.model, built.tasks, built.total_steps)
        cases.append((step, list(itertools.islice(built.loaders["train"].batches(), steps)), built.model))
    best = [float("inf")] * len(cases)
    for _ in range(rounds):
        for case, (step, batches, _) in enumerate(cases):
            start = time.perf_counter()
            for batch in batches:
                step(batch)
            best[case] = min(best[case], 1000 * (time.perf_counter() - start) / len(batches))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for _, _, model in cases]
    return list(zip(best, sizes, strict=True))


def rows(runs: Path, problem: str, metric: str, rounds: int) -> list[str]:
    """Returns the rows of the problem's table."""
    found: dict[tuple[str, str], list[tuple[dict[str, Any], Path]]] = defaultdict(list)
    for metrics, folder in finished(runs):
        found[metrics["choices"]["model"], metrics["choices"]["balancer"]].append((metrics, folder))
    order = [case for case in itertools.product(PROBLEMS[problem][0], BALANCERS) if case in found]
    costs = measure([found[case][0][1] for case in order], rounds)
    plain = costs[order.index(("hard_sharing", "equal"))][0]
    tasks = list(found[order[0]][0][0]["test"])
    lines = [f"| `model=` | `balancer=` | {' | '.join(tasks)} | parameters | ms a step | of hard sharing's | passes |"]
    lines.append("|---|---|" + "---|" * (len(tasks) + 4))
    for (model, balancer), (milliseconds, parameters) in zip(order, costs, strict=True):
        each = found[model, balancer]
        figures = [interval([metrics["test"][task][metric] for metrics, _ in each]) for task in tasks]
        cells = [f"`{model}`", f"`{balancer}`", *figures, f"{parameters:,}", f"{milliseconds:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {milliseconds / plain:.1f} | `{each[0][0]['passes']}` |")
    return lines


def main() -> None:
    """Trains everything that isn't in the folder of runs yet, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of ten steps of each case whose time is measured")
    parser.add_argument("--runs", type=Path, help="a folder with the runs of an earlier call, which are not repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = (options.runs or Path(temporary)).resolve()
        cases = [(problem, balancer) for problem in PROBLEMS for balancer in BALANCERS]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda case: train(*case, options.seeds, runs / case[0] / case[1]), cases))
        text = HEAD.format(seeds=options.seeds)
        for problem, (_, settings, metric) in PROBLEMS.items():
            text += f"\n## `task={problem}`\n\nThe {TITLES[metric]} of each task, with `{' '.join(settings)}`.\n\n"
            text += "\n".join(rows(runs / problem, problem, metric, options.rounds)) + "\n"
    page = ROOT / "docs" / "howto" / "architectures_measured.md"
    page.write_text(text, encoding="utf-8")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
