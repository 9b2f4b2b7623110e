"""The comparison of compiled modules with eager ones in the first step.

Losses, the gradient of each task, the sum of the gradients, and buffers are compared, on the batch and from the random
state of the step. The gradients of the tasks are computed in several backward passes through one graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl.batch import Batch
from mtl.errors import FOREIGN, UserError, describe_error, first_line, is_unrelated, text_of
from mtl.gradients.rows import Rows
from mtl.snapshots import Snapshot
from mtl.step.compiling import Compiled
from mtl.step.micro_batches import MicroBatches
from mtl.step.passes import Passes, Recorders
from mtl.step.precision import DTYPES
from mtl.task import Task

# By precision: the largest difference, relative to the norm of the tensor, or to this part of the largest norm if that
# is more, since a gradient that should be zero consists of rounding errors.
TOLERANCES = {
    torch.float64: (1e-8, 1e-3),
    torch.float32: (1e-3, 1e-3),
    torch.bfloat16: (0.1, 0.1),
    torch.float16: (0.1, 0.1),
}


@dataclass
class Numbers:
    """What the passes of a step compute.

    Attributes:
        losses: The loss of each task.
        rows: The gradients of each task by parameter.
        total: The gradients that the backward passes leave in `.grad`, by parameter.
        buffers: The buffers after the passes, by name.
    """

    losses: dict[str, Tensor]
    rows: dict[str, dict[Tensor, Tensor]]
    total: dict[Tensor, Tensor]
    buffers: dict[str, Tensor]


class CompiledCheck:
    """Compares compiled modules with eager ones, for each task in the first step that the task takes part in.

    Args:
        compiled: The compiled modules.
        passes: The passes of the step.
        tasks: The names of the tasks.
    """

    def __init__(self, compiled: Compiled, passes: Passes, tasks: Sequence[str]) -> None:
        self._model = passes.model
        self._compiled = compiled
        self._passes = passes
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in passes.model.named_parameters()}
        self._all = set(tasks) if compiled.names else set()
        self._unchecked = set(self._all)

    def again(self) -> None:
        """Compares all tasks once more, in the next step, since the modules will be compiled anew."""
        self._unchecked = set(self._all)

    def __call__(self, micro_batches: MicroBatches) -> None:
        """Compares the tasks that were not compared before; the state of the model doesn't change.

        Raises:
            UserError: If compiled modules fail, or if they differ from the eager ones.
        """
        if not self._unchecked:
            return
        for batch, members in zip(micro_batches.batches, micro_batches.members, strict=True):
            tasks = [micro_batches.tasks[i] for i in members if micro_batches.names[i] in self._unchecked]
            if tasks:
                self._compare(tasks, batch)
                self._unchecked -= {task.name for task in tasks}

    def _compare(self, tasks: Sequence[Task], batch: Batch) -> None:
        before = Snapshot(self._model)
        try:
            with self._compiled.paused():
                eager = self._run(tasks, batch)
            before.restore()
            try:
                compiled = self._run(tasks, batch)
            except FOREIGN as error:
                if is_unrelated(error):
                    raise
                raise UserError(self._failure(error)) from error
        finally:
            before.restore()
        for difference in self._differences(eager, compiled):
            raise UserError(
                f"model.compile: compiled modules differ from eager ones: {difference}. The compiled modules are "
                f"{', '.join(self._compiled.names)}; leave out the one that differs, or set model.compile=false"
            )

    def _run(self, tasks: Sequence[Task], batch: Batch) -> Numbers:
        names = [task.name for task in tasks]
        rows = Rows(dict(self._model.named_parameters()), names)
        for parameter in self._names:
            parameter.grad = None
        losses = self._passes(tasks, batch, [1.0] * len(tasks), Recorders(measure=rows))
        numbers = Numbers(
            dict(zip(names, losses, strict=True)),
            {name: {p: gradient for p, gradient in rows.row(name).items() if p in self._names} for name in names},
            {parameter: parameter.grad for parameter in self._names if parameter.grad is not None},
            {name: buffer.clone() for name, buffer in self._model.named_buffers()},
        )
        for parameter in self._names:
            parameter.grad = None
        return numbers

    def _differences(self, eager: Numbers, compiled: Numbers) -> Iterator[str]:
        """Yields a sentence for each difference that isn't rounding."""
        for task, row in eager.rows.items():
            other = compiled.rows[task]
            for parameter in row.keys() ^ other.keys():
                eagerly, otherwise = ("reaches", "does not") if parameter in row else ("does not reach", "does")
                yield (
                    f"task '{task}' {eagerly} '{self._names[parameter]}' in eager mode, and {otherwise} in compiled "
                    "mode, where each output depends on all parameters of its module; compile the modules that compute "
                    "only one of the outputs"
                )
        groups: list[tuple[str, Mapping[Any, Tensor], Mapping[Any, Tensor]]] = [
            ("the loss of task", eager.losses, compiled.losses),
            *(
                (f"the gradient of task '{task}' with respect to", row, compiled.rows[task])
                for task, row in eager.rows.items()
            ),
            ("the summed gradient with respect to", eager.total, compiled.total),
            ("the buffer", eager.buffers, compiled.buffers),
        ]
        tolerance, part = TOLERANCES[self._precision()]
        for what, ours, theirs in groups:
            for key, error, norm, other_norm in _errors(ours, theirs, part):
                if error > tolerance:
                    yield (
                        f"{what} '{self._names.get(key, key)}' is off by {error:.2g} relative to its norm, {norm:.6g} "
                        f"in eager mode and {other_norm:.6g} in compiled mode; the tolerance is {tolerance:g}"
                    )

    def _precision(self) -> torch.dtype:
        """Returns the narrowest type that the passes compute in."""
        of_parameters = [p.dtype for p in self._names if p.dtype in TOLERANCES]
        types = [*of_parameters, DTYPES[self._passes.precision] or torch.float64]
        return max(types, key=lambda dtype: torch.finfo(dtype).eps)

    def _failure(self, error: BaseException) -> str:
        """Returns a message about an error of compiled modules, which eager ones didn't raise."""
        while isinstance(error, UserError) and error.__cause__ is not None:
            error = error.__cause__
        text = text_of(error)
        if "InvalidCxxCompiler" in text or "No working C++ compiler" in text:
            return (
                "model.compile needs a C++ compiler on a CPU, and there is none: install g++, or name another compiler "
                "in the environment variable CXX. model.compile=false trains without a compiler"
            )
        ways = f"The compiled modules are {', '.join(self._compiled.names)}"
        if "double backward" in text:
            return (
                "model.compile: a loss or an objective differentiates the gradient of a compiled module once more "
                f"(create_graph=True), which torch.compile doesn't support. {ways}; leave out those that the loss uses"
            )
        inner = getattr(error, "inner_exception", error)
        lines = [line for line in text.splitlines() if line.strip()]
        described = describe_error(inner) if isinstance(inner, BaseException) else first_line(error)
        if described.endswith("raised:") and len(lines) > 1:
            described = f"{described} {lines[1]}"
        return (
            f"model.compile: compiled modules fail where eager ones don't: {described}. {ways}; leave out the one that "
            "fails, or set model.compile=false"
        )


def _errors(
    eager: Mapping[Any, Tensor], compiled: Mapping[Any, Tensor], part: float
) -> Iterator[tuple[Any, float, float, float]]:
    """Yields, for each tensor, its key, the relative difference, and the two norms. What isn't finite is left out."""
    ours = {key: _flat(tensor) for key, tensor in eager.items() if key in compiled}
    norms = {key: float(torch.linalg.vector_norm(tensor)) for key, tensor in ours.items()}
    floor = part * max((norm for norm in norms.values() if norm < float("inf")), default=0.0)
    for key, tensor in ours.items():
        if not torch.isfinite(tensor).all():
            continue  # the step itself reports it
        other = _flat(compiled[key])
        error = float(torch.linalg.vector_norm(other - tensor))
        scale = max(norms[key], floor)
        if error:  # NaN as well
            yield key, error / scale if scale else float("inf"), norms[key], float(torch.linalg.vector_norm(other))


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.flatten().double()
