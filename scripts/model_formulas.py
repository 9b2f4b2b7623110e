"""What a step needs in one process, by formulas: arithmetic, numbers sent, and the largest memory.

The model is a trunk of L equal linear layers of width d, P = L·d², with T heads of one output and n rows of a layer's
input in each of W processes. A case is a source of the gradients, and `fsdp` behind it if the parameters are sharded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from mtl.balancers._math.gramian import COLUMNS
from mtl.distributed.collectives import BUCKET
from mtl.gradients.layerwise import Product
from mtl.gradients.overlap import LARGE

CASES = ("joint", "shared", "rows", "layerwise", "representation")
SHARDED = ("joint fsdp", "rows fsdp", "representation fsdp")
RING = 2**19  # numbers that gloo holds at most while it sums a tensor


@dataclass(frozen=True)
class Shape:
    """What is trained: a trunk of equal linear layers.

    Args:
        width: The inputs and outputs of a layer.
        layers: The number of layers.
        tasks: The number of tasks.
        samples: The number of rows of a layer's input a process: samples, times tokens or positions.
        together: With sharded parameters, the number of layers that are gathered together, such as those of a block.
    """

    width: int
    layers: int
    tasks: int
    samples: float
    together: int = 1

    @property
    def parameters(self) -> int:
        """The parameters of the trunk."""
        return self.layers * self.width**2

    @property
    def features(self) -> float:
        """The numbers of a layer's output in a process."""
        return self.samples * self.width


class Counts(NamedTuple):
    """The counts of a step in one process, each of which takes a time of its own.

    Args:
        products: Floating-point operations of matrix products.
        parameters: Parameters of the trunk that are read, written or copied.
        rows: Numbers of the tasks' gradients that are written, summed, multiplied and combined.
        calls: Operations.
        modules: Parameters of a module that are gathered, or whose gradients are summed, with sharded parameters.
        sent: Numbers that a process sends.
        rounds: Messages one after another.
        covering: Floating-point operations during which the communication may run. It isn't a time of its own.
    """

    products: float
    parameters: float
    rows: float
    calls: float
    modules: float
    sent: float
    rounds: float
    covering: float


def is_layerwise(shape: Shape, world: int) -> bool:
    """Returns whether `layerwise` takes the layers' inputs and output gradients, by the rules of mtl.gradients."""
    rows = round(shape.samples * world)
    layer = Product(None, [torch.empty(shape.width, shape.width, device="meta")], torch.empty(0))  # type: ignore[arg-type]
    fewer = world == 1 or rows * (1 + shape.tasks) * shape.width < (shape.tasks + 1) * shape.width**2
    return fewer and layer.pays(shape.tasks, rows)


def source_of(case: str, shape: Shape, world: int) -> str:
    """Returns the source that a case takes: `layerwise` takes rows if these are cheaper."""
    source = case.split()[0]
    return "rows" if source == "layerwise" and not is_layerwise(shape, world) else source


@cache
def counts(case: str, shape: Shape, world: int, *, summing: float = 2.0) -> Counts:
    """Returns the counts of a step.

    Args:
        case: The source of the gradients, and `fsdp`.
        shape: What is trained.
        world: The number of processes.
        summing: How many times a sharded gradient crosses until each process has its part of the sum: 2 with gloo, 1
            with NCCL.
    """
    source, layers, tasks, size = source_of(case, shape, world), shape.layers, shape.tasks, shape.parameters
    product = 2 * shape.samples * shape.width**2
    part, others = (world - 1) / world, world - 1
    forward, backward = layers * product, (2 * layers - 1) * product
    passes = tasks if source == "rows" else 1
    calls = tasks * (10 * layers + 10) if source == "rows" else 12 * layers + 10 * tasks
    if case.endswith("fsdp"):
        modules = layers / shape.together * (1 + 2 * passes) + 3 * tasks
        sent = part * size * (1 + passes * (1 + summing))
        numbers = tasks * size / world if source == "rows" else 0
        moved = size * (1 + 2 * passes + 1 / world)
        flops = forward + passes * backward
        return Counts(flops, moved, numbers, calls, modules, sent, others * modules, flops)
    if source == "layerwise":
        rows = shape.samples * world
        compress = layers * (2 * rows**2 * shape.width * (1 + tasks) + 2 * rows * shape.width**2)
        flops = forward + tasks * (layers - 1) * product + compress
        sent = layers * others * (1 + tasks) * shape.features
        numbers = tasks * layers * rows * shape.width
        return Counts(flops, size, numbers, tasks * (8 * layers + 10), 0, sent, others * (2 * layers + 2), 0)
    if source == "rows":
        numbers = tasks * size * (1 / world + (world > 1))
        return Counts(forward + tasks * backward, size, numbers, calls, 0, (tasks + 1) * part * size, 4 * others, 0)
    waits = source == "representation"  # its gradients are summed after the passes
    messages = 2 * others * (1 + waits)
    return Counts(forward + backward, size, 0, calls, 0, 2 * part * size, messages, 0 if waits else backward)


