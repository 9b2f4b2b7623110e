"""Sums of gradients over the processes that begin while backward passes still run.

The gradients of small parameters are copied into buckets that are summed together; a large gradient is summed where it
is. All processes begin the same sums in the same order. The buckets hold the parameters that had a gradient in any
process in an earlier step with the same tasks, the last layers first. The sum of a bucket begins once as many gradients
as in an earlier step with the same micro-batches have arrived at its parameters, or else after the passes. This is only
a guess: a gradient that arrives later, or at a parameter without a bucket, is summed after the passes and added. The
result is therefore right in each step, and each process may run passes of its own, or none.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtl.distributed.collectives import Begun, begin_sum, sum_tensors, sum_with_flags
from mtl.gradients.sums import dense

LARGE = 2**20  # the number of bytes from which on a gradient is summed without a copy
FIRST = 2**20  # the number of bytes in the first bucket, whose sum begins early
FOLLOWING = 25 * 2**20  # the number of bytes in each other bucket
Kind = tuple[torch.dtype, torch.device]
STEPS = 64  # the number of kinds of steps that are remembered


class Overlap:
    """Sums the gradients of the steps of a training over all processes.

    Args:
        parameters: All parameters, in the same order in all processes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._present: dict[Hashable, list[nn.Parameter]] = {}  # by tasks: parameters with a gradient in any process
        self._arrivals: dict[Hashable, Counter[Tensor]] = {}  # by tasks and micro-batches of this process
        self._room = Room()

    @contextmanager
    def __call__(self, tasks: Sequence[str], members: Sequence[Sequence[int]] | None) -> Iterator["Sums"]:
        """Sums the gradients that arrive in `.grad` within the context; call `finish` at its end.

        Args:
            tasks: The names of the tasks in the step, the same in all processes.
            members: By micro-batch of this process, the indices of the tasks that have labels in it. None if no sum may
                begin before the end of the passes, since these communicate by themselves.
        """
        step = tuple(tasks)
        passes = None if members is None else (step, tuple(map(tuple, members)))
        sums = Sums(self._parameters, self._present.get(step, ()), self._arrivals.get(passes), self._room)
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        register: Any = nn.Parameter.register_post_accumulate_grad_hook
        handles = [register(parameter, sums.arrive) for parameter in trained]
        try:
            yield sums
        finally:
            for handle in handles:
                handle.remove()
        for known in (self._present, self._arrivals):
            if len(known) >= STEPS:
                known.clear()
        self._present[step] = sums.present
        if passes is not None:
            self._arrivals[passes] = sums.arrivals


