"""Trains all architectures with several seeds and two balancers, and writes docs/howto/architectures_measured.md.

    python scripts/study_architectures.py [--seeds 5] [--jobs 2] [--runs FOLDER]

The runs are small: some epochs of Multi-MNIST with a LeNet, and of the simulated click log with embeddings, with the
same settings for all architectures. They show that the architectures learn, and what they cost; they don't rank them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

import mtl

ROOT = Path(__file__).parents[1]
GENERAL = (
    *("hard_sharing", "separate", "cross_stitch", "mtan", "mmoe", "cgc", "ple", "dselect_k", "learned_branching"),
    "adapters",
)
SETTINGS = ["log.every=1000", "log.pictures=null", "logger=[]", "checkpoint.keep=1"]
PROBLEMS: dict[str, tuple[tuple[str, ...], list[str], str]] = {  # architectures, settings, metric
    "multi_mnist": (GENERAL, ["trainer.max_epochs=5"], "accuracy"),
    "made_ctr": (GENERAL, ["trainer.max_epochs=2", "data.num_samples=50000"], "auc"),
    "made_ctr_chain": (
        ("hard_sharing", "esmm", "aitm"),
        ["trainer.max_epochs=2", "data.num_samples=50000"],
        "auc",
    ),
}
BALANCERS = ("equal", "upgrad")
HEAD = """# Architectures, measured

Written by `scripts/study_architectures.py`: {seeds} seeds for each row, one thread, {jobs} trainings side by side on a
CPU. The figures are those of the test split, with 95% confidence intervals for the mean over seeds (Student's t). All
architectures have the same settings, which were not tuned for any of them: the tables show that the architectures
learn, and what they cost, not which one is better.
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
    done = subprocess.run(command, cwd=runs, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{problem} with {balancer}:\n{done.stderr[-3000:]}")


def interval(values: list[float]) -> str:
    """Returns the mean and the half width of its 95% confidence interval as text."""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {half:.3f}"


def rows(runs: Path, problem: str, metric: str) -> list[str]:
    """Returns the rows of the problem's table."""
    found: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for path in sorted(runs.rglob("metrics.json")):
        metrics = json.loads(path.read_text())
        choices = metrics["choices"]
        if choices["task"] == problem and metrics["status"] == "finished":
            found[choices["model"], choices["balancer"]].append((metrics, path.parent))
    tasks = list(next(iter(found.values()))[0][0]["test"])
    lines = [f"| `model=` | `balancer=` | {' | '.join(tasks)} | parameters | ms a step | passes |"]
    lines.append("|---|---|" + "---|" * (len(tasks) + 3))
    for model in PROBLEMS[problem][0]:
        for balancer in BALANCERS:
            each = found.get((model, balancer), [])
            if not each:
                continue
            figures = [interval([metrics["test"][task][metric] for metrics, _ in each]) for task in tasks]
            parameters = sum(parameter.numel() for parameter in mtl.load(each[0][1]).parameters())
            milliseconds = 1000 * mean(metrics["seconds_per_step"] for metrics, _ in each)
            cells = [f"`{model}`", f"`{balancer}`", *figures, f"{parameters:,}", f"{milliseconds:.1f}"]
            lines.append(f"| {' | '.join(cells)} | `{each[0][0]['passes']}` |")
    return lines


def main() -> None:
    """Trains everything that isn't in the folder of runs yet, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    parser.add_argument("--runs", type=Path, help="a folder with the runs of an earlier call, which are not repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = (options.runs or Path(temporary)).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        cases = [(problem, balancer) for problem in PROBLEMS for balancer in BALANCERS]
        if not any(runs.iterdir()):
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(lambda case: train(*case, options.seeds, runs), cases))
        text = HEAD.format(seeds=options.seeds, jobs=options.jobs)
        for problem, (_, settings, metric) in PROBLEMS.items():
            text += f"\n## `task={problem}`\n\nThe {metric} of each task, with `{' '.join(settings)}`.\n\n"
            text += "\n".join(rows(runs, problem, metric)) + "\n"
    page = ROOT / "docs" / "howto" / "architectures_measured.md"
    page.write_text(text, encoding="utf-8")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
