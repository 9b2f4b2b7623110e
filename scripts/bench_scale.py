"""Compares steps in 1, 2 and 4 processes with DistributedDataParallel by hand, in time, bytes sent and memory.

    python scripts/bench_scale.py [--rounds 5] [--width 512] [--batch-size 256] [--tasks 8]

Each process has one thread, gloo and its share of the batch. In each round, all cases take some steps one after the
other, and the best of all rounds counts. "joint" has one backward pass for all tasks, as by hand. "alone" is the step
of a process with its share and without the others, while these do the same. The bytes sent are counted at the calls of
torch.distributed: those that a process sends, for the algorithms that need the fewest (a ring for all_reduce). The
memory is the largest that a step needs in a process, in addition to what the process has before it. More processes than
cores share the cores.
"""

import argparse
import ctypes
import os
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

CASES = ("ddp by hand", "equal", "equal joint", "equal alone", "upgrad", "upgrad alone")
STEPS = 5
sent = 0  # bytes that this process has sent


def counted(function: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
    """Returns the collective function with a count of the bytes that this process sends."""

    def call(*args: Any, **kwargs: Any) -> Any:
        global sent
        sent += round(size(*args, **kwargs))
        return function(*args, **kwargs)

    return call


def count_collectives(world: int) -> None:
    """Counts what the functions of torch.distributed send, with the fewest bytes that they need."""
    part, functions = (world - 1) / world, vars(dist)
    sizes: dict[str, Callable[..., float]] = {
        "all_reduce": lambda tensor, *_, **__: 2 * part * tensor.nbytes,
        "all_to_all_single": lambda _, tensor, *__, **___: part * tensor.nbytes,
        "all_gather": lambda _, tensor, *__, **___: (world - 1) * tensor.nbytes,
        "all_gather_single": lambda output, *_, **__: part * output.nbytes,
        "reduce_scatter_single": lambda *_, input, **__: 2 * part * input.nbytes,  # gloo sums whole tensors
    }
    for name, size in sizes.items():
        functions[name] = counted(functions[name], size)


def memory(name: str) -> float:
    """Returns the memory of this process in MiB: `VmRSS` is the current one, `VmHWM` the largest one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def peak(step: Callable[[], object]) -> float:
    """Returns the memory in MiB that a step needs at most, in addition to what the process has before it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # from now on, VmHWM is the largest memory
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def build(width: int, num_tasks: int) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    """Returns a trunk of three linear layers, and a head and a loss for each task."""
    torch.manual_seed(0)
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(width, 1), loss=nn.MSELoss(), target=f"y{i}") for i in range(num_tasks)]
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())]
    return mtl.MultiTaskModel(nn.Sequential(*layers), tasks, inputs=["x"]), tasks


def step_of(case: str, width: int, num_tasks: int) -> tuple[Callable[[Any], object], Callable[[], None]]:
    """Returns a function of a batch that takes one step, and a function that frees the gradients."""
    model, tasks = build(width, num_tasks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if case != "ddp by hand":
        balancer = mtl.balancers.Equal() if case.startswith("equal") else mtl.balancers.UPGrad()
        own = mtl.Step(model, tasks, optimizer, balancer=balancer, passes="joint" if case.endswith("joint") else "auto")
        return (alone(own) if case.endswith("alone") else own), optimizer.zero_grad
    wrapped: Any = DistributedDataParallel(model) if dist.is_initialized() else model

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        predictions = wrapped(batch)
        losses = [task.loss(predictions[task.name], batch[task.target]) for task in tasks]
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step, optimizer.zero_grad


def alone(step: Callable[[Any], object]) -> Callable[[Any], object]:
    """Returns a step that doesn't see the process group."""

    def call(batch: Any) -> object:
        before = dist.is_initialized
        dist.is_initialized = lambda: False
        try:
            return step(batch)
        finally:
            dist.is_initialized = before

    return call


def work(rank: int, world: int, arguments: argparse.Namespace, folder: str) -> None:
    """Takes the steps of a process, and writes the seconds, the bytes sent and the memory."""
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
    result: dict[str, dict[str, float]] = {case: {"seconds": 1e9} for case in CASES}
    global sent
    for _ in range(arguments.rounds):
        for case, (step, _) in steps.items():
            if world > 1:
                dist.barrier()
            sent, start = 0, time.perf_counter()
            for _ in range(STEPS):
                step(batch)
            seconds = (time.perf_counter() - start) / STEPS
            result[case] = {"seconds": min(result[case]["seconds"], seconds), "bytes": sent / STEPS}
    for case, (step, free) in steps.items():
        free()
        result[case]["memory"] = peak(lambda step=step: step(batch))  # type: ignore[misc]
        free()
    if rank == 0:
        torch.save(result, Path(folder, f"{world}.pt"))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def formula(case: str, arguments: argparse.Namespace, world: int) -> float:
    """Returns the bytes that a process has to send in a step, without counts, losses and flags."""
    if "alone" in case:
        return 0.0
    width, num_tasks, part = arguments.width, arguments.tasks, (world - 1) / world
    layer, heads = width * width + width, num_tasks * (width + 1)
    if case != "upgrad":
        return 4 * 2 * part * (3 * layer + heads)
    rows = (num_tasks + 1) * part * layer
    gathered = part * arguments.batch_size * (width + num_tasks * width)
    return 4 * (3 * min(rows, gathered) + 2 * part * heads)


def main() -> None:
    """Runs all numbers of processes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 5), ("width", 512), ("batch-size", 256), ("tasks", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    table = Table(
        "processes", "case", "ms a step", "over ddp by hand", "over alone", "kB sent", "by formula", "peak MiB"
    )
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2, 4):
            mp.spawn(work, args=(world, arguments, folder), nprocs=world)
            result = torch.load(Path(folder, f"{world}.pt"))
            for case, of_case in result.items():
                seconds, own = of_case["seconds"], result.get(f"{case} alone")
                table.add_row(
                    str(world),
                    case,
                    f"{1000 * seconds:.2f}",
                    f"{seconds / result['ddp by hand']['seconds']:.2f}",
                    f"{seconds / own['seconds']:.2f}" if own else "",
                    f"{of_case['bytes'] / 1000:,.1f}" if case != "ddp by hand" else "–",
                    f"{formula(case, arguments, world) / 1000:,.1f}",
                    f"{of_case['memory']:.1f}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
