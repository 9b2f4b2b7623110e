"""The memory over a step: how many bytes autograd has saved for backward passes after each forward and backward.

The count includes the memory of all tensors that a graph has saved and not yet released. Each storage counts once and
in full, however many tensors or graphs share it, and even if a tensor uses only a part of it. Not included are
parameters, buffers and the batch; gradients, a balancer's rows and the optimizer's state; temporary memory of
operations; and what activation checkpointing recomputes in the backward, except the inputs that it saves.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mtl.graphs.watched import Phase, Watcher


@dataclass(frozen=True)
class Event:
    """The memory held for the backward pass at the end of a phase.

    Attributes:
        phase: The phase.
        alive: The number of bytes at the end of the phase.
        peak: The largest number of bytes within the phase.
        start, end: The range of the phase in `Life.ticks`, from the first tick after the start to the tick at the end.
    """

    phase: Phase
    alive: int
    peak: int
    start: int
    end: int


class Life(Watcher):
    """Counts the memory that autograd saves and releases within the block `counting`.

    Args:
        anyway: Tensors that aren't counted, because they exist independently of the graph.

    Attributes:
        ticks: The number of bytes after each saved or released tensor, beginning with 0.
        events: The finished phases.
    """

    def __init__(self, anyway: Iterable[Tensor]) -> None:
        self._anyway = {place for tensor in anyway for place, _ in storages(tensor)}
        self._holders: dict[int, int] = {}  # the number of saved tensors in each storage
        self._alive = 0
        self.ticks = [0]
        self.events: list[Event] = []

    @property
    def peak(self) -> int:
        """The largest number of bytes that were alive."""
        return max(self.ticks)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the bytes that autograd saves for the backward pass within the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def begin(self, phase: Phase) -> None:
        """Records an event for what happened since the last phase, if anything did."""
        self._note(Phase(phase.micro_batch, "between", ()))

    def finish(self) -> None:
        """Records an event for what happened after the last phase, if anything did."""
        self._note(Phase(self.events[-1].phase.micro_batch if self.events else 1, "between", ()))

    def end(self, phase: Phase) -> None:
        """Records the event of a phase; a phase of the trunk without any change is ignored."""
        self._note(phase, always=bool(phase.of))

    def _note(self, phase: Phase, *, always: bool = False) -> None:
        start, end = self.events[-1].end if self.events else 0, len(self.ticks) - 1
        if always or end > start:
            self.events.append(Event(phase, self._alive, max(self.ticks[start:]), start, end))

    def _pack(self, tensor: Tensor) -> "_Saved":
        return _Saved(self, tensor.detach())  # a tensor with a graph would keep the graph alive

    def change(self, tensor: Tensor, holders: int) -> None:
        """Counts one more or one less saved tensor in the tensor's storage."""
        for place, size in storages(tensor):
            before = self._holders.get(place, 0)
            if place in self._anyway or not size:
                continue
            self._holders[place] = before + holders
            if not before or not self._holders[place]:
                self._alive += size * holders
                self.ticks.append(self._alive)
            if not self._holders[place]:
                del self._holders[place]


class _Saved:
    """A tensor that autograd has saved; it is deleted when autograd releases it."""

    __slots__ = ("life", "tensor")

    def __init__(self, life: Life, tensor: Tensor) -> None:
        self.life, self.tensor = life, tensor
        life.change(tensor, +1)

    def __del__(self) -> None:
        self.life.change(self.tensor, -1)


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


def storages(tensor: Tensor) -> list[tuple[int, int]]:
    """Returns address and size in bytes of each storage of the tensor."""
    if tensor.layout is torch.strided:
        parts = [tensor]
    elif tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    else:  # other layouts can't be inspected in this way
        return [(id(tensor), tensor.numel() * tensor.element_size())]
    return [(part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()) for part in parts]


def living_anyway(model: nn.Module, batch: Any) -> list[Tensor]:
    """Returns the parameters, the buffers, and all tensors in the batch."""
    fields = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return [*model.parameters(), *model.buffers(), *fields]
