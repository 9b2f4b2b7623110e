"""Writes the page of `model_scale.py`: the fit, its errors, and what the model computes for GPUs."""

from collections.abc import Iterable
from statistics import median
from typing import Any

import numpy
from model_formulas import CASES, SHARDED, Shape, counts, is_layerwise, memory
from model_scale import (
    CORES,
    HELD_OUT,
    NAMES,
    NOT_FITTED,
    PROCESSES,
    UNITS,
    Key,
    Measured,
    Model,
    errors,
    fit,
    is_held_out,
    shape_of,
)

WORLDS = (8, 64, 1024)
NODE = 8  # GPUs
FLOPS, MEMORY, LINK, NETWORK = 989e12, 3.35e12, 450e9, 50e9
EFFICIENCY, CALL, MESSAGE = 0.4, 5e-6, 5e-6
CALLS_OF_MODULE = 20  # of FSDP2, to gather a module or to sum its gradients
SPACE = 80e9  # bytes of a GPU
STATE = 12  # bytes a parameter: the parameter and AdamW's two moments
EVERY = 10
SHAPES = {
    "A transformer of 300 million parameters, 4,096 tokens a GPU, T=2": Shape(1024, 286, 2, 4096, 12),
    "A transformer of 300 million parameters, 4,096 tokens a GPU, T=8": Shape(1024, 286, 8, 4096, 12),
    "A transformer of 3 billion parameters, 4,096 tokens a GPU, T=8": Shape(4096, 179, 8, 4096, 12),
    "Five linear layers of 8,192, 32 samples a GPU, T=8": Shape(8192, 5, 8, 32),
}
EXACT = ("rows", "layerwise", "rows fsdp")
LIMITS = ("shared", "rows", "joint fsdp", "rows fsdp")
INTRODUCTION = f"""# Several processes: a model of the cost

Made by `scripts/model_scale.py`, which is to be run again when the step changes. The model says what a step costs with
a balancer, for numbers of GPUs on which nothing was measured. **Measured** on a CPU with {CORES} cores and gloo, in
{PROCESSES[0]} to {PROCESSES[-1]} processes: the constants of the time, and the errors of time and memory. **Computed**:
everything about GPUs.

The model is a trunk of L linear layers of width d (P = L·d² parameters) with T tasks, and n rows of a layer's input in
each of W processes. `fsdp` means sharded parameters, otherwise each process has all of them. With `fsdp`, `layerwise`
takes rows, and `shared` costs as much as `joint`.

## Time

The seconds of a step are a sum of {len(NAMES)} counts, each times a constant, less the communication that is hidden
behind a pass: a share of the shorter one of the two. B is T for `rows`, and otherwise 1.

| | matrix products, flops | numbers of rows, read and written | numbers sent by a process | may be hidden behind |
|---|---|---|---|---|
| `joint`, `shared` | 2·n·d²·(3L − 1) | 0 | 2·P·(W − 1)/W | the backward pass |
| `representation` | 2·n·d²·(3L − 1) | 0 | 2·P·(W − 1)/W | nothing |
| `rows` | 2·n·d²·(L + T·(2L − 1)) | T·P·(1 + 1/W); T·P for W = 1 | (T + 1)·P·(W − 1)/W | nothing |
| `layerwise` | 2·n·d²·(L + T·(L − 1)) + L·(2(nW)²·d·(1 + T) + 2·nW·d²) | T·L·nW·d | L·n·(W − 1)·(1 + T)·d | nothing |
| `fsdp` | 2·n·d²·(L + B·(2L − 1)) | T·P/W for `rows` | (1 + B + B·s)·P·(W − 1)/W | all passes |

With `fsdp`, the parameters are gathered once for the forward pass and once for each backward pass, and the gradients
are summed after each backward pass: s is 2 with gloo and 1 with NCCL. `layerwise` holds where the whole batch has fewer
rows than layers have inputs; otherwise these layers take `rows`. The other counts are parameters (read, written and
copied), calls of operations, modules that are gathered or summed, and messages that wait for one another.
"""
MEMORY_TEXT = """## Memory

The largest memory during a step, in addition to the parameters and the optimizer's state, in numbers of 4 bytes. It is
that of one of these moments; a = n·d is the output of a layer, u = d² a layer, and S = W with `fsdp`, otherwise 1. The
formulas were read from the code and contain no fitted constant.

| moment | `joint`, `shared` | `representation` | `rows` |
|---|---|---|---|
| the last backward pass begins | D + L·a + h·a + w·u | L·a + h·a + w·u | (T − 1)·P/S + L·a + h·a + w·u |
| it ends | D + P/S + h·a + v·u | P/S + h·a + v·u | T·P/S + h·a + v·u |
| gradients are exchanged, replicas | | P + E(P) | T·P + (2 + 1/W)·E(T·P) |

D is P for replicas with W > 1 if a layer has less than 1 MiB of gradients: these are copied into buckets, larger ones
are summed where they are. Otherwise D is 0. h counts outputs that are held at the features: 2, 3, T + 3 and T + 2 for
`joint`, `shared`, `representation` and `rows`. w and v count layers: 1 and 0, or with `fsdp` 3 and 3, since two layers
are gathered and one has its whole gradient. E is what is sent at once, at most 8 million numbers or a layer. A Gramian
needs at most 256 KiB a task. `layerwise` holds (L + T·L + T)·a, and with W > 1 also L·W·(1 + T)·a, of which one layer
three times.
"""
ASSUMPTIONS = f"""
## GPUs: computed

Nothing in this section was measured. Assumptions, from the data sheets of H100 SXM, NVLink 4 and InfiniBand NDR:

| what | assumption |
|---|---|
| matrix products | {FLOPS / 1e12:.0f} Tflop/s (bf16, dense), of which {EFFICIENCY:.0%} is reached: a guess |
| memory | {MEMORY / 1e12:.2f} TB/s; an own parameter moves 40 bytes a step, a copy of it 8, a number of a row 12 |
| between the {NODE} GPUs of a node | {LINK / 1e9:.0f} GB/s in each direction |
| between nodes | {NETWORK / 1e9:.0f} GB/s a GPU; a ring crosses it with 1/{NODE} of the numbers |
| `rows` between nodes | each pair of GPUs exchanges what it needs, so that (W − {NODE})/W of the numbers cross |
| a call, a message | {CALL * 1e6:.0f} µs each: guesses; messages grow with log2 W |
| a module of `fsdp` | {CALLS_OF_MODULE} calls to gather it, or to sum its gradients: a guess |
| modules | 12 layers each in a transformer, otherwise 1 |
| data types | 4 bytes a number, sent or stored; AdamW |
| overlap | all communication that may be hidden is hidden, as far as the passes last |
| activations | one output a layer |

Cells: milliseconds a step, in brackets how often the time of `shared` at the same size, and GB a GPU: parameters,
AdamW's state and the formulas above. **Bold**: the fastest exact Gramian in each step that fits into
{SPACE / 1e9:.0f} GB. *Every {EVERY}*: `gradients.every={EVERY}`, the mean time of a step. The samples a GPU stay the
same, so that the batch grows with W.
"""


