"""Layers for which the Gramian can be computed without the gradients of the weights.

The weight gradient of a linear layer is δᵀa, where a (N, d_in) are the layer's inputs and δ (N, d_out) is the gradient
of the loss at the layer's outputs. With the QR decomposition aᵀ = QR, the matrix Rδ has the same inner products as aᵀδ
and is no larger than δ, so that Rδ replaces this piece of the row. For a convolution, a consists of patches of the
inputs; for an embedding, δ is summed over equal indices. Once the balancer's weights are known, Σ w_t δ_t gives the
weight gradient of the weighted sum in one product.

That inner products of gradients need only a and δ is known from per-sample gradient norms: Goodfellow,
arXiv 1510.01799; Bu et al., arXiv 2205.10683.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

# The cost of each element of a row, in units of one multiplication and addition of a matrix product: an element is
# written, read for the Gramian in float64, and read again for the combination.
PER_ELEMENT = 60


class Layer(ABC):
    """One use of a layer's parameters in the graph.

    Attributes:
        edge: The edge of the graph at which autograd gives the gradient at the layer's outputs.
        parameters: The leaf tensors that nothing else in the graph uses; the first is the weight.
    """

    edge: GradientEdge
    parameters: list[Tensor]

    @abstractmethod
    def compress(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Returns, for the tasks' gradients at the outputs, tensors with the inner products of the row pieces."""

    @abstractmethod
    def gradients(self, delta: Tensor) -> list[Tensor]:
        """Computes the gradients of the parameters from the gradient at the outputs."""


