"""Measures a step with an embedding of 10,000 or of 1,000,000 rows, of which the same rows are used.

    python scripts/bench_sparse.py [--rounds 20]

All cases use one CPU thread, an embedding of 16 dimensions, a layer, four tasks with linear heads, and Adagrad. Batches
have 512 samples, all of whose rows are among the first 10,000. Times are taken in turn in one process, and the median
of all rounds counts. Memory is the peak minus that after the first step, measured in a process for each case.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

import mtl

SIZES = (10_000, 1_000_000)
BALANCERS = ("Equal", "UPGrad")


class Case:
    """A step with an embedding of `size` rows, with sparse or dense gradients."""

    def __init__(self, size: int, balancer: str, *, sparse: bool, source: str = "auto") -> None:
        torch.manual_seed(0)
        columns = {"id": {"kind": "category", "size": size - 1}}
        trunk = mtl.trunks.Table(columns, ["id"], num_features=32, hidden=[], dimensions=16, sparse=sparse)
        loss = nn.BCEWithLogitsLoss()
        tasks = [mtl.Task(f"t{i}", head=mtl.heads.Linear(32, 1), loss=loss, target=f"y{i}") for i in range(4)]
        self.model = mtl.MultiTaskModel(trunk, tasks, inputs=["id"])
        optimizer = torch.optim.Adagrad(self.model.parameters(), lr=0.01)
        kind = getattr(mtl.balancers, balancer)()
        self.step = mtl.Step(self.model, tasks, optimizer, balancer=kind, gradients=mtl.Gradients(source=source))
        draws = torch.Generator().manual_seed(1)
        self.batches = [
            {"id": torch.randint(0, min(SIZES), (512,), generator=draws)}
            | {f"y{i}": torch.randint(0, 2, (512,), generator=draws).float() for i in range(4)}
            for _ in range(10)
        ]

    def run(self) -> float:
        """Returns the milliseconds per step, as a mean over ten steps."""
        start = time.perf_counter()
        for batch in self.batches:
            self.step(batch)
        return 1e3 * (time.perf_counter() - start) / len(self.batches)


def cases() -> list[tuple[str, str, str]]:
    """Returns the cases: balancer, kind of gradients, and source of the Gramian."""
    kinds = [("sparse", "auto"), ("dense", "auto"), ("dense", "rows")]
    return [(b, *kind) for b, kind in itertools.product(BALANCERS, kinds) if b != "Equal" or kind[1] == "auto"]


def memory(size: int, balancer: str, gradients: str, source: str) -> float:
    """Returns the peak of a process that runs several steps, minus that after the first step, in MB."""
    command = [sys.executable, __file__, "--memory", str(size), balancer, gradients, source]
    heap = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | heap).stdout)


def measure_memory(size: str, balancer: str, gradients: str, source: str) -> None:
    """Prints the memory of a case; runs in the process that `memory` starts."""
    case = Case(int(size), balancer, sparse=gradients == "sparse", source=source)
    case.step(case.batches[0])
    for parameter in case.model.parameters():
        parameter.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    base = peak()
    case.run()
    print(peak() - base)


def peak() -> float:
    """Returns the peak memory of this process since the peak was reset, in MB."""
    status = Path("/proc/self/status").read_text()
    return next(float(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    """Measures all cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        measure_memory(*options.memory)
        return
    print("| balancer | gradients | Gramian from | ms, 10k rows | ms, 1M rows | ratio | MB, 10k rows | MB, 1M rows |")
    print("|---|---|---|---|---|---|---|---|")
    for balancer, gradients, source in cases():
        pair = [Case(size, balancer, sparse=gradients == "sparse", source=source) for size in SIZES]
        rounds = [[case.run() for case in pair] for _ in range(options.rounds + 1)][1:]
        small, large = (median(column) for column in zip(*rounds, strict=True))
        held = [memory(size, balancer, gradients, source) for size in SIZES]
        figures = f"{small:.2f} | {large:.2f} | {large / small:.2f} | {held[0]:.1f} | {held[1]:.1f}"
        print(f"| {balancer} | {gradients} | {source if balancer != 'Equal' else ''} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
