"""Fits a model of time and memory a step to measurements in 1 to 4 processes, and writes docs/scale.md.

    python scripts/model_scale.py [--rounds 2] [--page docs/scale.md]

Each process has one thread and gloo. The formulas are in model_formulas.py. The seconds of a step are a sum of counts,
each times a constant, less the part of the communication that is hidden behind the backward pass. The constants are
fitted by least squares of the relative errors. The formulas of the memory have no fitted constants. Measurements in 3
processes, and those of two more sizes, are held out. The memory is counted by memory_counter.c, which needs a C
compiler. For GPUs, the constants come from data sheets.
"""

import argparse
import ctypes
import gc
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import bench_scale
import numpy
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model_formulas import CASES, SHARDED, Counts, Shape, counts
from scipy.optimize import nnls
from torch import nn

import mtl

# width, layers, tasks, samples in the batch
SIZES = [
    (256, 3, 2, 48),
    (256, 3, 8, 1536),
    (256, 6, 4, 192),
    (512, 3, 8, 48),
    (512, 6, 2, 768),
    (1024, 3, 2, 192),
    (1024, 3, 8, 96),
]
HELD_OUT = [(768, 3, 4, 96), (384, 5, 3, 768)]
PROCESSES = (1, 2, 3, 4)
NOT_FITTED = 3  # processes, in which only every other size is measured
CORES = len(os.sched_getaffinity(0))
NAMES = Counts._fields[:-1]  # of the counts that take time
UNITS = (
    "s / flop",
    "s / parameter",
    "s / number of a row",
    "s / call",
    "s / module",
    "s / number sent",
    "s / message",
)
NUM_COMPUTING = 5  # counts that are no communication
SHARES = numpy.linspace(0, 1, 6)  # of the communication that may be hidden, between which the fit chooses

Key = tuple[int, str, int, int, int, int]  # processes, case, and one of SIZES


@dataclass
class Measured:
    """What was measured: seconds, numbers sent and bytes of memory of a step.

    Args:
        seconds: The shortest of all rounds.
        sent: The bytes sent, counted at the calls of torch.distributed.
        memory: The largest memory during a step in addition to that before it; the median of all rounds.
    """

    seconds: dict[Key, float]
    sent: dict[Key, int]
    memory: dict[Key, float]


def is_held_out(key: Key) -> bool:
    """Returns whether a measurement is used to test the model only."""
    return key[0] == NOT_FITTED or key[2:] in HELD_OUT


def shape_of(key: Key) -> Shape:
    """Returns what was trained in one process."""
    world, _, width, layers, tasks, batch = key
    return Shape(width, layers, tasks, batch / world)


def step_of(case: str, width: int, layers: int, num_tasks: int) -> mtl.Step:
    """Returns a step of one case."""
    torch.manual_seed(0)
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(width, 1), loss=nn.MSELoss(), target=f"y{i}") for i in range(num_tasks)]
    trunk = nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())])
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    source, _, way = case.partition(" ")
    if way:
        mtl.distributed.prepare(model, way)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if source in ("joint", "shared"):
        return mtl.Step(model, tasks, optimizer, passes=source)
    gradients = mtl.Gradients(source=source)
    return mtl.Step(model, tasks, optimizer, balancer=mtl.balancers.UPGrad(), gradients=gradients)


