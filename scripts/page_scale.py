"""Writes the page of `model_scale.py`: the fit, its errors, and what the model computes for GPUs."""

from statistics import median
from typing import Any

import numpy
from model_scale import (
    CASES,
    CORES,
    HELD_OUT,
    NAMES,
    NOT_FITTED,
    PROCESSES,
    UNITS,
    Shape,
    counts,
    fit,
    is_layerwise,
)

WORLDS = (8, 64, 1024)
NODE = 8  # GPUs
FLOPS, MEMORY, LINK, NETWORK = 989e12, 3.35e12, 450e9, 50e9
EFFICIENCY, CALL, MESSAGE = 0.4, 5e-6, 5e-6
SHAPES = {
    "A transformer of 300 million parameters, 4,096 tokens a GPU, T=2": Shape(1024, 286, 2, 4096),
    "A transformer of 300 million parameters, 4,096 tokens a GPU, T=8": Shape(1024, 286, 8, 4096),
    "A transformer of 3 billion parameters, 4,096 tokens a GPU, T=8": Shape(4096, 179, 8, 4096),
    "Five linear layers of 8,192, 32 samples a GPU, T=8": Shape(8192, 5, 8, 32),
}
INTRODUCTION = f"""# Several processes: a model of the cost

Made by `scripts/model_scale.py`, which is to be run again when the step changes. The model says what a step costs with
a balancer, for numbers of GPUs on which nothing was measured. **Measured** on a CPU with {CORES} cores and gloo, 1 to 4
processes: the constants of the first table and the errors of the second. **Computed**: everything about GPUs.

## The model

The seconds of a step are a sum of six counts, each times a constant. For a trunk of L linear layers of width d
(P = L·d² parameters), T tasks, n rows of a layer's input in each of W processes:

| | matrix products, flops | numbers of rows, read and written | numbers sent by a process |
|---|---|---|---|
| `joint`, `shared`, `representation` | 2·n·d²·(3L − 1) | 0 | 2·P·(W − 1)/W |
| `rows` | 2·n·d²·(L + T·(2L − 1)) | T·P·(1 + 1/W); T·P for W = 1 | (T + 1)·P·(W − 1)/W |
| `layerwise` | 2·n·d²·(L + T·(L − 1)) + L·(2(nW)²·d·(1 + T) + 2·nW·d²) | T·L·nW·d | L·n·(W − 1)·(1 + T)·d |

`layerwise` holds where the whole batch has fewer rows than layers have inputs; otherwise these layers take `rows`. The
other counts are parameters (read and written by forward, backward and update), calls of operations, and messages that
wait for one another.
"""
ASSUMPTIONS = f"""
## GPUs: computed

Nothing in this section was measured. Assumptions, from the data sheets of H100 SXM, NVLink 4 and InfiniBand NDR:

| what | assumption |
|---|---|
| matrix products | {FLOPS / 1e12:.0f} Tflop/s (bf16, dense), of which {EFFICIENCY:.0%} is reached: a guess |
| memory | {MEMORY / 1e12:.2f} TB/s; a parameter moves 40 bytes a step, a number of a row 12 |
| between the {NODE} GPUs of a node | {LINK / 1e9:.0f} GB/s in each direction |
| between nodes | {NETWORK / 1e9:.0f} GB/s a GPU; a ring crosses it with 1/{NODE} of the numbers |
| `rows` between nodes | each pair of GPUs exchanges what it needs, so that (W − {NODE})/W of the numbers cross |
| a call, a message | {CALL * 1e6:.0f} µs each: guesses; messages grow with log2 W |
| data types | 4 bytes a number sent; replicas of parameters, gradients and AdamW's state: 16 bytes a parameter |
| overlap | none: communication follows the backward pass |
| `distributed=fsdp` | its gathering of parameters in each pass, and activations, are not in the model |

Cells: milliseconds a step, and in brackets how often the time of `shared` at the same size. The samples a GPU stay the
same, so that the batch grows with W. *Every 10*: `gradients.every=10` with `rows`.
"""
CHOICE = """
## What to choose

Computed, with the assumptions above:

- `representation` costs as much as `shared` at every size. It balances the gradients at the features, not those of the
  parameters, and is the first choice if that is what you want or if nothing else is affordable.
- `rows` costs up to T times the backward pass at every size, and in addition T + 1 times the parameters cross. Inside a
  node the arithmetic decides. From the second node on, the exchange decides: choose `gradients.every=10` there, or
  `representation`.
- `layerwise` is exact and needs no rows, and pays only while the *whole* batch has fewer rows than a layer has inputs.
  With tokens or images that is not so from a few GPUs on, and `auto` then takes rows by itself.
- Memory: replicas hold T·P numbers of rows while the passes run. With sharded parameters (`distributed=fsdp`) each GPU
  holds T·P/W of them. From 1.7 billion parameters and T = 8 on, 80 GB do not hold
  replicas with rows.
- Exchanging rows between all pairs is best for gloo. Between nodes, a hierarchical reduce-scatter, as NCCL has it,
  would send 1/8 of the numbers over the network: the figures of `rows` at 64 and 1,024 GPUs would then be the smaller
  ones in square brackets.
"""


