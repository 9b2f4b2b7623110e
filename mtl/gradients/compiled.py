"""What `torch.compile` compiles goes backward several times, as measuring and balancing do.

A compiled backward pass may give up the memory of what its forward pass saved ("donated buffers"). Whether it does is
decided where the forward pass is compiled, by a setting of the process, see `reusable_graphs` in step/step.py; a second
backward pass of such a graph would work on memory that was written over.
"""

from typing import Any

from mtl.errors import UserError


def check_reusable(node: Any) -> None:
    """Called with a compiled node of an autograd graph that is to go backward several times.

    Raises:
        UserError: for one that was compiled elsewhere, and gives up what it saved.
    """
    metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
    if getattr(metadata, "bw_donated_idxs", None):
        raise UserError(
            "a module was compiled by torch.compile and went forward for training before the step had it, so that its "
            "gradients can be taken only once, and measuring and balancing take them several times; call "
            "torch.compiler.reset() before the first step, which compiles it anew"
        )
    if metadata is not None:
        # On a GPU a backward pass runs in a thread that doesn't see the setting, and would take None for "unknown".
        metadata.bw_donated_idxs = []
