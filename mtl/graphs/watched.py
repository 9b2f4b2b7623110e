"""A step's passes that somebody watches: what begins and ends, and the losses while their graphs are alive."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mtl.batch import Batch
from mtl.step import Step
from mtl.step.passes import Passes, Weigh, Weights
from mtl.task import Task


@dataclass(frozen=True)
class Phase:
    """A stretch of a step.

    Attributes:
        part: of the step's batch, from 1: a micro-batch, or a batch of some tasks' own.
        kind: `forward`, `backward`, or `between`, where something is looked at, or given up.
        of: the tasks' names; none where it is of the shared trunk alone, and between the passes.
    """

    part: int
    kind: str
    of: tuple[str, ...]

    def __str__(self) -> str:
        if self.kind == "between":
            return "between the passes"
        whose = " + ".join(self.of) if len(self.of) < 4 else f"{len(self.of)} tasks"
        return f"{whose or 'trunk'} {self.kind}"


class Watcher:
    """Is told how a step goes; this one does nothing about it."""

    def begin(self, phase: Phase) -> None:
        """The phase begins."""

    def end(self, phase: Phase) -> None:
        """The phase is over."""

    def finish(self) -> None:
        """The step's backward is over."""

    def see(self, names: Sequence[str], losses: Sequence[Tensor]) -> None:
        """These tasks' losses are about to go backward; their graphs are whole."""


class Watched(Passes):
    """Makes the same passes, and reports to a watcher.

    Args:
        passes: whose place it takes.
        watcher: is called when a phase begins or ends.
    """

    def __init__(self, passes: Passes, watcher: Watcher) -> None:
        super().__init__(passes.model, passes.kind, passes.precision)
        self.scaler = passes.scaler
        self._watcher = watcher
        self._part = 0
        self._phase: Phase | None = None
        self._names: list[str] = []  # of the tasks in the part at hand
        self._forward = 0  # how many of them have gone forward, or begun to,
        self._backward_done = 0  # and backward
        self._one_by_one = True

    def finish(self) -> None:
        """Called when the step's backward is done."""
        self._change(None)
        self._watcher.finish()

    def __call__(self, tasks: Sequence[Task], batch: Batch, weights: Weights | Weigh, **recorders: Any) -> list[Tensor]:
        """As `Passes`."""
        self._change(None)
        self._part += 1
        self._names = [task.name for task in tasks]
        self._forward = self._backward_done = 0
        self._one_by_one = self.kind == "sequential" or any(task.objective for task in tasks)
        with ExitStack() as hooks:
            if self._one_by_one:
                self._change("forward", self._names[:1])
            else:
                if self.model.shared is not None:
                    self._change("forward")
                for module, which in self._beginnings().items():
                    hook = module.register_forward_pre_hook(partial(self._begins, which))
                    hooks.callback(hook.remove)
            losses = super().__call__(tasks, batch, weights, **recorders)
        if recorders.get("collect") is None:  # else the trunk's backward may be yet to come
            self._change(None)
        return losses

    def _beginnings(self) -> dict[nn.Module, list[int]]:
        """The modules that begin a task's own part of the forward pass, each with the numbers of the tasks."""
        found: dict[nn.Module, list[int]] = {}
        for number, name in enumerate(self._names):
            found.setdefault(self.model.own_part(name), []).append(number)
        return found

    def _begins(self, which: Sequence[int], *_: Any) -> None:
        if self._forward in which:
            self._change("forward", self._names[self._forward : self._forward + 1])
            self._forward += 1

    def backward(self, losses: Sequence[Tensor], weights: Weights, *, retain_graph: bool = False) -> None:
        """As `Passes.backward`."""
        names = self._names[self._backward_done : self._backward_done + len(losses)]
        self._backward_done += len(losses)
        self._watcher.see(names, losses)
        self._change("backward", names)
        super().backward(losses, weights, retain_graph=retain_graph)
        left = self._names[self._backward_done :]
        if self._one_by_one and left:
            self._change("forward", left[:1])
        elif self.kind == "shared" and not self._one_by_one and not left:
            self._change("backward")
        else:
            self._change(None)

    def _change(self, kind: str | None, of: Sequence[str] = ()) -> None:
        """Ends the phase under way, and begins another."""
        if self._phase is not None:
            self._watcher.end(self._phase)
        self._phase = None if kind is None else Phase(self._part, kind, tuple(of))
        if self._phase is not None:
            self._watcher.begin(self._phase)


def backward(step: Step, batch: Any, watcher: Watcher, *, measure: bool = False) -> Any:
    """The step's backward, watched; random state, buffers and gradients are afterwards what they were before it.

    Returns:
        What the step says of itself, see `mtl.StepResult`.
    """
    own = step.passes
    step.computation.passes = watched = Watched(own, watcher)
    try:
        result = step.backward(batch, measure=measure)
        watched.finish()
    finally:
        step.computation.passes = own
        step.undo()
    return result
