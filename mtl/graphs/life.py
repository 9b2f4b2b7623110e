"""The life of a step: how many bytes autograd has saved for the backward passes, after each forward and backward.

What is counted: the memory of tensors that a graph has saved and not yet given up, each piece of memory once, however
many tensors or graphs share it, and whole, also where a tensor is a part of it. What lives anyway is left out:
parameters, buffers and the batch. Nor are gradients, a balancer's rows, the optimizer's state, what operations need
while they run, and what activation checkpointing computes again in the backward; the inputs that this keeps are in.
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
    """What was alive when a phase was over.

    Attributes:
        phase: which.
        alive: bytes at its end.
        peak: the most bytes within it.
        start, end: where it is in `Life.ticks`: from the first tick after the start to the end's.
    """

    phase: Phase
    alive: int
    peak: int
    start: int
    end: int


class Life(Watcher):
    """Counts what autograd saves, and gives up, in whatever is run within `counting`.

    Args:
        anyway: tensors that live anyway.

    Attributes:
        ticks: the bytes alive after each tensor that was saved or given up, from 0 on.
        events: the phases that are over.
    """

    def __init__(self, anyway: Iterable[Tensor]) -> None:
        self._anyway = {place for tensor in anyway for place, _ in storages(tensor)}
        self._holders: dict[int, int] = {}  # how many saved tensors are in each piece of memory
        self._alive = 0
        self.ticks = [0]
        self.events: list[Event] = []

    @property
    def peak(self) -> int:
        """The most bytes that were alive."""
        return max(self.ticks)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within this whatever autograd saves is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def begin(self, phase: Phase) -> None:
        """Notes what came before the phase, if anything did."""
        self._note(Phase(phase.part, "between", ()))

    def finish(self) -> None:
        """Notes what came after the last phase, if anything did."""
        self._note(Phase(self.events[-1].phase.part if self.events else 1, "between", ()))

    def end(self, phase: Phase) -> None:
        """Notes what is alive; a trunk's phase in which nothing happened is none."""
        self._note(phase, always=bool(phase.of))

    def _note(self, phase: Phase, *, always: bool = False) -> None:
        start, end = self.events[-1].end if self.events else 0, len(self.ticks) - 1
        if always or end > start:
            self.events.append(Event(phase, self._alive, max(self.ticks[start:]), start, end))

    def _pack(self, tensor: Tensor) -> "_Saved":
        return _Saved(self, tensor.detach())  # one with its graph would keep that alive

    def change(self, tensor: Tensor, holders: int) -> None:
        """One more saved tensor holds its memory, or one fewer."""
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
    """A tensor that autograd has saved; it goes when autograd lets go of it."""

    __slots__ = ("life", "tensor")

    def __init__(self, life: Life, tensor: Tensor) -> None:
        self.life, self.tensor = life, tensor
        life.change(tensor, +1)

    def __del__(self) -> None:
        self.life.change(self.tensor, -1)


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


def storages(tensor: Tensor) -> list[tuple[int, int]]:
    """The pieces of memory that a tensor is in: where each is, and its bytes."""
    if tensor.layout is torch.strided:
        parts = [tensor]
    elif tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    else:  # no other layout can be looked into the same way
        return [(id(tensor), tensor.numel() * tensor.element_size())]
    return [(part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()) for part in parts]


def living_anyway(model: nn.Module, batch: Any) -> list[Tensor]:
    """Parameters, buffers, and whatever tensors are in the batch."""
    fields = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return [*model.parameters(), *model.buffers(), *fields]