class Room:
    """The memory for the buckets of several parameters. All steps use it, since allocating it is slow on a CPU."""

    def __init__(self) -> None:
        self._flat: dict[Kind, Tensor] = {}

    def take(self, buckets: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """Returns a flat tensor of undefined values for the gradients of each bucket in `buckets`."""
        sizes = [sum(parameter.numel() for parameter in bucket) for bucket in buckets]
        kinds = [_kind(bucket[0]) for bucket in buckets]
        needed: Counter[Kind] = Counter()
        for kind, size in zip(kinds, sizes, strict=True):
            needed[kind] += size
        for kind, size in needed.items():
            if kind not in self._flat or len(self._flat[kind]) < size:
                self._flat[kind] = torch.empty(size, dtype=kind[0], device=kind[1])
        rests = dict(self._flat)
        taken = []
        for kind, size in zip(kinds, sizes, strict=True):
            taken.append(rests[kind][:size])
            rests[kind] = rests[kind][size:]
        return taken


class Sums:
    """The sums of the gradients of one step.

    Args:
        parameters: All parameters.
        expected: The parameters that get a bucket.
        arrivals: By parameter, how many gradients are expected in this process; None if that isn't known.
        room: The memory for the sums.

    Attributes:
        arrivals: By parameter, how many gradients have arrived in this process.
        present: The parameters that have a gradient in any process, known after `finish`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        expected: Sequence[nn.Parameter],
        arrivals: Mapping[Tensor, int] | None,
        room: Room,
    ) -> None:
        self._begun: list[Begun] = []
        self.arrivals: Counter[Tensor] = Counter()
        self.present: list[nn.Parameter] = []
        self._parameters = parameters
        self._expected = arrivals
        self._buckets = _buckets([p for p in reversed(expected) if p.requires_grad])
        shared = [bucket for bucket in self._buckets if not _is_large(bucket[0])]
        self._flat = iter(room.take(shared))
        self._number = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._missing = [sum(arrivals is None or p in arrivals for p in bucket) for bucket in self._buckets]
        self._sums: dict[nn.Parameter, Tensor] = {}  # large gradients, and views of the buckets, that have begun
        self._sent: dict[nn.Parameter, Tensor] = {}  # gradients of this process that are in such a sum

    def arrive(self, parameter: nn.Parameter) -> None:
        """Counts a gradient that has arrived in `.grad`, and begins the sums for which all gradients have arrived."""
        self.arrivals[parameter] += 1
        if self._expected is None or self._expected.get(parameter) != self.arrivals[parameter]:
            return
        if parameter in self._number:
            self._missing[self._number[parameter]] -= 1
        while len(self._begun) < len(self._buckets) and not self._missing[len(self._begun)]:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Begins the sum of the next bucket, and takes its gradients out of `.grad`."""
        bucket = self._buckets[len(self._begun)]
        here = {parameter: dense(parameter.grad) for parameter in bucket if parameter.grad is not None}
        if _is_large(bucket[0]):
            (parameter,) = bucket
            self._sums[parameter] = _in_layout(here.get(parameter), parameter)
            flat = _flat(self._sums[parameter])
        else:
            flat = next(self._flat)
            for parameter, piece in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                self._sums[parameter] = piece.as_strided(parameter.shape, _strides(parameter), piece.storage_offset())
                if parameter not in here:
                    self._sums[parameter].zero_()
            if here:
                torch._foreach_copy_([self._sums[parameter] for parameter in here], list(here.values()))
        for parameter in bucket:
            parameter.grad = None
        self._sent |= here
        self._begun.append(begin_sum(flat))

    @torch.no_grad()
    def finish(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Leaves the sums over all processes in `.grad`; a parameter without a gradient in any process keeps None.

        Args:
            losses: 0-dim tensors, such as the losses of this process, that are summed as well.

        Returns:
            The sum of each of these tensors over all processes.

        Raises:
            UserError: If a gradient is sparse.
        """
        while len(self._begun) < len(self._buckets):
            self._begin()
        flags = [p in self._sent for p in self._parameters] + [p.grad is not None for p in self._parameters]
        total, flags = sum_with_flags(torch.stack(list(losses)), flags)
        for work in self._begun:
            work.wait()
        late = []
        gradients, sums = [], []  # the tensors for `.grad`, and the views of the buckets that they get the values of
        count = len(self._parameters)
        for parameter, was_sent, is_late in zip(self._parameters, flags[:count], flags[count:], strict=True):
            if is_late:
                gradient = parameter.grad
                late.append((parameter, torch.zeros_like(parameter) if gradient is None else dense(gradient)))
            if was_sent or is_late:
                self.present.append(parameter)
            parameter.grad = None
            if was_sent and _is_large(parameter):
                parameter.grad = self._sums[parameter]
            elif was_sent:
                parameter.grad = self._sent[parameter] if parameter in self._sent else torch.empty_like(parameter)
                gradients.append(parameter.grad)
                sums.append(self._sums[parameter])
        if gradients:
            torch._foreach_copy_(gradients, sums)
        sum_tensors([gradient for _, gradient in late])
        for parameter, gradient in late:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return list(total.unbind())


def _kind(tensor: Tensor) -> Kind:
    return tensor.dtype, tensor.device


def _is_large(parameter: nn.Parameter) -> bool:
    return parameter.numel() * parameter.element_size() >= LARGE


def _strides(parameter: nn.Parameter) -> tuple[int, ...]:
    """Returns the strides that the gradient has in all processes; they leave no gaps."""
    return (parameter if parameter.is_contiguous() else torch.empty_like(parameter, device="meta")).stride()


def _in_layout(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    """Returns the gradient, or zeros for None, in a tensor whose elements have the same order in all processes."""
    strides = _strides(parameter)
    if gradient is not None and gradient.stride() == strides and _kind(gradient) == _kind(parameter):
        return gradient
    tensor = parameter.new_empty_strided(parameter.shape, strides)
    return tensor.zero_() if gradient is None else tensor.copy_(gradient)


def _flat(tensor: Tensor) -> Tensor:
    """Returns a view of a tensor without gaps as a vector, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divides parameters into lists of one data type and device that are summed together, by their last parameters.

    A large parameter is alone.
    """
    buckets: list[list[nn.Parameter]] = []
    bucket: list[nn.Parameter] = []
    size, limit = 0, FIRST
    for parameter in parameters:
        if _is_large(parameter):
            buckets.append([parameter])
            continue
        if bucket and (size >= limit or _kind(parameter) != _kind(bucket[0])):
            buckets.append(bucket)
            bucket, size, limit = [], 0, FOLLOWING
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    return [*buckets, bucket] if bucket else buckets