@dataclass
class Product(Layer):
    """One use of a linear layer or a convolution in the graph, with its inputs.

    Args:
        edge, parameters: See `Layer`; the second parameter, if there is one, is the bias.
        inputs: The inputs, of shape (N, d_in), or (N, C, *) for a convolution.
        window: Kernel size, dilation, padding and stride of a convolution; None for a linear layer.
        flipped: Whether the weight has shape (d_in, d_out) instead of (d_out, d_in).
        counts: By process, the number of inputs, if the layer is gathered from all processes.
    """

    edge: GradientEdge
    parameters: list[Tensor]
    inputs: Tensor
    window: tuple[tuple[int, ...], ...] | None = None
    flipped: bool = False
    counts: Sequence[int] = ()

    def pays(self, num_tasks: int, num_rows: int) -> bool:
        """Returns whether the compressed tensors need less arithmetic than the weight gradients of all tasks.

        Args:
            num_tasks: The number of tasks.
            num_rows: N or, for a convolution, the number of samples times the number of output positions.
        """
        size = self.parameters[0].numel()
        d_out = self.parameters[0].shape[1 if self.flipped else 0]
        d_in = size // d_out
        if num_rows > d_in:
            return False
        compressed = 2 * num_rows**2 * d_in + num_tasks * num_rows * d_out * (num_rows + PER_ELEMENT) + num_rows * size
        return compressed < num_tasks * size * (num_rows + PER_ELEMENT)

    def compress(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Returns Rδ for each δ."""
        inputs = self._rows_in()
        if len(self.parameters) == 2:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)  # the bias is a weight for input 1
        factor = torch.linalg.qr(inputs.T, mode="r").R
        return [factor @ self._rows_out(delta) for delta in deltas]

    def gradients(self, delta: Tensor) -> list[Tensor]:
        """Returns the weight gradient δᵀa and, for the bias, the sum of δ over the rows."""
        rows = self._rows_out(delta)
        weight = self._rows_in().T @ rows if self.flipped else rows.T @ self._rows_in()
        gradients = [weight.view(self.parameters[0].shape), rows.sum(0)][: len(self.parameters)]
        return [gradient.to(p.dtype) for gradient, p in zip(gradients, self.parameters, strict=True)]

    def _rows_in(self) -> Tensor:
        if self.window is None:
            return _at_least_single(self.inputs)
        patches: Tensor = F.unfold(_plane(_at_least_single(self.inputs)), *self.window)
        return patches.transpose(1, 2).flatten(0, 1)

    def _rows_out(self, delta: Tensor) -> Tensor:
        delta = _at_least_single(delta)
        return delta if self.window is None else delta.movedim(1, -1).flatten(0, -2)


@dataclass
class Lookup(Layer):
    """An embedding with dense gradients."""

    edge: GradientEdge
    parameters: list[Tensor]
    indices: Tensor
    padding: int

    def compress(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums of δ over equal indices, for each δ."""
        touched, place = torch.unique(self.indices.flatten(), return_inverse=True)
        is_not_padding = (touched != self.padding).unsqueeze(1)
        return [
            torch.zeros(len(touched), delta.shape[-1], dtype=delta.dtype, device=delta.device).index_add_(
                0, place, delta.reshape(-1, delta.shape[-1])
            )
            * is_not_padding
            for delta in deltas
        ]

    def gradients(self, delta: Tensor) -> list[Tensor]:
        """Returns the gradient of the embedding's weight."""
        (weight,) = self.parameters
        gradient = torch.zeros_like(weight).index_add_(
            0, self.indices.flatten(), delta.reshape(-1, delta.shape[-1]).to(weight.dtype)
        )
        if self.padding >= 0:
            gradient[self.padding] = 0
        return [gradient]


def find(features: Sequence[Tensor], num_tasks: int | None) -> list[Layer]:
    """Finds the layers in the graph of `features` that can be compressed with a benefit for this number of tasks.

    With None, whether there is a benefit isn't considered.

    A layer can be compressed if the weight is a leaf that only one operation uses, and the operation has saved its
    inputs.
    """
    users, degree = _users(features)
    layers: list[Layer] = []
    for node, name in users:
        layer = _LAYER_BUILDERS[name](node, degree)
        pays = num_tasks is None or not isinstance(layer, Product) or layer.pays(num_tasks, _num_rows(layer, node))
        if layer is not None and pays:
            layers.append(layer)
    return layers


def _users(features: Sequence[Tensor]) -> tuple[list[tuple[Any, str]], Counter[Any]]:
    """Returns the nodes of supported operations, and the number of edges that lead to each node of the graph."""
    start = list(dict.fromkeys(f.grad_fn for f in features if f.grad_fn is not None))
    degree: Counter[Any] = Counter(get_gradient_edge(f).node for f in features)  # a weight may be a feature itself
    users, stack, seen = [], list(start), set(start)
    while stack:
        node: Any = stack.pop()
        name = node.name()
        if name in _LAYER_BUILDERS:
            users.append((node, name))
        for following, _ in node.next_functions:
            if following is None:
                continue
            degree[following] += 1
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return users, degree


def _leaf(node: Any, degree: Counter[Any], through: tuple[str, ...]) -> tuple[Tensor | None, bool]:
    """Returns the leaf behind a node, through casts and views, and whether it is transposed.

    The leaf is None if another operation uses it as well.
    """
    viewed = False
    while node is not None and degree[node] == 1:
        if hasattr(node, "variable"):
            leaf: Tensor = node.variable
            excluded = leaf._backward_hooks or leaf.is_complex()  # a hook has to see the gradient of each task
            return (None if excluded else leaf), viewed
        if node.name() not in through:
            break
        viewed ^= node.name() == "TBackward0"
        node = node.next_functions[0][0]
    return None, False


_CAST = ("ToCopyBackward0",)


def _linear(node: Any, degree: Counter[Any]) -> Layer | None:
    with_bias = node.name() == "AddmmBackward0"
    edges = [edge for edge, _ in node.next_functions]
    weight, viewed = _leaf(edges[-1], degree, (*_CAST, "TBackward0"))
    if weight is None or weight.ndim != 2 or (with_bias and (node._saved_alpha != 1 or node._saved_beta != 1)):
        return None
    parameters = [weight]
    if with_bias and edges[0] is not None:
        bias, _ = _leaf(edges[0], degree, _CAST)
        if bias is not None and bias.shape == (weight.shape[0 if viewed else 1],):
            parameters.append(bias)
    inputs = node._saved_mat1 if with_bias else node._saved_self
    return Product(GradientEdge(node, 0), parameters, inputs.detach(), flipped=not viewed)


def _convolution(node: Any, degree: Counter[Any]) -> Layer | None:
    edges = [edge for edge, _ in node.next_functions]
    weight, _ = _leaf(edges[1], degree, _CAST)
    if weight is None or node._saved_transposed or node._saved_groups != 1 or weight.ndim not in (3, 4):
        return None
    parameters = [weight]
    if edges[2] is not None:
        bias, _ = _leaf(edges[2], degree, _CAST)
        parameters += [] if bias is None else [bias]
    line = weight.ndim == 3  # a convolution along a line is one over a plane of height 1
    window = tuple(
        (first, *sizes) if line else tuple(sizes)
        for first, sizes in (
            (1, weight.shape[2:]),
            (1, node._saved_dilation),
            (0, node._saved_padding),
            (1, node._saved_stride),
        )
    )
    return Product(GradientEdge(node, 0), parameters, node._saved_input.detach(), window)


def _embedding(node: Any, degree: Counter[Any]) -> Layer | None:
    weight, _ = _leaf(node.next_functions[0][0], degree, ())
    if weight is None or node._saved_sparse or node._saved_scale_grad_by_freq:
        return None
    padding = node._saved_padding_idx
    return Lookup(GradientEdge(node, 0), [weight], node._saved_indices, padding if 0 <= padding < len(weight) else -1)


_LAYER_BUILDERS = {
    "AddmmBackward0": _linear,
    "MmBackward0": _linear,
    "ConvolutionBackward0": _convolution,
    "EmbeddingBackward0": _embedding,
}


def _num_rows(layer: Product, node: Any) -> int:
    if layer.window is None:
        return len(layer.inputs)
    positions = 1
    for size, kernel, dilation, padding, stride in zip(_plane(layer.inputs).shape[2:], *layer.window, strict=True):
        positions *= (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return len(layer.inputs) * positions


def _plane(images: Tensor) -> Tensor:
    return images.unsqueeze(2) if images.ndim == 3 else images


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
