"""Linear layers whose inputs and output gradients are gathered from all processes, in place of rows.

The inner product of two tasks' weight gradients has terms between samples of different processes. Rows contain these
terms once they are summed over the processes: (T + 1)·d_in·d_out numbers for T tasks and the combined gradient. If the
processes exchange the layer's inputs (N, d_in) and the gradients at its outputs (N, d_out) of each task instead, then
N·(d_in + T·d_out) numbers cross, and each process computes the same Gramian and the same gradient of the weight. The
rule that chooses the smaller number uses only shapes that all processes know.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.distributed.collectives import gather_numbers, gather_rows
from mtl.gradients.layerwise import Layer, Product


def choose(layers: Sequence[Layer], parameters: Sequence[Tensor], num_tasks: int, *, is_empty: bool) -> list[Product]:
    """Chooses the layers that are gathered; all processes choose the same ones.

    Args:
        layers: The layers that were found in the graph of this process.
        parameters: All parameters, in the same order in all processes.
        num_tasks: The number of tasks in the step.
        is_empty: Whether this process has no samples in the step, and therefore no graph.

    Returns:
        The layers, with inputs of this process only if it has samples.
    """
    index = {parameter: number for number, parameter in enumerate(parameters)}
    ours = {index[layer.parameters[0]]: layer for layer in layers if isinstance(layer, Product) and not layer.window}
    found: list[float] = []
    for number in range(len(parameters)):
        layer = ours.get(number)
        kind = _kind(layer, index) if layer is not None else 0
        found += [len(layer.inputs) if layer is not None else 0, layer is not None, kind, kind**2]
    by_rank = gather_numbers([*found, not is_empty])
    *summed, num_graphs = (sum(numbers) for numbers in zip(*by_rank, strict=True))
    chosen = []
    for number, weight in enumerate(parameters):
        num_rows, count, kinds, squares = summed[4 * number : 4 * number + 4]
        if not count or count != num_graphs or squares * count != kinds**2:  # not the same layer in all graphs
            continue
        bias, flipped = divmod(round(kinds / count) - 1, 2)
        layer = Product(
            _NO_EDGE, [weight, *parameters[bias - 1 : bias]] if bias else [weight], _NO_INPUTS, None, flipped > 0
        )
        d_out = weight.shape[1 if flipped else 0]
        crossing = num_rows * (weight.numel() // d_out + num_tasks * d_out)
        if crossing < (num_tasks + 1) * weight.numel() and layer.pays(num_tasks, round(num_rows)):
            layer = ours.get(number, layer)
            layer.counts = [round(numbers[4 * number]) for numbers in by_rank]
            chosen.append(layer)
    return chosen


def gather(layer: Product, deltas: Sequence[Tensor | None]) -> tuple[Product, list[Tensor]]:
    """Gathers a layer from all processes.

    Args:
        layer: The layer, with the inputs of this process.
        deltas: For each task, the gradient at the layer's outputs in this process; None for zeros.

    Returns:
        The layer with the inputs of all processes, and the gradients at its outputs, one tensor for each task.
    """
    weight = layer.parameters[0]
    d_out = weight.shape[1 if layer.flipped else 0]
    d_in = weight.numel() // d_out
    inputs = layer.inputs.to(weight).reshape(-1, d_in).detach()
    zeros = inputs.new_zeros(len(inputs), d_out)
    pieces = [inputs, *(zeros if delta is None else delta.to(weight.dtype) for delta in deltas)]
    inputs, *rest = torch.split(
        gather_rows(torch.cat(pieces, dim=1), layer.counts), [d_in, *[d_out] * len(deltas)], dim=1
    )
    return Product(layer.edge, layer.parameters, inputs, None, layer.flipped), rest


_NO_EDGE: Any = None  # a process without samples has no graph
_NO_INPUTS = torch.empty(0)


def _kind(layer: Product, index: dict[Tensor, int]) -> int:
    """Returns a number that distinguishes layers with different biases, or with transposed weights."""
    bias = index[layer.parameters[1]] + 1 if len(layer.parameters) == 2 else 0
    return 1 + 2 * bias + layer.flipped
