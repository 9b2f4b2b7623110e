"""Measures time and memory of balancing, by source of the Gramian, in comparison with TorchJD and LibMTL's approach.

    python scripts/bench_balancing.py [--rounds 5] [--only linear] [--write docs/balancing_cost.md]

All cases use one CPU thread, MGDA, and T tasks with linear heads. A step consists of forward, backward and all that
computes the balanced gradient in `.grad`, without an optimizer. The columns of a case are timed in turn in one process,
and the best round counts. Memory is the peak minus the peak after the model was built, measured in a process for each
column.

    joint by hand    one forward, the losses summed, one backward: no balancing
    rows             mtl, gradients.source=rows
    auto             mtl, gradients.source=auto, which is layerwise here
    representation   mtl, gradients.source=representation
    every 10         mtl, gradients.source=auto, gradients.every=10: the mean over 10 steps
    TorchJD          torchjd.autojac.mtl_backward, one row at a time, then jac_to_grad
    TorchJD, thrifty the same with optimize_gramian_computation=True
    grad and cat     a torch.autograd.grad for each task, torch.cat into a matrix, weights from its Gramian, a
                     combined gradient copied into .grad, as in LibMTL
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import mtl
from mtl.balancers import MGDA

COLUMNS = ("joint by hand", "rows", "auto", "representation", "every 10", "TorchJD", "TorchJD, thrifty", "grad and cat")


class Transformer(nn.Module):
    """A transformer with four encoder layers of width 512, whose output is the mean over the positions."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, L, 512) to (N, 512)."""
        return self.layers(x).mean(1)


def small_cnn() -> nn.Module:
    """Returns a network of three convolutions and a linear layer, for 28×28 images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4)),
        *(nn.Flatten(), nn.Linear(1024, 128), nn.ReLU()),
    )


def linear() -> nn.Module:
    """Returns a network of eight linear layers of width 2048, with 33 million parameters."""
    return nn.Sequential(*(module for _ in range(8) for module in (nn.Linear(2048, 2048), nn.ReLU())))


def resnet() -> nn.Module:
    """Returns torchvision's ResNet-18 up to the pooled features."""
    net = torchvision.models.resnet18()
    net.fc = nn.Identity()
    return net


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {  # trunk, input, width, T
    "small CNN, 256×1×28×28, T=2": (small_cnn, (256, 1, 28, 28), 128, 2),
    "small CNN, 256×1×28×28, T=8": (small_cnn, (256, 1, 28, 28), 128, 8),
    "8×linear 2048, batch 64, T=3": (linear, (64, 2048), 2048, 3),
    "8×linear 2048, batch 64, T=8": (linear, (64, 2048), 2048, 8),
    "ResNet-18, 16×3×64×64, T=3": (resnet, (16, 3, 64, 64), 512, 3),
    "ResNet-18, 16×3×64×64, T=8": (resnet, (16, 3, 64, 64), 512, 8),
    "transformer 4×512, 8×32 tokens, T=8": (Transformer, (8, 32, 512), 512, 8),
}


class Problem:
    """A trunk with T linear heads, a batch, and the step of each column."""

    def __init__(self, case: str) -> None:
        trunk, shape, width, num_tasks = CASES[case]
        torch.manual_seed(0)
        loss = nn.CrossEntropyLoss()
        self.tasks = [mtl.Task(f"t{i}", head=nn.Linear(width, 10), loss=loss, target=f"y{i}") for i in range(num_tasks)]
        self.model = mtl.MultiTaskModel(trunk(), self.tasks, inputs=["x"])
        self.batch = {"x": torch.randn(shape)} | {f"y{i}": torch.randint(0, 10, shape[:1]) for i in range(num_tasks)}
        self._steps: dict[str, mtl.Step] = {}

    def run(self, column: str) -> None:
        """Runs a step of the column, or ten steps for `every 10`."""
        if column == "joint by hand":
            self._clear()
            torch.stack(self._losses(self.model.trunk(self.batch["x"]))).sum().backward()
        elif column.startswith("TorchJD"):
            self._torchjd(thrifty="thrifty" in column)
        elif column == "grad and cat":
            self._grad_and_cat()
        else:
            if column not in self._steps:
                source, every = ("auto", 10) if column == "every 10" else (column, 1)
                self._steps[column] = mtl.Step(
                    self.model, self.tasks, balancer=MGDA(), gradients=mtl.Gradients(source=source, every=every)
                )
            step = self._steps[column]
            for _ in range(10 if column == "every 10" else 1):
                step.backward(self.batch)
                step.after(self.batch)

    def _clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def _losses(self, features: Tensor) -> list[Tensor]:
        return [task.loss(task.head(features), self.batch[task.target]) for task in self.tasks]

    def _torchjd(self, *, thrifty: bool) -> None:
        from torchjd import aggregation
        from torchjd.autojac import jac_to_grad, mtl_backward

        self._clear()
        features = self.model.trunk(self.batch["x"])
        mtl_backward(self._losses(features), features=features, parallel_chunk_size=1)
        jac_to_grad(self.model.trunk.parameters(), aggregation.MGDA(), optimize_gramian_computation=thrifty)

    def _grad_and_cat(self) -> None:
        self._clear()
        shared = list(self.model.trunk.parameters())
        losses = self._losses(self.model.trunk(self.batch["x"]))
        rows = []
        for task, loss in zip(self.tasks, losses, strict=True):
            own = list(task.head.parameters())
            gradients = torch.autograd.grad(loss, [*shared, *own], retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients[: len(shared)]]))
            for parameter, gradient in zip(own, gradients[len(shared) :], strict=True):
                parameter.grad = gradient
        matrix = torch.stack(rows)
        weights = MGDA().weights(torch.ones(len(rows)), (matrix @ matrix.T).double())
        total = weights.float() @ matrix
        for parameter, piece in zip(shared, total.split([p.numel() for p in shared]), strict=True):
            parameter.grad = piece.view_as(parameter).clone()


