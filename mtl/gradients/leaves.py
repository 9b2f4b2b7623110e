"""The leaf tensors of an autograd graph."""

from collections.abc import Iterable

from torch import Tensor

from mtl.distributed.sharding import source_of
from mtl.errors import UserError
from mtl.gradients.compiled import check_reusable


def leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the leaf tensors that would get a gradient in a backward pass from `tensors`.

    Parameters that a sharded module has gathered are replaced by the model's own parameters.

    Raises:
        UserError: If re-entrant checkpointing hides a part of the graph, or if a compiled module allows only one
            backward pass.
    """
    reached: dict[Tensor, None] = {}
    stack = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            stack.append(tensor.grad_fn)
        elif tensor.requires_grad:
            reached[tensor] = None
    seen = set(stack)
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            reached[source_of(node.variable)] = None
        elif node.name() == "CheckpointFunctionBackward":
            raise UserError(
                "re-entrant activation checkpointing hides the parameters behind it; "
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        elif node.name() == "CompiledFunctionBackward":
            check_reusable(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return list(reached)
