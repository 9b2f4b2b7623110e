"""What `torch.compile` compiles goes backward several times, as measuring and balancing do.

A compiled backward pass may give up the memory of what its forward pass saved ("donated buffers"). Whether it does is
decided where the forward pass is compiled, by a setting of the process; a second backward pass of such a graph then
works on memory that was written over.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch._functorch.config as functorch

from mtl.errors import UserError


@contextmanager
def reusable_graphs() -> Iterator[None]:
    """What is compiled within gives up nothing; afterwards the setting is the process's own again."""
    before = functorch.donated_buffer
    functorch.donated_buffer = False
    try:
        yield
    finally:
        functorch.donated_buffer = before


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
