"""Several backward passes through modules compiled by `torch.compile`, as measuring and balancing need.

A compiled backward pass may overwrite the tensors that its forward pass saved ("donated buffers"), so that a second
backward pass would compute with wrong values. A setting of the process at the time of compilation decides whether it
does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch._functorch.config as functorch
import torch.compiler.config as compiler

from mtl.errors import UserError

SETTINGS: list[tuple[Any, str, Any]] = [
    (functorch, "donated_buffer", False),
    # Otherwise the backward pass is compiled when it runs first, on a GPU in a thread that doesn't see these settings.
    (functorch, "force_non_lazy_backward_lowering", True),
    # The key of Inductor's cache on disk lacks `donated_buffer`: without a tag, the cache may return code that
    # overwrites what was saved, and the second backward pass would silently be wrong.
    (compiler, "cache_key_tag", "several backward passes"),
]


@contextmanager
def reusable_graphs() -> Iterator[None]:
    """Makes torch.compile keep the tensors saved for backward, since a step may run several backward passes."""
    before = [(module, name, getattr(module, name)) for module, name, _ in SETTINGS if hasattr(module, name)]
    try:
        for module, name, value in SETTINGS:
            if hasattr(module, name):
                setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


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
