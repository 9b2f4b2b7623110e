"""Buffers, such as batch norm's statistics, kept as they were while a pass is made once more."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import is_lazy


class Buffers:
    """The values of all of a module's buffers, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        # By owner and name: a forward pass may put another tensor in a buffer's place.
        owned = [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
        self._kept = [(m, name, buffer, buffer.clone()) for m, name, buffer in owned if not is_lazy(buffer)]

    def restore(self) -> None:
        """Puts the values back, in the tensors that held them."""
        for module, name, buffer, value in self._kept:
            buffer.data.copy_(value)  # through .data, since a graph that is alive may have saved an unchanged buffer
            module._buffers[name] = buffer


@contextmanager
def kept_buffers(model: nn.Module, *, kept: bool = True) -> Iterator[None]:
    """Undoes what a further pass does to buffers: activation checkpointing runs forward passes in a backward."""
    buffers = Buffers(model) if kept else None
    yield
    if buffers is not None:
        buffers.restore()
