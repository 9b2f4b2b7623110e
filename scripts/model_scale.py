"""Fits a model of time and memory a step to measurements in 1 to 4 processes, and writes docs/scale.md.

    python scripts/model_scale.py [--rounds 3] [--page docs/scale.md]

Each process has one thread and gloo. The seconds of a step are a sum of a few counts, each times a constant: see
`counts`. The constants are fitted by least squares of the relative errors to the measurements in 1, 2 and 4 processes;
those in 3 processes and those of one more size are held out. For GPUs, the constants come from data sheets.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_scale
import numpy
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.optimize import nnls

import mtl
from mtl.gradients.layerwise import Product

CASES = ("joint", "shared", "rows", "layerwise", "representation")
LAYERS = 3  # of bench_scale.build
SIZES = [(width, tasks, batch) for width in (256, 512, 1024) for tasks in (2, 8) for batch in (48, 192)]
HELD_OUT = (768, 4, 96)
PROCESSES = (1, 2, 3, 4)
NOT_FITTED = 3  # processes
CORES = len(os.sched_getaffinity(0))
NAMES = ("products", "parameters", "rows", "calls", "sent", "rounds")
UNITS = ("s / flop", "s / parameter", "s / number of a row", "s / call", "s / number sent", "s / message")


@dataclass(frozen=True)
class Shape:
    """What is trained: a trunk of equal linear layers.

    Args:
        width: The inputs and outputs of a layer.
        layers: The number of layers.
        tasks: The number of tasks.
        samples: The number of rows of a layer's input a process: samples, times tokens or positions.
    """

    width: int
    layers: int
    tasks: int
    samples: float

    @property
    def parameters(self) -> int:
        """The parameters of the trunk."""
        return self.layers * self.width**2


def is_layerwise(shape: Shape, world: int) -> bool:
    """Returns whether `layerwise` takes the layers' inputs and output gradients, by the rules of mtl.gradients."""
    rows = round(shape.samples * world)
    layer = Product(None, [torch.empty(shape.width, shape.width, device="meta")], torch.empty(0))  # type: ignore[arg-type]
    fewer = world == 1 or rows * (1 + shape.tasks) * shape.width < (shape.tasks + 1) * shape.width**2
    return fewer and layer.pays(shape.tasks, rows)


def counts(case: str, shape: Shape, world: int) -> tuple[float, ...]:
    """Returns the counts of a step in one process, in the order of NAMES.

    products: Floating-point operations of matrix products. parameters: Parameters of the trunk, each of which is read
    and written by forward, backward and update. rows: Numbers of the tasks' gradients that are written, summed,
    multiplied and combined. calls: Operations. sent: Numbers that a process sends. rounds: Messages one after another.
    """
    layers, tasks, size = shape.layers, shape.tasks, shape.parameters
    product = 2 * shape.samples * shape.width**2
    part = (world - 1) / world
    forward, backward = layers * product, (2 * layers - 1) * product
    calls = 12 * layers + 10 * tasks
    messages = 2 * (world - 1)
    if case == "layerwise" and is_layerwise(shape, world):
        rows = shape.samples * world
        compress = layers * (2 * rows**2 * shape.width * (1 + tasks) + 2 * rows * shape.width**2)
        flops = forward + tasks * (layers - 1) * product + compress
        sent = layers * shape.samples * (world - 1) * (1 + tasks) * shape.width
        numbers = tasks * layers * rows * shape.width
        return flops, size, numbers, tasks * (8 * layers + 10), sent, (world - 1) * (2 * layers + 2)
    if case in ("rows", "layerwise"):
        numbers = tasks * size * (1 / world + (world > 1))
        sent = (tasks + 1) * part * size
        return forward + tasks * backward, size, numbers, tasks * (10 * layers + 10), sent, 2 * messages
    return forward + backward, size, 0, calls, 2 * part * size, messages * (1 + (case == "representation"))


def seconds(case: str, shape: Shape, world: int, constants: numpy.ndarray, sharing: float = 1.0) -> float:
    """Returns the seconds of a step; all but the last two counts take longer if processes share cores."""
    return float(_shared(counts(case, shape, world), sharing) @ constants)


def _shared(counted: tuple[float, ...], sharing: float) -> numpy.ndarray:
    return numpy.array(counted) * numpy.array([sharing] * 4 + [1.0, 1.0])


