"""Sums of gradients over the processes that train together.

Each process has the gradients of its own share of the batch. Which parameters a task reaches may differ between the
processes, for instance if all labels of a task are in the share of one process.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mtl.distributed.collectives import BUCKET, any_process, sum_slices, sum_tensors, world_size
from mtl.errors import UserError

Row = dict[Tensor, Tensor]  # the gradient of one task, by parameter


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient in `.grad` with its sum over all processes.

    A parameter that no process has a gradient for keeps None.

    Raises:
        UserError: If a gradient is sparse.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    present = any_process([parameter.grad is not None for parameter in parameters])
    gradients = []
    for parameter, is_present in zip(parameters, present, strict=True):
        if not is_present:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(dense(parameter.grad))
    sum_tensors(gradients)


def reached(rows: Sequence[Collection[Tensor]], parameters: Sequence[Tensor]) -> list[list[bool]]:
    """Returns, by task and parameter, whether the task reaches the parameter in any process."""
    flags = any_process([parameter in row for row in rows for parameter in parameters])
    width = len(parameters)
    return [flags[start * width : (start + 1) * width] for start in range(len(rows))]


def sum_rows(
    rows: Mapping[str, Row], parameters: Sequence[Tensor], *, whole: bool, without: Collection[Tensor] = ()
) -> None:
    """Replaces the gradients in the rows with their sums over all processes.

    Args:
        rows: The rows by task name, in the same order in all processes. They are changed.
        parameters: All parameters, in the same order in all processes.
        whole: Whether each process gets the whole sums; otherwise it gets its slices of them, see
            `mtl.distributed.collectives.sum_slices`.
        without: Parameters whose gradients are not summed. Rows that reach them have an empty tensor in their place.

    Raises:
        UserError: If a gradient is sparse.
    """
    flags = reached(list(rows.values()), parameters)
    waiting: list[tuple[Row, Tensor]] = []
    size = 0
    for row, of_task in zip(rows.values(), flags, strict=True):
        for parameter, is_reached in zip(parameters, of_task, strict=True):
            if is_reached and parameter in without:
                row[parameter] = parameter.detach().new_empty(0)
            elif is_reached:
                waiting.append((row, parameter))
                size += parameter.numel()
                if size >= BUCKET:
                    _sum(waiting, whole=whole)
                    waiting, size = [], 0
    _sum(waiting, whole=whole)


def _sum(pairs: Sequence[tuple[Row, Tensor]], *, whole: bool) -> None:
    gradients = [dense(row[p]) if p in row else p.detach().new_zeros(p.shape) for row, p in pairs]
    if whole:
        sum_tensors(gradients)
    else:
        gradients = sum_slices(gradients)
    for (row, parameter), gradient in zip(pairs, gradients, strict=True):
        row[parameter] = gradient


def dense(gradient: Tensor) -> Tensor:
    """Returns the gradient, or raises a UserError if it is sparse."""
    if gradient.is_sparse:
        raise UserError(
            "the gradient of an embedding is sparse, and sparse gradients can't be summed over several processes; use "
            "sparse=False in the embedding, or train in one process"
        )
    return gradient
