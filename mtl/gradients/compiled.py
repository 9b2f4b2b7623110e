"""Several backward passes through modules compiled by `torch.compile`, as measuring and balancing need.

A compiled backward pass may overwrite the tensors that its forward pass saved ("donated buffers"), so that a second
backward pass would compute with wrong values. A setting of the process at the time of compilation decides whether it
does, see `reusable_graphs` in step/step.py.
"""

from typing import Any

from mtl.errors import UserError


def check_reusable(node: Any) -> None:
    """Checks that a compiled node of an autograd graph allows several backward passes.

    Raises:
        UserError: If the node was compiled with donated buffers.
    """
    metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
    if getattr(metadata, "bw_donated_idxs", None):
        raise UserError(
            "a module was compiled by torch.compile and ran a training forward pass before mtl.Step was created, so "
            "that its gradients can be taken only once, and measuring and balancing take them several times; call "
            "torch.compiler.reset() before the first step, which compiles it anew"
        )
    if metadata is not None:
        # On a GPU a backward pass runs in a thread that doesn't see the setting, and would take None for "unknown".
        metadata.bw_donated_idxs = []