def step_of(case: str, width: int, num_tasks: int) -> mtl.Step:
    """Returns a step of one case."""
    model, tasks = bench_scale.build(width, num_tasks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if case in ("joint", "shared"):
        return mtl.Step(model, tasks, optimizer, passes=case)
    gradients = mtl.Gradients(source=case)
    return mtl.Step(model, tasks, optimizer, balancer=mtl.balancers.UPGrad(), gradients=gradients)


def work(rank: int, world: int, rounds: int, folder: str) -> None:
    """Takes the steps of a process; the best of all rounds counts."""
    torch.set_num_threads(1)
    if world > 1:
        store = Path(folder, f"store{world}").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        bench_scale.count_collectives(world)
    best: dict[Any, float] = {}
    sent: dict[Any, int] = {}
    for width, tasks, batch in [*SIZES, HELD_OUT]:
        names = ["x", *(f"y{i}" for i in range(tasks))]
        generator = torch.Generator().manual_seed(rank)
        shapes = {name: (batch // world, width if name == "x" else 1) for name in names}
        data = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for case in CASES:
            step, key = step_of(case, width, tasks), (case, width, tasks, batch)
            step(data)  # checks the model
            for _ in range(rounds):
                if world > 1:
                    dist.barrier()
                bench_scale.sent, start = 0, time.perf_counter()
                step(data)
                best[key] = min(best.get(key, 1e9), time.perf_counter() - start)
                sent[key] = bench_scale.sent
    if rank == 0:
        torch.save((best, sent), Path(folder, f"{world}.pt"))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def weigh(rank: int, case: str, folder: str) -> None:
    """Writes the memory that a step adds to the model, in one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(folder, f"store {case}").as_uri(), rank=rank, world_size=2)
    step = step_of(case, 1024, 8)
    data = {name: torch.randn(96, 1024 if name == "x" else 1) for name in ["x", *(f"y{i}" for i in range(8))]}
    mtl.distributed.prepare(step.model)
    dist.barrier()
    before = _resident("VmRSS")
    for _ in range(2):
        step(data)
    if rank == 0:
        Path(folder, f"memory {case}").write_text(str(_resident("VmHWM") - before))
    dist.barrier()
    dist.destroy_process_group()


def _resident(which: str) -> int:
    """Returns the resident memory in bytes, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def measure(rounds: int) -> tuple[dict[Any, float], dict[Any, int], dict[str, int]]:
    """Returns seconds and numbers sent by (processes, case, width, tasks, batch), and bytes by case."""
    times: dict[Any, float] = {}
    sent: dict[Any, int] = {}
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in PROCESSES:
            mp.spawn(work, args=(world, rounds, folder), nprocs=world)
            best, numbers = torch.load(Path(folder, f"{world}.pt"), weights_only=False)
            times |= {(world, *key): value for key, value in best.items()}
            sent |= {(world, *key): value for key, value in numbers.items()}
        for case in CASES:
            mp.spawn(weigh, args=(case, folder), nprocs=2)
            memory[case] = int(Path(folder, f"memory {case}").read_text())
    return times, sent, memory


def fit(times: dict[Any, float]) -> tuple[numpy.ndarray, dict[Any, float]]:
    """Returns the constants, and for each measurement the predicted seconds."""
    rows = {}
    for world, case, width, tasks, batch in times:
        shape = Shape(width, LAYERS, tasks, batch / world)
        rows[world, case, width, tasks, batch] = _shared(counts(case, shape, world), max(1.0, world / CORES))
    fitted = [key for key in times if key[0] != NOT_FITTED and key[2:] != HELD_OUT]
    matrix = numpy.array([rows[key] / times[key] for key in fitted])
    scale = matrix.max(0)
    constants = nnls(matrix / scale, numpy.ones(len(fitted)))[0] / scale
    return constants, {key: float(row @ constants) for key, row in rows.items()}


def main() -> None:
    """Measures, fits, and writes the page."""
    import page_scale

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", type=Path, default=Path("docs/scale.md"))
    parser.add_argument("--measured", type=Path, help="a file of measurements: read if it exists, otherwise written")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.measured and arguments.measured.exists():
        measured = torch.load(arguments.measured, weights_only=False)
    else:
        measured = measure(arguments.rounds)
        if arguments.measured:
            torch.save(measured, arguments.measured)
    arguments.page.write_text(page_scale.page(*measured))


if __name__ == "__main__":
    main()