def work(rank: int, world: int, rounds: int, folder: str) -> None:
    """Takes the steps of a process, and writes what was measured."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported isn't searched for garbage again
    if world > 1:
        store = Path(folder, f"store{world}").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        bench_scale.count_collectives(world)
    measured = Measured({}, {}, {})
    for size in [*SIZES, *HELD_OUT][:: 2 if world == NOT_FITTED else 1]:
        width, layers, tasks, batch = size
        generator = torch.Generator().manual_seed(rank)
        shapes = {"x": (batch // world, width)} | {f"y{i}": (batch // world, 1) for i in range(tasks)}
        data = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for case in (*CASES, *(SHARDED if world > 1 else ())):
            step, key = step_of(case, width, layers, tasks), (world, case, *size)
            step(data)  # checks the model, and learns the order in which gradients arrive
            taken = [_take(step, data) for _ in range(rounds)]
            measured.seconds[key] = min(seconds for seconds, _, _ in taken)
            measured.sent[key] = taken[-1][1]
            measured.memory[key] = median(memory for _, _, memory in taken)
    if rank == 0:
        torch.save(measured, Path(folder, f"{world}.pt"))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _take(step: mtl.Step, data: Any) -> tuple[float, int, int]:
    """Takes a step, and returns its seconds, bytes sent and bytes of memory."""
    counter: Any = ctypes.CDLL(None)
    counter.memory_now.restype = counter.memory_top.restype = ctypes.c_long
    assert step.optimizer is not None
    step.optimizer.zero_grad()
    gc.collect()
    time.sleep(0.01)  # threads of gloo free their buffers
    if dist.is_initialized():
        dist.barrier()
    buckets = step.computation._overlap._room._flat.values()  # they stay from one step to the next, and count as well
    before = counter.memory_now() - sum(flat.nbytes for flat in buckets)
    counter.memory_top()
    bench_scale.sent, start = 0, time.perf_counter()
    step(data)
    return time.perf_counter() - start, bench_scale.sent, counter.memory_top() - before


def measure(rounds: int, file: Path | None) -> Measured:
    """Takes the steps in 1 to 4 processes, or reads from a file what was measured there before."""
    measured = Measured({}, {}, {})
    if file and file.exists():
        measured = Measured(**torch.load(file))
    with tempfile.TemporaryDirectory() as folder:
        library, source = Path(folder, "memory_counter.so"), Path(__file__).with_name("memory_counter.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        os.environ["LD_PRELOAD"] = str(library)  # for the processes that are started
        for world in PROCESSES:
            if any(key[0] == world for key in measured.seconds):
                continue
            mp.spawn(work, args=(world, rounds, folder), nprocs=world)
            each = torch.load(Path(folder, f"{world}.pt"), weights_only=False)
            for name, values in vars(each).items():
                getattr(measured, name).update(values)
            if file:
                torch.save(vars(measured), file)
    return measured


class Model:
    """The seconds of a step.

    Args:
        constants: A constant for each of NAMES.
        hidden: The share of the communication that is hidden where it may run during a pass, with replicas and with
            sharded parameters.
    """

    def __init__(self, constants: numpy.ndarray, hidden: tuple[float, float]) -> None:
        self.constants = constants
        self.hidden = hidden

    def seconds(self, case: str, shape: Shape, world: int) -> float:
        """Returns the seconds of a step of one case."""
        return float(self.row(case, shape, world) @ self.constants)

    def row(self, case: str, shape: Shape, world: int) -> numpy.ndarray:
        """Returns the counts whose sum, each times its constant, are the seconds.

        Of communication and covering products, the shorter one is taken off, times the hidden share. Processes that
        share cores compute more slowly.
        """
        counted = counts(case, shape, world)
        row = numpy.array(counted[:-1])
        row[:NUM_COMPUTING] *= max(1.0, world / CORES)
        hidden = self.hidden[case.endswith("fsdp")]
        communication = row[NUM_COMPUTING:] @ self.constants[NUM_COMPUTING:]
        covering = counted.covering * max(1.0, world / CORES)
        if covering * self.constants[0] < communication:
            row[0] -= hidden * covering
        else:
            row[NUM_COMPUTING:] *= 1 - hidden
        return row


def fit(seconds: dict[Key, float]) -> Model:
    """Returns the model that fits the measurements best, without those that are held out."""
    fitted = {key: value for key, value in seconds.items() if not is_held_out(key)}
    errors = {}
    for hidden in product(SHARES, SHARES):
        model = Model(numpy.zeros(len(NAMES)), (0.0, 0.0))
        for _ in range(6):  # what is hidden depends on the constants
            matrix = numpy.array([model.row(key[1], shape_of(key), key[0]) / value for key, value in fitted.items()])
            scale = numpy.maximum(matrix.max(0), 1e-30)  # 0 for what is hidden altogether
            solution, error = nnls(matrix / scale, numpy.ones(len(fitted)))
            model = Model(solution / scale, hidden)
        errors[model] = error
    return min(errors, key=errors.__getitem__)


def errors(measured: dict[Key, float], computed: dict[Key, float], keys: Iterable[Key]) -> list[float]:
    """Returns the relative errors of computed values."""
    return [abs(computed[key] / measured[key] - 1) for key in keys]


def main() -> None:
    """Measures, fits, and writes the page."""
    import page_scale

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--page", type=Path, default=Path("docs/scale.md"))
    parser.add_argument("--measured", type=Path, help="a file that keeps measurements, with which a run goes on")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    measured = measure(arguments.rounds, arguments.measured)
    arguments.page.write_text(page_scale.page(measured))


if __name__ == "__main__":
    main()
