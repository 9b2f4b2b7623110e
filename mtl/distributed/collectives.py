"""Collective operations between the processes that train one model; with one process they change nothing.

The processes are those of the default process group of `torch.distributed`. Each process has the same parameters and
its own share of each batch. All processes have to call the same functions in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 8_388_608  # the number of elements that are sent at once


class Begun:
    """An operation between processes that has begun.

    Args:
        work: The operation, as torch returned it. It keeps the connections to the other processes open, and an error
            may keep this object, so that the operation itself isn't an attribute of it, see `forget`.
    """

    operations: ClassVar[dict["Begun", Any]] = {}  # those that nothing has waited for

    def __init__(self, work: Any) -> None:
        self.operations[self] = work

    def wait(self) -> None:
        """Waits for the end of the operation; then, or if it was forgotten, this does nothing."""
        if self in self.operations:
            self.operations.pop(self).wait()

    @classmethod
    def forget(cls) -> None:
        """Gives up all operations that have begun, so that the connections can close."""
        cls.operations.clear()


def world_size() -> int:
    """Returns the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process, from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share() -> slice:
    """Returns the part of a batch that this process gets: every `world_size`-th sample, beginning with its rank."""
    return slice(rank(), None, world_size())


def gather_objects(value: object) -> list[Any]:
    """Returns the values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Returns the sum of a small tensor over all processes, which is bit-equal in all of them."""
    if world_size() == 1:
        return tensor
    return torch.stack(_gathered(tensor)).sum(0)


def any_process(flags: Sequence[bool]) -> list[bool]:
    """Returns, for each flag, whether it is true in at least one process."""
    if world_size() == 1:
        return list(flags)
    numbers = torch.tensor(flags, dtype=torch.uint8, device=_device_of_numbers())
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return [bool(number) for number in numbers.tolist()]


def sum_scalars(scalars: Sequence[Tensor]) -> list[Tensor]:
    """Returns the sum of each 0-dim tensor over all processes."""
    if world_size() == 1:
        return list(scalars)
    return list(sum_over_processes(torch.stack(list(scalars))).unbind())


def begin_sum_of_numbers(numbers: Sequence[float]) -> Callable[[], list[float]]:
    """Begins to sum each number over all processes; the returned function waits for the sums."""
    if world_size() == 1:
        return lambda: list(numbers)
    local = torch.tensor(numbers, dtype=torch.float64, device=_device_of_numbers())
    received = [torch.empty_like(local) for _ in range(world_size())]
    begun = Begun(dist.all_gather(received, local, async_op=True))

    @cache
    def wait() -> list[float]:
        begun.wait()
        summed: list[float] = torch.stack(received).sum(0).tolist()
        return summed

    return wait


def gather_numbers(numbers: Sequence[float]) -> list[list[float]]:
    """Returns the numbers of all processes, in the order of their ranks; all processes give equally many."""
    if world_size() == 1:
        return [list(numbers)]
    local = torch.tensor(numbers, dtype=torch.float64, device=_device_of_numbers())
    return [each.tolist() for each in _gathered(local)]


def mark(value: object) -> float:
    """Returns an integer of 48 bits that depends on `repr(value)`, by which processes compare values quickly."""
    return float(int.from_bytes(blake2b(repr(value).encode(), digest_size=6).digest()))


def sum_numbers(numbers: Sequence[float]) -> list[float]:
    """Returns the sum of each number over all processes."""
    return begin_sum_of_numbers(numbers)()


def sum_with_flags(numbers: Tensor, flags: Sequence[bool]) -> tuple[Tensor, list[bool]]:
    """Returns the sum of a small tensor, and for each flag whether it is true in a process, from one exchange.

    If the tensor is on a GPU and the process group can exchange flags between CPUs, there are two exchanges, so that
    the CPU doesn't wait for the GPU.
    """
    marks = torch.tensor(flags, dtype=torch.uint8, device=_device_of_numbers())
    if marks.device.type != numbers.device.type:
        return sum_over_processes(numbers), any_process(flags)
    data = numbers.reshape(-1).view(torch.uint8)
    parts = torch.stack(_gathered(torch.cat([data, marks])))
    values, marks = parts[:, : len(data)], parts[:, len(data) :]
    summed = values.contiguous().view(numbers.dtype).sum(0).view(numbers.shape)
    return summed, [bool(mark) for mark in marks.amax(0).tolist()]


