"""Activation checkpointing: modules that run forward again in the backward pass instead of storing activations."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtl.errors import UserError
from mtl.snapshots import Buffers


def recompute(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Makes modules of a model store only their inputs for the backward pass, which computes their activations again.

    Gradients, random state and buffers are those without recomputation. The forward method of each module is replaced.

    Args:
        model: The model, which is changed.
        patterns: Names of modules, with the wildcards `*` and `?`, such as `trunk.layer*`.

    Returns:
        The names of the modules.

    Raises:
        UserError: If no module matches a pattern.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    matched: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = {name: module for name, module in modules.items() if fnmatchcase(name, pattern)}
        if not hits:
            raise UserError(f"model.checkpoint: no module matches '{pattern}'; the modules are: {', '.join(modules)}")
        matched |= hits
    for module in matched.values():
        module.forward = _checkpointed(module, module.forward)
    return list(matched)


def _checkpointed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[None], "PreservedBuffers"]:
        return nullcontext(), PreservedBuffers(module)  # the running statistics of batch norm move once

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # compiled graphs change buffers once
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return recomputed


class PreservedBuffers:
    """A context manager that restores the buffers of a module; each backward pass through a graph enters it again."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._buffers = Buffers(self._module)

    def __exit__(self, *_: object) -> None:
        self._buffers.restore()
