"""The model of time and memory a step on GPUs, whose constants come from data sheets and guesses."""

import numpy
from model_formulas import Shape, counts, is_layerwise, memory

NODE = 8  # GPUs
FLOPS, MEMORY, LINK, NETWORK = 989e12, 3.35e12, 450e9, 50e9
EFFICIENCY, CALL, MESSAGE = 0.4, 5e-6, 5e-6
CALLS_OF_MODULE = 20  # of FSDP2, to gather a module or to sum its gradients
SPACE = 80e9  # bytes of a GPU
STATE = 12  # bytes a parameter: the parameter and AdamW's two moments
EXACT = ("rows", "layerwise", "rows fsdp")


def seconds(case: str, shape: Shape, world: int, *, hierarchical: bool = False, overlap: float = 1.0) -> float:
    """Returns the seconds of a step on GPUs, computed from the assumptions.

    Args:
        case: The source of the gradients, and `fsdp`.
        shape: What is trained.
        world: The number of GPUs.
        hierarchical: Whether rows are summed inside of the nodes before they cross the network.
        overlap: The share of the communication that is hidden where it may be.
    """
    counted, sharded = counts(case, shape, world, summing=1), case.endswith("fsdp")
    pairs = not sharded and not hierarchical
    pairs &= case == "rows" or (case == "layerwise" and not is_layerwise(shape, world))
    outside = (world - NODE) / world if pairs else 1 / NODE
    crossing = 4 * counted.sent * outside / NETWORK if world > NODE else 0.0
    messages = counted.modules if sharded else 4
    communication = max(4 * counted.sent / LINK, crossing) + messages * numpy.log2(world) * MESSAGE
    own = shape.parameters / world if sharded else shape.parameters
    moved = 40 * own + 8 * (counted.parameters - own) + 12 * counted.rows
    rate = FLOPS * EFFICIENCY
    calls = CALL * (counted.calls + CALLS_OF_MODULE * counted.modules)
    hidden = overlap * min(communication, counted.covering / rate)
    return float(max(counted.products / rate + moved / MEMORY, calls) + communication - hidden)


def num_bytes(case: str, shape: Shape, world: int) -> float:
    """Returns the bytes that a GPU needs: parameters, AdamW's state, and what a step adds."""
    own = shape.parameters / (world if case.endswith("fsdp") else 1)
    return STATE * own + memory(case, shape, world, gloo=False)


def largest(case: str, tasks: int, world: int) -> int:
    """Returns the most parameters with which a step fits into a GPU, in layers of 4,096 with 4,096 tokens a GPU."""
    low, high = 0, 10**5
    while high - low > 1:
        middle = (low + high) // 2
        fits = num_bytes(case, Shape(4096, middle, tasks, 4096, 12), world) <= SPACE
        low, high = (middle, high) if fits else (low, middle)
    return low * 4096**2


def fastest(shape: Shape, world: int) -> str:
    """Returns the fastest case with an exact Gramian that fits into a GPU; empty if none does."""
    fits = [case for case in EXACT if num_bytes(case, shape, world) <= SPACE]
    return min(fits, key=lambda case: seconds(case, shape, world), default="")
