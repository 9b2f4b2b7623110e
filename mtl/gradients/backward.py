"""Gradients of tensors of a graph at its leaves, without a change of `.grad`, and norms of gradients."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mtl.distributed.collectives import sum_over_processes
from mtl.distributed.sharding import is_sharded, local, num_replicas
from mtl.gradients.leaves import leaves


def gradients_at(outputs: Sequence[Tensor], starts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns a list of pairs (leaf, gradient) for all leaf tensors on which `outputs` depend; the graph is retained.

    The gradient of a sharded parameter is this process's part of the sum over all processes.
    """
    reached = leaves(outputs)
    if not reached:
        return []
    if any(is_sharded(leaf) for leaf in reached):
        return sharded_gradients_at(reached, outputs, starts, retain_graph=True)
    results = torch.autograd.grad(outputs, reached, starts, retain_graph=True, allow_unused=True)
    return [(leaf, g) for leaf, g in zip(reached, results, strict=True) if g is not None]


def sharded_gradients_at(
    reached: Sequence[Tensor], outputs: Sequence[Tensor], starts: Sequence[Tensor], *, retain_graph: bool
) -> list[tuple[Tensor, Tensor]]:
    """Returns pairs of a leaf tensor and its gradient, of which this process has a part if the leaf is sharded.

    FSDP2 sums gradients over the processes only where a backward pass leaves them in `.grad`.
    """
    before = [leaf.grad for leaf in reached]
    for leaf in reached:
        leaf.grad = None
    torch.autograd.backward(outputs, starts, retain_graph=retain_graph)
    pairs = [(leaf, local(leaf.grad)) for leaf in reached if leaf.grad is not None]
    for leaf, gradient in zip(reached, before, strict=True):
        leaf.grad = gradient
    return pairs


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the norm of all gradients in `.grad`, a 0-dim tensor; parameters without a gradient are left out."""
    parameters = list(parameters)
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    sharded = is_sharded(parameters[0])
    if not gradients and not sharded:
        return torch.zeros((), device=parameters[0].device)
    norm = get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
    if not sharded:
        return norm
    return (sum_over_processes(norm.double().square()) / num_replicas(parameters)).sqrt()


def clip(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Multiplies all gradients in `.grad` so that their norm, which is now `norm`, is at most about `limit`."""
    parameters = list(parameters)
    if not is_sharded(parameters[0]):
        clip_grads_with_norm_(parameters, limit, norm)
        return
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            part = local(parameter.grad)
            part.mul_(factor.to(part.dtype))