def gpu_seconds(case: str, shape: Shape, world: int, *, hierarchical: bool = False) -> float:
    """Returns the seconds of a step on GPUs, computed from the assumptions."""
    flops, size, numbers, calls, sent, _ = counts(case, shape, world)
    by_rows = case == "rows" or (case == "layerwise" and not is_layerwise(shape, world))
    outside = (world - NODE) / world if by_rows and not hierarchical else 1 / NODE
    crossing = 4 * sent * outside / NETWORK if world > NODE else 0.0
    communication = max(4 * sent / LINK, crossing) + 4 * numpy.log2(world) * MESSAGE
    computing = flops / (FLOPS * EFFICIENCY) + (40 * size + 12 * numbers) / MEMORY
    return float(max(computing, CALL * calls) + communication)


def page(times: dict[Any, float], sent: dict[Any, int], memory: dict[str, int]) -> str:
    """Returns the page in Markdown."""
    constants, predicted = fit(times)
    parts = [INTRODUCTION, _constants(constants), _errors(times, predicted, sent), _memory(memory), ASSUMPTIONS]
    return "\n".join([*parts, *(_of_shape(name, shape) for name, shape in SHAPES.items()), CHOICE.strip(), ""])


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def _constants(constants: numpy.ndarray) -> str:
    rows = [[name, f"{value:.2g}", unit] for name, value, unit in zip(NAMES, constants, UNITS, strict=True)]
    return "Measured and fitted on this CPU:\n\n" + _table(["count", "constant", "unit"], rows)


def _errors(times: dict[Any, float], predicted: dict[Any, float], sent: dict[Any, int]) -> str:
    """Returns the errors of the fit, and those of what was held out."""
    rows = []
    for case in CASES:
        line = [f"`{case}`"]
        for held_out in (False, True):
            ours = [k for k in times if k[1] == case and (k[0] == NOT_FITTED or k[2:] == HELD_OUT) == held_out]
            errors = [abs(predicted[key] / times[key] - 1) for key in ours]
            line += [f"{median(errors):.0%}", f"{max(errors):.0%}"]
        rows.append(line)
    head = ["", "fitted: median error", "largest", "held out: median error", "largest"]
    off = [
        abs(number / counts(case, Shape(width, 3, tasks, batch / world), world)[4] - 1)
        for (world, case, width, tasks, batch), number in sent.items()
        if world > 1
    ]
    return (
        f"Errors of the fit: {len(times)} measured steps in {PROCESSES[0]} to {PROCESSES[-1]} processes, of which "
        f"those in {NOT_FITTED} processes and those of width {HELD_OUT[0]} with {HELD_OUT[1]} tasks are held out. "
        "Other programs ran on the machine at the same time, and more processes than cores share the cores.\n\n"
        + _table(head, rows)
        + f"\nThe numbers sent, counted at the calls of `torch.distributed`, differ from the formulas by "
        f"{median(off):.1%} in the median and by {max(off):.0%} at most; the heads and the Gramian are not "
        "in the formulas.\n"
    )


def _memory(memory: dict[str, int]) -> str:
    size, tasks = 3 * 1024**2, 8
    rows = []
    for case, measured in memory.items():
        computed = 4 * size * (1 + (tasks if case == "rows" else 0))
        rows.append([f"`{case}`", f"{measured / 2**20:.0f}", f"{computed / 2**20:.0f}"])
    head = ["", "measured, MiB", "computed, MiB"]
    return (
        "## Memory\n\nComputed: gradients (P) and rows (T·P), 4 bytes each; the buffers of an exchange (at most 8 "
        "million numbers each) and activations come in addition. Measured: the peak that two steps add in one of two "
        "processes, width 1,024, T = 8.\n\n" + _table(head, rows)
    )


def _of_shape(name: str, shape: Shape) -> str:
    lines = []
    for world in WORLDS:
        base = gpu_seconds("shared", shape, world)
        every = (gpu_seconds("rows", shape, world) + 9 * base) / 10
        rows, better = (gpu_seconds("rows", shape, world, hierarchical=each) for each in (False, True))
        line = [f"{world:,}", f"{1e3 * base:.1f}"]
        line.append(f"{1e3 * rows:.1f} ({rows / base:.1f})" + (f" [{better / base:.1f}]" if world > NODE else ""))
        layerwise = gpu_seconds("layerwise", shape, world)
        line.append(f"{1e3 * layerwise:.1f} ({layerwise / base:.1f})" if is_layerwise(shape, world) else "as `rows`")
        line += [f"{1e3 * every:.1f} ({every / base:.1f})"]
        replicas = shape.parameters * (16 + 4 * shape.tasks)
        line += [f"{replicas / 1e9:.1f}", f"{replicas / world / 1e9:.2f}"]
        lines.append(line)
    head = ["GPUs", "`joint`, `shared`, `representation`", "`rows`", "`layerwise`", "every 10"]
    return f"{name}:\n\n" + _table([*head, "GB with rows, replicas", "sharded"], lines)
