"""Compares steps in 1, 2 and 4 processes with DistributedDataParallel by hand, in time and numbers sent.

    python scripts/bench_scale.py [--rounds 5] [--width 512] [--batch-size 256] [--tasks 8]

Each process has one thread, gloo and its share of the batch. In each round, all cases take some steps one after the
other, and the best of all rounds counts. The numbers sent between processes are counted at the calls of
torch.distributed: those that a process sends, for the algorithms that need the fewest (a ring for all_reduce). More
processes than cores share the cores.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mtl

CASES = ("ddp by hand", "equal", "upgrad")
STEPS = 5
sent = 0  # numbers that this process has sent


def counted(function: Callable[..., Any], numbers: Callable[..., float]) -> Callable[..., Any]:
    """Returns the collective function with a count of the numbers that this process sends."""

    def call(*args: Any, **kwargs: Any) -> Any:
        global sent
        sent += round(numbers(*args))
        return function(*args, **kwargs)

    return call


def count_collectives(world: int) -> None:
    """Counts what the functions of torch.distributed send, with the fewest numbers that they need."""
    part = (world - 1) / world
    dist.all_reduce = counted(dist.all_reduce, lambda tensor, *_: 2 * part * tensor.numel())
    dist.all_to_all_single = counted(dist.all_to_all_single, lambda _, tensor, *__: part * tensor.numel())
    dist.all_gather = counted(dist.all_gather, lambda _, tensor, *__: (world - 1) * tensor.numel())


def build(width: int, num_tasks: int) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    """Returns a trunk of three linear layers, and a head and a loss for each task."""
    torch.manual_seed(0)
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(width, 1), loss=nn.MSELoss(), target=f"y{i}") for i in range(num_tasks)]
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())]
    return mtl.MultiTaskModel(nn.Sequential(*layers), tasks, inputs=["x"]), tasks


def step_of(case: str, width: int, num_tasks: int) -> Callable[[dict[str, torch.Tensor]], object]:
    """Returns a function of a batch that takes one step."""
    model, tasks = build(width, num_tasks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if case != "ddp by hand":
        balancer = mtl.balancers.Equal() if case == "equal" else mtl.balancers.UPGrad()
        return mtl.Step(model, tasks, optimizer, balancer=balancer)
    wrapped: Any = DistributedDataParallel(model) if dist.is_initialized() else model

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        predictions = wrapped(batch)
        losses = [task.loss(predictions[task.name], batch[task.target]) for task in tasks]
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def work(rank: int, world: int, arguments: argparse.Namespace, folder: str) -> None:
    """Takes the steps of a process, and writes the seconds, the numbers sent and the memory."""
    torch.set_num_threads(1)
    if world > 1:
        store = Path(folder, f"store{world}").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        count_collectives(world)
    names = ["x", *(f"y{i}" for i in range(arguments.tasks))]
    share = arguments.batch_size // world
    generator = torch.Generator().manual_seed(rank)
    batch = {name: torch.randn(share, arguments.width if name == "x" else 1, generator=generator) for name in names}
    steps = {case: step_of(case, arguments.width, arguments.tasks) for case in CASES}
    best: dict[str, float] = {}
    numbers: dict[str, int] = {}
    global sent
    for _ in range(arguments.rounds):
        for case in CASES:
            if world > 1:
                dist.barrier()
            sent, start = 0, time.perf_counter()
            for _ in range(STEPS):
                steps[case](batch)
            best[case] = min(best.get(case, 1e9), (time.perf_counter() - start) / STEPS)
            numbers[case] = sent // STEPS
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if rank == 0:
        torch.save({"seconds": best, "numbers": numbers, "memory": memory}, Path(folder, f"{world}.pt"))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Runs all numbers of processes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 5), ("width", 512), ("batch-size", 256), ("tasks", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    model, _ = build(arguments.width, arguments.tasks)
    shared = sum(p.numel() for p in model.trunk.parameters())
    everything = sum(p.numel() for p in model.parameters())
    table = Table("processes", "case", "ms a step", "over ddp by hand", "numbers sent", "by formula", "peak MiB")
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2, 4):
            mp.spawn(work, args=(world, arguments, folder), nprocs=world)
            result = torch.load(Path(folder, f"{world}.pt"))
            part = (world - 1) / world
            of_rows = (arguments.tasks + 1) * part * shared + 2 * part * (everything - shared)
            formula = {"ddp by hand": 2 * part * everything, "equal": 2 * part * everything, "upgrad": of_rows}
            for case, seconds in result["seconds"].items():
                table.add_row(
                    str(world),
                    case,
                    f"{1000 * seconds:.2f}",
                    f"{seconds / result['seconds']['ddp by hand']:.2f}",
                    f"{result['numbers'][case]:,}" if case != "ddp by hand" else "–",
                    f"{formula[case]:,.0f}",
                    f"{result['memory']:.0f}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
