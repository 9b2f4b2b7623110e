"""Compares the time of mtl's training loop with that of the same loop written by hand, in interleaved rounds.

    python scripts/bench_loop.py [--rounds 7] [--batch-size 64]

All cases use one thread, the default network, the bundled images and AdamW. The loop of mtl is `Trainer.fit` with
TensorBoard and CSV logs and with gradients measured every 100 steps, over 500 steps without the first. The loop by hand
is the shortest one that does the same training. Neither includes validation and saving, and both index batches from the
same tensors. The best of all rounds counts.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import mtl
from mtl.data import Fields, Loader
from mtl.loggers import CsvLogger, Loggers, TensorBoardLogger
from mtl.training.options import Checkpoints, Logs
from mtl.training.trainer import Trainer


def problem(num_tasks: int) -> tuple[mtl.MultiTaskModel, list[mtl.Task], torch.optim.Optimizer]:
    """Returns the default network with `num_tasks` heads, the tasks and the optimizer."""
    torch.manual_seed(0)
    tasks = [
        mtl.Task(
            f"t{i}", head=nn.Linear(20, 10 - 8 * (i % 2)), loss=nn.CrossEntropyLoss(), target=("digit", "parity")[i % 2]
        )
        for i in range(num_tasks)
    ]
    model = mtl.MultiTaskModel(mtl.trunks.LeNet(), tasks, inputs=["image"])
    return model, tasks, torch.optim.AdamW(model.parameters(), lr=1e-3)


def ours(passes: str, num_tasks: int, data: Fields, batch_size: int) -> float:
    """Returns the seconds per step of the trainer."""
    model, tasks, optimizer = problem(num_tasks)
    names = [task.name for task in tasks]
    with tempfile.TemporaryDirectory() as folder:
        loggers = Loggers([CsvLogger(Path(folder), names), TensorBoardLogger(Path(folder), names)])
        trainer = Trainer(
            mtl.Step(model, tasks, optimizer, passes=passes),
            Loader(data, batch_size=batch_size, shuffle=True),
            max_epochs=1,
            checkpoints=Checkpoints(Path(folder)),
            logs=Logs(loggers),
        )
        trainer.fit()
        loggers.close()
    return trainer.seconds_per_step


def sequential_by_hand(num_tasks: int, data: Fields, batch_size: int) -> float:
    """Returns the seconds per step of the six-line loop."""
    model, tasks, optimizer = problem(num_tasks)
    trunk, image = model.trunk, data.fields["image"]
    parts = [(task.head, task.loss, data.fields[task.target]) for task in tasks]
    order = torch.randperm(len(data)).split(batch_size)
    start = time.perf_counter()
    for indices in order:
        optimizer.zero_grad()
        x = image[indices]
        for head, loss, target in parts:
            loss(head(trunk(x)), target[indices]).backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(order)


def joint_by_hand(num_tasks: int, data: Fields, batch_size: int) -> float:
    """Returns the seconds per step with one forward pass of the trunk and one backward pass of the summed loss."""
    model, tasks, optimizer = problem(num_tasks)
    trunk, image = model.trunk, data.fields["image"]
    parts = [(task.head, task.loss, data.fields[task.target]) for task in tasks]
    order = torch.randperm(len(data)).split(batch_size)
    start = time.perf_counter()
    for indices in order:
        optimizer.zero_grad()
        features = trunk(image[indices])
        sum(loss(head(features), target[indices]) for head, loss, target in parts).backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(order)


def start_up(command: list[str]) -> float:
    """Returns the seconds that a process takes from start to end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=tempfile.gettempdir())
    return time.perf_counter() - start


BARE = "import torch; torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])"
FIRST_STEP = "class Leave:\n    def __call__(self, trainer, result):\n        import os\n        os._exit(0)\n"


def start_up_ratio(rounds: int) -> tuple[float, float]:
    """Returns the seconds of a training up to its first step, and of a script that imports torch and builds AdamW."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "leave_at_once.py").write_text(FIRST_STEP)
        Path(folder, "task").mkdir()
        to_first_step = [
            *(sys.executable, "-m", "mtl.train", "--config-dir", folder, "task=mnist_two_head"),
            *("+callbacks.leave._target_=leave_at_once.Leave", f"output_root={folder}"),
        ]
        pairs = [(start_up(to_first_step), start_up([sys.executable, "-c", BARE])) for _ in range(rounds)]
    return min(p[0] for p in pairs), min(p[1] for p in pairs)


def main() -> None:
    """Runs all cases in turn for some rounds, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train = mtl.data.mnist().train
    data = Fields({name: tensor.repeat(8, *[1] * (tensor.ndim - 1)) for name, tensor in train.fields.items()})

    cases: dict[tuple[str, int], Callable[[], float]] = {}
    for num_tasks in (2, 8):
        arguments = (num_tasks, data, options.batch_size)
        cases["sequential by hand", num_tasks] = lambda a=arguments: sequential_by_hand(*a)
        cases["joint by hand", num_tasks] = lambda a=arguments: joint_by_hand(*a)
        for passes in ("sequential", "joint", "shared"):
            cases[f"mtl {passes}", num_tasks] = lambda p=passes, a=arguments: ours(p, *a)
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(options.rounds):
        for case, run in cases.items():
            best[case] = min(best[case], run())

    table = Table(
        "T", "loop", "ms a step", "over sequential by hand", "over joint by hand", title=f"batch {options.batch_size}"
    )
    for (name, num_tasks), seconds in best.items():
        over = [f"{seconds / best[f'{kind} by hand', num_tasks]:.3f}" for kind in ("sequential", "joint")]
        table.add_row(str(num_tasks), name, f"{1e3 * seconds:.3f}", *over)
    console = Console()
    console.print(table)
    for num_tasks in (2, 8):
        gain = best["mtl sequential", num_tasks] / best["mtl shared", num_tasks]
        console.print(f"T={num_tasks}: shared is {gain:.2f} times faster than sequential", highlight=False)
    first, bare = start_up_ratio(min(options.rounds, 5))
    console.print(
        f"shell to first step {first:.2f} s, bare torch and AdamW {bare:.2f} s: {first / bare:.2f} times",
        highlight=False,
    )


if __name__ == "__main__":
    main()