def gpu_seconds(case: str, shape: Shape, world: int, *, hierarchical: bool = False) -> float:
    """Returns the seconds of a step on GPUs, computed from the assumptions.

    Args:
        case: The source of the gradients, and `fsdp`.
        shape: What is trained.
        world: The number of GPUs.
        hierarchical: Whether rows are summed inside of the nodes before they cross the network.
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
    hidden = min(communication, counted.covering / rate)
    return float(max(counted.products / rate + moved / MEMORY, calls) + communication - hidden)


def gpu_bytes(case: str, shape: Shape, world: int) -> float:
    """Returns the bytes that a GPU needs: parameters, AdamW's state, and what a step adds."""
    own = shape.parameters / (world if case.endswith("fsdp") else 1)
    return STATE * own + memory(case, shape, world, gloo=False)


def largest(case: str, tasks: int, world: int) -> int:
    """Returns the most parameters with which a step fits into a GPU, in layers of 4,096 with 4,096 tokens a GPU."""
    low, high = 0, 10**5
    while high - low > 1:
        middle = (low + high) // 2
        fits = gpu_bytes(case, Shape(4096, middle, tasks, 4096, 12), world) <= SPACE
        low, high = (middle, high) if fits else (low, middle)
    return low * 4096**2


def page(measured: Measured) -> str:
    """Returns the page in Markdown."""
    model = fit(measured.seconds)
    parts = [INTRODUCTION, _constants(model), _of_time(measured, model), MEMORY_TEXT, _of_memory(measured)]
    tables = [_of_shape(name, shape) for name, shape in SHAPES.items()]
    return "\n".join([*parts, ASSUMPTIONS.strip(), "", *tables, _choice()])


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def _constants(model: Model) -> str:
    rows = [[name, f"{value:.2g}", unit] for name, value, unit in zip(NAMES, model.constants, UNITS, strict=True)]
    replicas, sharded = model.hidden
    rows.append(["hidden share", f"{replicas:.0%}; with `fsdp` {sharded:.0%}", "of what may be hidden"])
    return "Measured and fitted on this CPU:\n\n" + _table(["count", "constant", "unit"], rows)


