"""Which task reaches which parameter, and the tasks' gradients: norms and cosines."""

from collections.abc import Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from mtl.errors import UserError

COLUMNS = 16_384  # how much of the rows is summed at once in float64


def leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that a backward pass from `tensors` would give a gradient.

    Raises:
        UserError: where re-entrant checkpointing hides what lies behind it.
    """
    found: dict[Tensor, None] = {}
    stack = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            stack.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found[tensor] = None
    seen = set(stack)
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            found[node.variable] = None
        elif node.name() == "CheckpointFunctionBackward":
            raise UserError(
                "re-entrant activation checkpointing hides the parameters behind it; "
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return list(found)


def gramian(rows: list[list[Tensor | None]]) -> Tensor:
    """G Gᵀ, shape (T, T), float64, of T rows that are each given in the same P pieces; None stands for zeros.

    Summed in float64 over chunks of columns: a plain float32 product over 11 M columns is off by up to 1 %.
    """
    total: Tensor | None = None
    for pieces in zip(*rows, strict=True):
        present = next(piece for piece in pieces if piece is not None)
        flat = [piece.reshape(-1) if piece is not None else None for piece in pieces]
        for start in range(0, present.numel(), COLUMNS):
            end = min(start + COLUMNS, present.numel())
            chunk = torch.zeros(len(rows), end - start, dtype=torch.float64, device=present.device)
            for row, piece in zip(chunk, flat, strict=True):
                if piece is not None:
                    row.copy_(piece[start:end])
            product = chunk @ chunk.T
            total = product if total is None else total + product
    assert total is not None
    return total


class Measurement:
    """Gradient norms and cosines of the tasks in one step, and which task reaches which parameter.

    The gradients are taken by `torch.autograd.grad`, beside the training's own backward passes, which find graph,
    `.grad` and random state as they would have without it.

    Args:
        parameters: what is measured, by name.
        scale: what the losses that `add` is given are multiplied by before they go backward, and the results
            divided by, so that half-precision gradients don't underflow.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, scale: float = 1.0) -> None:
        self._parameters = parameters
        self._scale = scale
        self._gradients: dict[str, dict[Tensor, Tensor]] = {}

    def add(self, task: str, loss: Tensor, cuts: Mapping[Tensor, Tensor] | None = None) -> None:
        """Measures one task, while its graph is alive, and keeps the graph.

        Args:
            task: its name.
            loss: its unweighted loss.
            cuts: where the graph was cut at the features: from each detached tensor to the one it stands for.
        """
        gradients: dict[Tensor, Tensor] = {}
        self._gradients[task] = gradients
        features, at_features = [], []
        for leaf, gradient in _gradients_at([loss], [torch.full_like(loss, self._scale)]):
            if cuts and leaf in cuts:
                features.append(cuts[leaf])
                at_features.append(gradient)
            else:
                gradients[leaf] = gradient
        for leaf, gradient in _gradients_at(features, at_features):
            gradients[leaf] = gradients[leaf] + gradient if leaf in gradients else gradient

    def reach(self) -> dict[str, tuple[str, ...]]:
        """From each parameter's name, in the model's order, to the tasks whose losses reach it."""
        return {
            name: tuple(task for task, gradients in self._gradients.items() if parameter in gradients)
            for name, parameter in self._parameters.items()
        }

    def norms(self) -> dict[str, Tensor]:
        """Each task's gradient norm over all the parameters it reaches, 0-dim float64."""
        return {
            task: _norm([gradients[p] for p in self._parameters.values() if p in gradients]) / self._scale
            for task, gradients in self._gradients.items()
        }

    def cosines(self) -> dict[tuple[str, str], Tensor]:
        """The cosine between two tasks' gradients over the shared parameters, 0-dim float64, by pair of names.

        A parameter is shared if at least two tasks reach it. A pair that has none in common has no cosine; one of
        which a gradient is zero has NaN.
        """
        tasks = list(self._gradients)
        reached = {task: set(gradients) for task, gradients in self._gradients.items()}
        shared = [p for p in self._parameters.values() if sum(p in r for r in reached.values()) > 1]
        if not shared:
            return {}
        products = gramian([[self._gradients[task].get(p) for p in shared] for task in tasks])
        norms = products.diagonal().sqrt()
        return {
            (a, b): products[i, j] / (norms[i] * norms[j])
            for (i, a), (j, b) in combinations(enumerate(tasks), 2)
            if any(p in reached[a] and p in reached[b] for p in shared)
        }


def _gradients_at(outputs: list[Tensor], gradients: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Every leaf that `outputs` reach, with its gradient."""
    reached = leaves(outputs)
    if not reached:
        return []
    found = torch.autograd.grad(outputs, reached, gradients, retain_graph=True, allow_unused=True)
    return [(leaf, g) for leaf, g in zip(reached, found, strict=True) if g is not None]


def _norm(tensors: list[Tensor]) -> Tensor:
    squares = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(squares)) if squares else torch.zeros((), dtype=torch.float64)