def memory(case: str, shape: Shape, world: int, *, gloo: bool = True) -> float:
    """Returns the bytes that a step needs at most, in addition to parameters and optimizer state.

    The peak is that of the moments at which a kind of step may have it. All numbers are float32.

    Args:
        case: The source of the gradients, and `fsdp`.
        shape: What is trained.
        world: The number of processes.
        gloo: Whether gloo's own buffers count.
    """
    source, sharded = source_of(case, shape, world), case.endswith("fsdp")
    if source == "layerwise":
        return 4 * max(_layerwise(shape, world))
    unit, size, output, tasks = shape.width**2, shape.parameters, shape.features, shape.tasks

    def ring(numbers: float) -> float:
        return min(numbers / world, RING) if gloo else 0.0

    # The gradients at the features, and two tensors at which the backward pass is
    held = output * {"joint": 2, "shared": 3, "rows": tasks + 2, "representation": tasks + 3}[source]
    part = size / world if sharded else size
    before = (tasks - 1) * part if source == "rows" else 0  # the rows of all tasks but the last
    # Sharded: the parameters of a module, those of the next one, which are gathered early, and a whole gradient
    work = 3 * unit * shape.together
    begin = before + shape.layers * output + held + (work if sharded else unit)
    end = before + part + held + (work + ring(unit) if sharded else 0)
    moments = [begin, end]
    if source == "rows":
        moments.append(tasks * part + _chunks(tasks, size))
    if source == "representation":
        moments.append((shape.layers + tasks) * output + _chunks(tasks, output))
    if world > 1 and not sharded:
        if source in ("joint", "shared"):  # small gradients are copied into buckets
            copies, sent = (0, unit) if 4 * unit >= LARGE else (size, size)
            moments = [copies + begin, copies + end + ring(sent)]
        else:
            moments.append(_exchange(source, shape, world, ring))
    return 4 * max(moments)


def _exchange(source: str, shape: Shape, world: int, ring: Callable[[float], float]) -> float:
    """Returns the numbers in memory while gradients are summed; `ring` gives those of gloo's own buffer."""
    unit, size, output, tasks = shape.width**2, shape.parameters, shape.features, shape.tasks
    if source == "rows":  # a buffer to send, one to receive, and the sums of the slices, twice for the last buffer
        sent = _joined(tasks * size, unit)
        return tasks * size + sent * (2 + (2 if sent == tasks * size else 1) / world)
    sent = _joined(size, unit)
    return size + sent + ring(sent) + (tasks + 1) * output


def _joined(numbers: float, unit: int) -> float:
    """Returns the numbers that are joined in one tensor to be sent, of gradients with `unit` numbers each."""
    return min(numbers, max(BUCKET, unit))


def _chunks(tasks: int, columns: float) -> float:
    """Returns the float32 numbers in the place of two chunks in float64, of which a Gramian is computed."""
    return 2 * tasks * min(2 * COLUMNS, columns)


def _layerwise(shape: Shape, world: int) -> list[float]:
    layers, tasks, output = shape.layers, shape.tasks, shape.features
    # The layers' inputs, the tasks' gradients at each layer and at the features
    held = output * (layers + tasks * layers + tasks)
    chunks = _chunks(tasks, world * output)
    if world == 1:
        return [held + tasks * output + chunks, shape.parameters + 2 * output]
    own = (1 + tasks) * output  # what a process sends of a layer; twice while it is padded
    whole = world * own  # what it has afterwards; twice while the parts are joined
    gather = held + (layers - 1) * whole + 2 * own + 2 * whole
    compress = held + layers * whole + tasks * world * output + chunks
    return [gather, compress, shape.parameters + whole + 2 * world * output]