def _errors(measured: dict[Key, float], computed: dict[Key, float]) -> str:
    rows = []
    for case in (*CASES, *SHARDED, None):
        line = [f"`{case}`" if case else "all"]
        for held_out in (False, True):
            keys = [key for key in measured if case in (None, key[1]) and is_held_out(key) == held_out]
            off = errors(measured, computed, keys)
            line += [f"{median(off):.0%}", f"{max(off):.0%}", str(len(off))]
        rows.append(line)
    head = ["", "median error", "largest", "steps", "held out: median error", "largest", "steps"]
    return _table(head, rows)


def _computed(keys: Iterable[Key], function: Any) -> dict[Key, float]:
    return {key: function(key[1], shape_of(key), key[0]) for key in keys}


def _of_time(measured: Measured, model: Model) -> str:
    off = [
        abs(number / 4 / counts(key[1], shape_of(key), key[0]).sent - 1)
        for key, number in measured.sent.items()
        if key[0] > 1
    ]
    sizes = " and ".join(f"width {width} with {layers} layers" for width, layers, *_ in HELD_OUT)
    return (
        f"The errors. Held out are the steps in {NOT_FITTED} processes and those of {sizes}. Other programs ran on the "
        "machine at the same time, and more processes than cores share the cores.\n\n"
        + _errors(measured.seconds, _computed(measured.seconds, model.seconds))
        + "\nThe numbers sent, counted at the calls of `torch.distributed`, differ from the formulas by "
        f"{median(off):.1%} in the median and by {max(off):.0%} at most; the heads and the Gramian are not "
        "in the formulas.\n"
    )


def _of_memory(measured: Measured) -> str:
    return (
        "The errors. Measured is the process's heap, counted at each allocation, gloo's buffers included, in the same "
        "steps as the time.\n\n" + _errors(measured.memory, _computed(measured.memory, memory))
    )


def _cell(case: str, shape: Shape, world: int, fastest: str) -> str:
    if case == "layerwise" and not is_layerwise(shape, world):
        return "as `rows`"
    seconds, base = gpu_seconds(case, shape, world), gpu_seconds("shared", shape, world)
    size = gpu_bytes(case, shape, world) / 1e9
    text = f"{1e3 * seconds:,.1f} ({seconds / base:.1f}), {size:,.1f} GB"
    return f"**{text}**" if case == fastest else text


