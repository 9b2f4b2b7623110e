"""Writes the page of `model_scale.py`: the fit, its errors, and what the model computes for GPUs."""

from collections.abc import Iterable
from statistics import median
from typing import Any

import model_gpus as gpus
from model_formulas import CASES, SHARDED, Shape, counts, is_layerwise, memory
from model_scale import (
    CORES,
    HELD_OUT,
    NAMES,
    NOT_FITTED,
    NUM_COMPUTING,
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
EVERY = 10
LINEAR = "Five linear layers of 8,192, 32 samples a GPU, T=8"
SHAPES = {
    "A transformer of 300 million parameters, 4,096 tokens a GPU, T=2": Shape(1024, 286, 2, 4096, 12),
    "A transformer of 300 million parameters, 4,096 tokens a GPU, T=8": Shape(1024, 286, 8, 4096, 12),
    "A transformer of 3 billion parameters, 4,096 tokens a GPU, T=8": Shape(4096, 179, 8, 4096, 12),
    LINEAR: Shape(8192, 5, 8, 32),
}
LIMITS = ("shared", "rows", "joint fsdp", "rows fsdp")
INTRODUCTION = f"""# Several processes: a model of the cost

`scripts/model_scale.py` writes this page; run it again when the step changes. It needs SciPy and a C compiler. The
model computes the time and the memory of a step with a balancer, for numbers of GPUs on which nothing was measured.
**Measured** on a CPU with {CORES} cores and gloo, in {PROCESSES[0]} to {PROCESSES[-1]} processes: the constants of the
time, and the errors of time and memory. **Computed**: everything about GPUs.

The model is a trunk of L linear layers of width d (P = L·d² parameters) with T tasks, and n samples, or tokens, in each
of W processes. `fsdp` means sharded parameters, of which g layers are gathered together; otherwise each process has all
parameters. With `fsdp`, `layerwise` takes rows, and `shared` costs as much as `joint`.

## Time

The seconds of a step are a sum of {len(NAMES)} counts, each times a constant, minus the hidden communication. The
counts of a process are

- products: floating-point operations of matrix products,
- parameters: parameters that are read, written or copied,
- rows: numbers of the rows (the tasks' gradients) that are read and written,
- calls: calls of operations,
- modules: modules that are gathered, or whose gradients are summed,
- sent: numbers that the process sends,
- rounds: messages that wait for one another.

The last two are the communication. It may run during a pass. Of the time of the communication and that of the pass's
matrix products, the shorter one times the *hidden share* is subtracted. If there are more processes than cores, the
first {NUM_COMPUTING} counts are multiplied by processes / cores. B is T for `rows`, and otherwise 1.

| | products | rows | sent | products of the pass |
|---|---|---|---|---|
| `joint`, `shared` | 2·n·d²·(3·L − 1) | 0 | 2·P·(W − 1)/W | 2·n·d²·(2·L − 1) |
| `representation` | 2·n·d²·(3·L − 1) | 0 | 2·P·(W − 1)/W | 0 |
| `rows` | 2·n·d²·(L + T·(2·L − 1)) | T·P·(1 + 1/W); T·P for W = 1 | (T + 1)·P·(W − 1)/W | 0 |
| `layerwise` | 2·n·d²·(L + T·(L − 1)) + L·C | T·L·n·W·d | L·n·(W − 1)·(1 + T)·d | 0 |
| `fsdp` | 2·n·d²·(L + B·(2·L − 1)) | T·P/W for `rows`, otherwise 0 | (1 + B + B·s)·P·(W − 1)/W | all products |

| | parameters | calls | modules | rounds |
|---|---|---|---|---|
| `joint`, `shared` | P | 12·L + 10·T | 0 | 2·(W − 1) |
| `representation` | P | 12·L + 10·T | 0 | 4·(W − 1) |
| `rows` | P | T·(10·L + 10) | 0 | 4·(W − 1) |
| `layerwise` | P | T·(8·L + 10) | 0 | (2·L + 2)·(W − 1) |
| `fsdp` | P·(1 + 2·B + 1/W) | as without `fsdp` | M = L/g·(1 + 2·B) + 3·T | (W − 1)·M |

C = 2·(n·W)²·d·(1 + T) + 2·n·W·d² are the operations for the Gramian and the combined gradient of a layer.
With `fsdp`, the parameters are gathered once for the forward pass and once for each backward pass, and the gradients
are summed after each backward pass: s is 2 with gloo and 1 with NCCL. `layerwise` applies where it needs less
arithmetic than rows, and for W > 1 only where n·W < d; otherwise these layers take `rows`.
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
are gathered and one has its whole gradient. E is the part that is sent at once: at most 8 million numbers, or a layer
if it has more. A Gramian needs at most 256 KiB a task. `layerwise` holds (L + T·L + T)·a, and with W > 1 also L·W·(1 +
T)·a, of which the part of one layer is held three times.
"""
ASSUMPTIONS = f"""
## GPUs: computed

Nothing in this section was measured. Assumptions, from the data sheets of H100 SXM, NVLink 4 and InfiniBand NDR:

| what | assumption |
|---|---|
| matrix products | {gpus.FLOPS / 1e12:.0f} Tflop/s (bf16, dense), of which {gpus.EFFICIENCY:.0%} is reached: a guess |
| memory | {gpus.MEMORY / 1e12:.2f} TB/s |
| memory in a step | 40 bytes for each parameter that a GPU stores, 8 for a gathered copy, 12 for a number of a row |
| between the {gpus.NODE} GPUs of a node | {gpus.LINK / 1e9:.0f} GB/s in each direction |
| between nodes | {gpus.NETWORK / 1e9:.0f} GB/s a GPU; a ring crosses it with 1/{gpus.NODE} of the numbers |
| `rows` between nodes | each pair of GPUs exchanges what it needs, so that (W − {gpus.NODE})/W of the numbers cross |
| a call, a message | {gpus.CALL * 1e6:.0f} µs each: guesses; messages grow with log2 W |
| a module of `fsdp` | {gpus.CALLS_OF_MODULE} calls to gather it, or to sum its gradients: a guess |
| modules | g = 12 layers in a transformer, otherwise 1 |
| data types | 4 bytes a number, sent or stored; AdamW |
| overlap | all communication that may be hidden is hidden, as far as the passes last |
| activations | one output a layer |

The seconds of a step are max(products + memory, calls) + communication − hidden communication, where each name is a
time that follows from the counts above and the assumptions. The time of the communication is max(all numbers sent, at
the rate inside of a node; the crossing numbers, at the rate between nodes) + the messages. There are log2 W messages
one after another for each module of `fsdp`, and 4·log2 W without `fsdp`.
"""


def page(measured: Measured) -> str:
    """Returns the page in Markdown."""
    model = fit(measured.seconds)
    parts = [INTRODUCTION, _constants(model), _of_time(measured, model), MEMORY_TEXT, _of_memory(measured)]
    tables = [_of_shape(name, shape) for name, shape in SHAPES.items()]
    computed = _computed(measured.seconds, model.seconds)
    worst = max(errors(measured.seconds, computed, measured.seconds))
    return "\n".join([*parts, ASSUMPTIONS.strip(), "", _cells(model.hidden, worst), *tables, _choice()])


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


def _cells(hidden: tuple[float, float], worst: float) -> str:
    """Returns how to read the tables, from the fitted hidden shares and the largest error of the time."""
    slower = {
        case: _span(
            gpus.seconds(case, shape, world, overlap=0.0) / gpus.seconds(case, shape, world)
            for shape in SHAPES.values()
            for world in WORLDS
        )
        for case in ("shared", "joint fsdp", "rows fsdp")
    }
    return f"""**These times are optimistic.** No other program uses the network, no GPU waits for a slower one, and the
overlap is perfect, while the hidden share that was fitted on this CPU is {hidden[0]:.0%} for replicas and
{hidden[1]:.0%} with `fsdp`. If nothing were hidden, a step would take {slower["shared"]} times as long for `shared`,
{slower["joint fsdp"]} times for `joint fsdp` and {slower["rows fsdp"]} times for `rows fsdp`; for the other
cases, nothing is hidden in the tables either. Only the calls of a module are assumed to cost more than the fit
found. On this CPU, the time of a step was off by up to {worst:.0%}; how far it is off on GPUs is not known.

Each cell has the milliseconds of a step, in brackets the multiple of the time of `shared` at the same size, and the GB
of a GPU: parameters, AdamW's state and the formulas above. **Bold**: the fastest exact Gramian in each step that fits
into {gpus.SPACE / 1e9:.0f} GB. *Every {EVERY}*: `gradients.every={EVERY}`, the mean time of a step. The samples of
a GPU stay the same in number, so that the batch grows with W.
"""


def _of_memory(measured: Measured) -> str:
    return (
        "The errors. Measured is the process's heap, counted at each allocation, gloo's buffers included, in the same "
        "steps as the time.\n\n" + _errors(measured.memory, _computed(measured.memory, memory))
    )


def _cell(case: str, shape: Shape, world: int, fastest: str) -> str:
    if case == "layerwise" and not is_layerwise(shape, world):
        return "as `rows`"
    seconds, base = gpus.seconds(case, shape, world), gpus.seconds("shared", shape, world)
    size = gpus.num_bytes(case, shape, world) / 1e9
    text = f"{1e3 * seconds:,.1f} ({seconds / base:.1f}), {size:,.1f} GB"
    return f"**{text}**" if case == fastest else text


def _every(case: str, shape: Shape, world: int) -> str:
    other = "joint fsdp" if case.endswith("fsdp") else "shared"
    seconds = (gpus.seconds(case, shape, world) + (EVERY - 1) * gpus.seconds(other, shape, world)) / EVERY
    return f"{1e3 * seconds:,.1f} ({seconds / gpus.seconds('shared', shape, world):.1f})"


def _of_shape(name: str, shape: Shape) -> str:
    cases = ("shared", "representation", "rows", "layerwise", "joint fsdp", "rows fsdp")
    rows = []
    for world in WORLDS:
        best = gpus.fastest(shape, world)
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
        cells = [f"{gpus.largest(case, tasks, world) / 1e9:,.1f}" for tasks in (2, 8) for world in WORLDS]
        rows.append([f"`{case}`", *cells])
    head = ["", *(f"T={tasks}, {world:,} GPUs" for tasks in (2, 8) for world in WORLDS)]
    return _table(head, rows)


def _choice() -> str:
    """Returns what to choose, with figures from the tables."""
    ratios: dict[tuple[str, int, bool], list[float]] = {}
    for shape in SHAPES.values():
        for world in WORLDS:
            base = gpus.seconds("shared", shape, world)
            for case in ("rows", "representation", "rows fsdp"):
                for hierarchical in (False, True):
                    ratio = gpus.seconds(case, shape, world, hierarchical=hierarchical) / base
                    ratios.setdefault((case, world, hierarchical), []).append(ratio)
    inside, outside, last = WORLDS
    sharded, of_more = (_span(ratios["rows fsdp", world, False]) for world in (inside, outside))
    of_more = "as much" if of_more == sharded else f"{of_more} times"
    smallest = gpus.largest("rows", 8, inside) / 1e9
    return f"""## What to choose

Computed, with the assumptions above; the figures are the range over the four models.

- `representation` costs {_span(ratios["representation", inside, False])} times `shared` on {inside} GPUs and
  {_span(ratios["representation", last, False])} times on {last:,}, since its sums follow the backward pass. It balances
  the gradients at the features, not those of the parameters.
- On one node, `rows` costs {_span(ratios["rows", inside, False])} times `shared`. On {outside} GPUs the exchange
  decides: {_span(ratios["rows", outside, False])} times. Take `gradients.every={EVERY}`, `representation` or `fsdp`
  there.
- `fsdp` sums rows as NCCL does, inside of the nodes first, and hides this behind the passes. `rows fsdp` costs
  {sharded} times `shared` with replicas on {inside} GPUs, and {of_more} on {outside}.
- `layerwise` is exact and needs no rows. It pays only while the *whole* batch has fewer samples, or tokens, than a
  layer has inputs. With tokens or images, a few GPUs already have more, and `auto` then takes rows by itself. For the
  five linear layers on {inside} GPUs it is faster than `shared`, although `shared` does not balance: with
  {SHAPES[LINEAR].samples} samples a GPU, the inputs and output gradients of a layer, which `layerwise` sends, are fewer
  numbers than the gradient of its weights, which `shared` sends. Each GPU computes the combined gradient from them.
- Exchanging rows between all pairs is best for gloo. If `rows` with replicas were summed inside of the nodes first, it
  would cost {_span(ratios["rows", outside, True])} times `shared` on {outside} GPUs.
- Memory: from {smallest:.1f} billion parameters and T = 8 on, {gpus.SPACE / 1e9:.0f} GB do not hold replicas with rows.
  The largest models, in billion parameters (layers of 4,096, 4,096 tokens a GPU, without checkpointing):

{_limits()}"""