def times(case: str, rounds: int) -> dict[str, float]:
    """Returns the milliseconds per step of each column, the best of all rounds."""
    problem = Problem(case)
    best = dict.fromkeys(COLUMNS, float("inf"))
    for column in COLUMNS:
        problem.run(column)
    for _ in range(rounds):
        for column in COLUMNS:
            gc.collect()
            start = time.perf_counter()
            problem.run(column)
            seconds = time.perf_counter() - start
            best[column] = min(best[column], 1e3 * seconds / (10 if column == "every 10" else 1))
    return best


def memory(case: str, column: str) -> float:
    """Returns the peak of a process that runs three steps, minus the peak after the model was built, in MB."""
    command = [sys.executable, __file__, "--memory", case, column]
    # Larger tensors get their own pages, so that the peak doesn't depend on the fragmentation of the heap.
    heap = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | heap)
    return float(done.stdout)


def measure_memory(case: str, column: str) -> None:
    """Prints the memory of a column; runs in the process that `memory` starts."""
    if column.startswith("TorchJD"):
        import torchjd.autojac  # noqa: F401  the memory of the import doesn't count
    problem = Problem(case)
    base = peak()
    for _ in range(3):
        problem.run(column)
    print(peak() - base)


def peak() -> float:
    """Returns the peak memory of this process in MB.

    A process would inherit getrusage's ru_maxrss from the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    return next(float(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def report(figures: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Returns two Markdown tables: milliseconds per step / peak MB by column, and ratios of columns."""
    lines = [f"| trunk, batch, T | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for case, columns in figures.items():
        cells = [f"{ms:.0f} / {mb:.0f}" if ms >= 100 else f"{ms:.1f} / {mb:.0f}" for ms, mb in columns.values()]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    lines += ["", "| trunk, batch, T | what | time | memory |", "|---|---|---|---|"]
    for case, columns in figures.items():
        for mine, other in (
            *(("rows", "TorchJD"), ("rows", "grad and cat"), ("auto", "TorchJD"), ("auto", "joint by hand")),
            *(("auto", "rows"), ("representation", "joint by hand"), ("every 10", "joint by hand")),
        ):
            ratios = [columns[mine][i] / columns[other][i] for i in (0, 1)]
            lines.append(f"| {case} | {mine} over {other} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def arithmetic(rounds: int) -> str:
    """Returns a Markdown table of the milliseconds of each balancer's own arithmetic, as means over random Gramians."""
    lines = ["| balancer | T=2 | T=5 | T=10 |", "|---|---|---|---|"]
    for name in mtl.balancers.__all__:
        kind = getattr(mtl.balancers, name)
        if name == "Balancer" or kind.needs != "gramian":
            continue
        cells = []
        for num_tasks in (2, 5, 10):
            balancer = kind()
            generator = torch.Generator().manual_seed(0)
            problems = []
            for _ in range(40 * rounds):
                rows = torch.randn(num_tasks, 50, generator=generator, dtype=torch.float64)
                problems.append((torch.rand(num_tasks, generator=generator, dtype=torch.float64), rows @ rows.T))
            balancer.weights(*problems[0])
            start = time.perf_counter()
            for losses, gramian in problems:
                balancer.weights(losses, gramian)
            cells.append(f"{1e3 * (time.perf_counter() - start) / len(problems):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures all cases, and prints the tables or writes them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--write", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "COLUMN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        measure_memory(*options.memory)
        return
    figures = {}
    for case in CASES:
        if options.only in case:
            taken = times(case, options.rounds)
            figures[case] = {column: (taken[column], memory(case, column)) for column in COLUMNS}
            print(case, {c: f"{ms:.1f} ms, {mb:.0f} MB" for c, (ms, mb) in figures[case].items()}, flush=True)
    own = "Time of a balancer's own arithmetic in milliseconds, mean over random Gramians:"
    tables = f"{report(figures)}\n\n{own}\n\n{arithmetic(options.rounds)}\n"
    print(tables)
    if options.write:
        head = "# What balancing costs\n\nMade by `scripts/bench_balancing.py`, which describes the measurements. "
        cells = "Cells: milliseconds per step / peak memory in MB, without the model."
        options.write.write_text(f"{head}{cells}\n\n{tables}", "utf-8")


if __name__ == "__main__":
    main()