def _every(case: str, shape: Shape, world: int) -> str:
    other = "joint fsdp" if case.endswith("fsdp") else "shared"
    seconds = (gpu_seconds(case, shape, world) + (EVERY - 1) * gpu_seconds(other, shape, world)) / EVERY
    return f"{1e3 * seconds:,.1f} ({seconds / gpu_seconds('shared', shape, world):.1f})"


def fastest(shape: Shape, world: int) -> str:
    """Returns the fastest case with an exact Gramian that fits into a GPU; empty if none does."""
    fits = [case for case in EXACT if gpu_bytes(case, shape, world) <= SPACE]
    return min(fits, key=lambda case: gpu_seconds(case, shape, world), default="")


def _of_shape(name: str, shape: Shape) -> str:
    cases = ("shared", "representation", "rows", "layerwise", "joint fsdp", "rows fsdp")
    rows = []
    for world in WORLDS:
        best = fastest(shape, world)
        cells = [_cell(case, shape, world, best) for case in cases]
        rows.append([f"{world:,}", *cells, _every("rows", shape, world), _every("rows fsdp", shape, world)])
    head = ["GPUs", *(f"`{case}`" for case in cases), f"`rows`, every {EVERY}", f"`rows fsdp`, every {EVERY}"]
    return f"{name}:\n\n" + _table(head, rows)


def _span(values: Iterable[float]) -> str:
    values = sorted(values)
    return f"{values[0]:.1f} to {values[-1]:.1f}"


def _limits() -> str:
    rows = []
    for case in LIMITS:
        cells = [f"{largest(case, tasks, world) / 1e9:,.1f}" for tasks in (2, 8) for world in WORLDS]
        rows.append([f"`{case}`", *cells])
    head = ["", *(f"T={tasks}, {world:,} GPUs" for tasks in (2, 8) for world in WORLDS)]
    return _table(head, rows)


def _choice() -> str:
    """Returns what to choose, with figures from the tables."""
    ratios: dict[tuple[str, int, bool], list[float]] = {}
    for shape in SHAPES.values():
        for world in WORLDS:
            base = gpu_seconds("shared", shape, world)
            for case in ("rows", "representation", "rows fsdp"):
                for hierarchical in (False, True):
                    ratio = gpu_seconds(case, shape, world, hierarchical=hierarchical) / base
                    ratios.setdefault((case, world, hierarchical), []).append(ratio)
    inside, outside, last = WORLDS
    smallest = largest("rows", 8, inside) / 1e9
    return f"""## What to choose

Computed, with the assumptions above; the figures are the range over the four models.

- `representation` costs {_span(ratios["representation", inside, False])} times `shared` on {inside} GPUs and
  {_span(ratios["representation", last, False])} times on {last:,}, since its sums follow the backward pass. It balances
  the gradients at the features, not those of the parameters.
- On one node, `rows` costs {_span(ratios["rows", inside, False])} times `shared`. On {outside} GPUs the exchange
  decides: {_span(ratios["rows", outside, False])} times. Take `gradients.every={EVERY}`, `representation` or `fsdp`
  there.
- `fsdp` sums rows as NCCL does, inside of the nodes first, and hides this behind the passes. `rows fsdp` costs
  {_span(ratios["rows fsdp", inside, False])} times `shared` with replicas on {inside} GPUs and
  {_span(ratios["rows fsdp", outside, False])} times on {outside}.
- `layerwise` is exact and needs no rows, and pays only while the *whole* batch has fewer rows than a layer has inputs.
  With tokens or images that is not so from a few GPUs on, and `auto` then takes rows by itself.
- Exchanging rows between all pairs is best for gloo. If `rows` with replicas were summed inside of the nodes first, it
  would cost {_span(ratios["rows", outside, True])} times `shared` on {outside} GPUs.
- Memory: from {smallest:.1f} billion parameters and T = 8 on, {SPACE / 1e9:.0f} GB do not hold replicas with rows. The
  largest models, in billion parameters (layers of 4,096, 4,096 tokens a GPU, without checkpointing):

{_limits()}"""
