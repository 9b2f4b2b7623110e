"""Observes the passes of a step: the beginning and end of each phase, and the losses while their graphs are alive."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mtl.batch import Batch
from mtl.step import Step
from mtl.step.passes import Passes, Recorders, Weigh, Weights
from mtl.task import Task


@dataclass(frozen=True)
class Phase:
    """A phase of a step.

    Attributes:
        micro_batch: The number of the micro-batch, or of the batch of some tasks, counted from 1.
        kind: `forward`, `backward`, or `between` for measurements and releases between passes.
        of: The names of the tasks; empty for the shared trunk and between the passes.
    """

    micro_batch: int
    kind: str
    of: tuple[str, ...]

    def __str__(self) -> str:
        if self.kind == "between":
            return "between the passes"
        whose = " + ".join(self.of) if len(self.of) < 4 else f"{len(self.of)} tasks"
        return f"{whose or 'trunk'} {self.kind}"


class Watcher:
    """The base class of observers of a step; all methods do nothing."""

    def begin(self, phase: Phase) -> None:
        """Called when the phase begins."""

    def end(self, phase: Phase) -> None:
        """Called when the phase ends."""

    def finish(self) -> None:
        """Called when the step's backward ends."""

    def see(self, names: Sequence[str], losses: Sequence[Tensor]) -> None:
        """Called before the backward of these tasks' losses, whose graphs are complete."""


class Watched(Passes):
    """Makes the same passes as another `Passes`, and reports the phases to a watcher.

    Args:
        passes: The passes to replace.
        watcher: The watcher, which is called when a phase begins or ends.
    """

    def __init__(self, passes: Passes, watcher: Watcher) -> None:
        super().__init__(passes.model, passes.kind, passes.precision)
        self.scaler = passes.scaler
        self._watcher = watcher
        self._micro_batch = 0
        self._phase: Phase | None = None
        self._names: list[str] = []  # the names of the tasks in the current micro-batch
        self._forward = 0  # the number of tasks whose forward has begun
        self._backward_done = 0  # the number of tasks whose backward is done
        self._one_by_one = True

    def finish(self) -> None:
        """Called when the step's backward is done."""
        self._change(None)
        self._watcher.finish()

    def __call__(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        weights: Weights | Weigh,
        recorders: Recorders = Recorders(),  # noqa: B008
    ) -> list[Tensor]:
        """See `Passes`."""
        self._change(None)
        self._micro_batch += 1
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
            losses = super().__call__(tasks, batch, weights, recorders)
        if recorders.collect is None:  # otherwise the trunk's backward may follow
            self._change(None)
        return losses

    def _beginnings(self) -> dict[nn.Module, list[int]]:
        """Returns the modules with which each task's own part of the forward begins, with the numbers of the tasks."""
        beginnings: dict[nn.Module, list[int]] = {}
        for number, name in enumerate(self._names):
            beginnings.setdefault(self.model.own_part(name), []).append(number)
        return beginnings

    def _begins(self, which: Sequence[int], *_: Any) -> None:
        if self._forward in which:
            self._change("forward", self._names[self._forward : self._forward + 1])
            self._forward += 1

    def backward(self, losses: Sequence[Tensor], weights: Weights, *, retain_graph: bool = False) -> None:
        """See `Passes.backward`."""
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
        """Ends the current phase and begins another; a `kind` of None begins no phase."""
        if self._phase is not None:
            self._watcher.end(self._phase)
        self._phase = None if kind is None else Phase(self._micro_batch, kind, tuple(of))
        if self._phase is not None:
            self._watcher.begin(self._phase)


def backward(step: Step, batch: Any, watcher: Watcher, *, measure: bool = False) -> Any:
    """Runs the backward of a step with a watcher; restores random state, buffers and gradients afterwards.

    Returns:
        The step's result, see `mtl.StepResult`.
    """
    passes = step.passes
    step.computation.passes = watched = Watched(passes, watcher)
    try:
        result = step.backward(batch, measure=measure)
        watched.finish()
    finally:
        step.computation.passes = passes
        step.undo()
    return result