def begin_sum(tensor: Tensor) -> "Begun":
    """Begins to replace a contiguous tensor with its sum over all processes."""
    return Begun(dist.all_reduce(_real(tensor), async_op=True))


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor with its sum over all processes, which is bit-equal in all of them."""
    if world_size() == 1:
        return
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(_real(bucket[0]))
            continue
        _replace(bucket, dist.all_reduce)


def sum_slices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums tensors over all processes and returns the slices of the sums that belong to this process.

    Args:
        tensors: Tensors of any shapes, the same in all processes.

    Returns:
        For each tensor of n real numbers a tensor of shape (ceil(n / world size),), padded with zeros.
    """
    count = world_size()
    slices: list[Tensor] = []
    for bucket in _buckets(tensors):
        lengths = [-(-_real(tensor).numel() // count) for tensor in bucket]
        sent = bucket[0].new_zeros((count, sum(lengths)), dtype=_real(bucket[0]).dtype)
        for place, tensor in zip(torch.split(sent, lengths, dim=1), bucket, strict=True):
            flat = _real(tensor).reshape(-1)
            for number, piece in enumerate(torch.split(flat, place.shape[1])):
                place[number, : len(piece)] = piece
        received = torch.empty_like(sent)
        # gloo's reduce_scatter sends as much as an all_reduce; each pair of processes exchanges what it needs instead.
        dist.all_to_all_single(received, sent)
        slices += torch.split(received.sum(0), lengths)
    return [piece.clone() for piece in slices]


def gather_slices(slices: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors of which each process has a slice, see `sum_slices`.

    Args:
        slices: The slices of this process.
        likes: A tensor for each slice, with the shape and the strides of the result.
    """
    results: list[Tensor] = []
    for bucket in _buckets(slices):
        lengths = [len(piece) for piece in bucket]
        whole = torch.stack(_gathered(torch.cat(list(bucket))))
        for columns in torch.split(whole, lengths, dim=1):
            like = likes[len(results)].detach()
            result = torch.empty_like(like)
            real = _real(result)
            real.copy_(columns.reshape(-1)[: real.numel()].view(real.shape))
            results.append(result)
    return results


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Joins the rows of the matrices of all processes.

    Args:
        rows: A tensor of shape (n, d), where n may differ between the processes.
        counts: By rank, the number of rows.
    """
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    return torch.cat([part[:count] for part, count in zip(_gathered(padded), counts, strict=True)])


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Replaces the values of each tensor with those of the process of rank 0.

    The values are sent as bytes, since gloo doesn't know all data types.
    """
    if world_size() == 1:
        return
    for bucket in _buckets(sorted(tensors, key=lambda tensor: str(tensor.dtype))):
        _replace(bucket, lambda flat: dist.broadcast(flat.view(torch.uint8), 0))


def _device_of_numbers() -> torch.device | None:
    """Returns the device for numbers that the CPU exchanges: the CPU itself, if the process group supports that."""
    return torch.device("cpu") if "cpu" in dist.get_backend_config() else torch.accelerator.current_accelerator()


def _replace(bucket: Sequence[Tensor], operation: Callable[[Tensor], Any]) -> None:
    """Replaces the values of tensors by an operation that changes all of them in place as one flat tensor."""
    reals = [_real(tensor.detach()) for tensor in bucket]
    flat = torch.cat([real.reshape(-1) for real in reals])
    operation(flat)
    for real, piece in zip(reals, torch.split(flat, [real.numel() for real in reals]), strict=True):
        real.copy_(piece.view(real.shape))


def _gathered(tensor: Tensor) -> list[Tensor]:
    """Returns the tensors of all processes, in the order of their ranks; all have the same shape."""
    received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(received, tensor.contiguous())
    return received


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divides tensors into groups of one data type and device that are sent together, in the same order."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not alike or size + tensor.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
