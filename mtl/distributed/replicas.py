"""Models with the same parameters and buffers in all processes."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mtl.choices import WAYS
from mtl.distributed.collectives import broadcast_tensors, gather_numbers, gather_objects, mark, world_size
from mtl.distributed.sharding import local, number_of_part, shard
from mtl.errors import UserError
from mtl.snapshots import distinct


def prepare(model: nn.Module, how: str = "ddp") -> nn.Module:
    """Gives a model the parameters and buffers of the process of rank 0, and divides it over the processes if asked to.

    All processes have to call it, after `torch.distributed.init_process_group` and `sync_batchnorm`, and before the
    optimizer and the `mtl.Step` are made. With one process, the model stays as it is. Batch norm normalises each
    process's share of a batch by itself unless `sync_batchnorm` has changed it, and the running statistics are those of
    rank 0.

    Args:
        model: The model, on the device of this process. It is changed.
        how: `ddp`: each process has all parameters. `fsdp`: the parameters are divided over all processes by
            `torch.distributed.fsdp.fully_shard`: trunk and heads, and the members of their outermost `nn.Sequential`
            or `nn.ModuleList`, gather their parameters before they run. `hsdp`: each machine has all parameters,
            divided in the same way over its processes, which torchrun has to start.

    Returns:
        The model.

    Raises:
        UserError: If the model contains a wrapper such as `DistributedDataParallel`, differs between the processes, or
            can't be divided; if torchrun started several processes, and there is no process group; or if `how` is
            `hsdp`, and the machines don't have equally many processes.
    """
    if how not in WAYS:
        raise UserError(f"distributed: '{how}' is not one of {', '.join(WAYS)}")
    check_joined()
    check_plain(model)
    kinds = [(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    if number := difference(kinds):
        raise UserError(_DIFFERENT["parameters"].format(ranks=f"0 and {number}"))
    broadcast_tensors(list(model.parameters()))
    share_buffers(model)
    if how != "ddp" and world_size() > 1:
        shard(model, how)
    return model


def check_joined() -> None:
    """Checks that the processes that torchrun started are in a process group.

    Raises:
        UserError: If there are several, and this one isn't in a group, so that each would train a model of its own.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if count > 1 and not dist.is_initialized():
        raise UserError(
            f"torchrun started {count} processes, and there is no process group, so that each of them would train a "
            "model of its own. Call torch.distributed.init_process_group() before mtl.distributed.prepare(model) and "
            "the first step"
        )


def share_buffers(model: nn.Module) -> None:
    """Gives the model the buffers of the process of rank 0, such as the running statistics of batch norm.

    Raises:
        UserError: In all processes, if a buffer has different shapes or types in two of them.
    """
    if world_size() == 1 or not any(module._buffers for module in model.modules()):
        return
    named = {name: parts for name, buffer in model.named_buffers() if (parts := _parts(buffer))}
    kinds = {name: [(part.dtype, tuple(part.shape)) for part in parts] for name, parts in named.items()}
    marks = gather_numbers([mark(kinds)])
    if any(each != marks[0] for each in marks):  # gloo would end the process
        raise UserError(_of_different_kinds(gather_objects(kinds)))
    broadcast_tensors([part for parts in named.values() for part in parts])


def _parts(buffer: torch.Tensor) -> list[torch.Tensor]:
    """Returns the tensors that hold the values of a buffer, which may be sparse or have been expanded."""
    if buffer.layout == torch.strided:
        return [distinct(buffer)]
    if buffer.layout == torch.sparse_coo:
        return [buffer._indices(), buffer._values()]
    by_rows = buffer.layout in (torch.sparse_csr, torch.sparse_bsr)
    of_rows = (buffer.crow_indices(), buffer.col_indices()) if by_rows else ()
    return [*(of_rows or (buffer.ccol_indices(), buffer.row_indices())), buffer.values()]


def _of_different_kinds(kinds: list[dict[str, Any]]) -> str:
    rank, name = next(
        (rank, name)
        for rank, each in enumerate(kinds)
        for name in {**kinds[0], **each}
        if each.get(name) != kinds[0].get(name)
    )
    shown = [[f"{str(kind).removeprefix('torch.')} {shape}" for kind, shape in each.get(name, [])] for each in kinds]
    ours, theirs = (" and ".join(shown[number]) or "missing" for number in (0, rank))
    return (
        f"the buffer '{name}' of the model is {ours} in the process of rank 0 and {theirs} in that of rank {rank}. All "
        "processes get the buffers of rank 0 after each step; give the buffer its final shape when the model is built, "
        "or keep it in an attribute that isn't a buffer"
    )


def check_plain(model: nn.Module) -> None:
    """Checks that the model has no wrapper that sums or divides gradients by itself.

    Raises:
        UserError: If there is one.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # a model with such modules has imported it, which is slow
    composable: Any = sys.modules.get("torch.distributed._composable.contract")
    for name, module in model.named_modules():
        where = f"'{name}' of the model" if name else "the model"
        if isinstance(module, DistributedDataParallel | DataParallel):
            raise UserError(
                f"{where} is wrapped in {type(module).__name__}, which sums the gradients of one backward pass, and a "
                "step has several. Give mtl.Step the module itself: it sums the gradients of all processes of the "
                "default process group. mtl.distributed.prepare(model) makes the parameters of the processes equal"
            )
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise UserError(
                f"{where} is wrapped in FullyShardedDataParallel, which flattens the parameters. Give mtl.Step a model "
                "that is sharded by fully_shard, as mtl.distributed.prepare(model, 'fsdp') does"
            )
        if composable is not None and "replicate" in (composable._get_registry(module) or ()):
            raise UserError(
                f"{where} was given to replicate, which sums the gradients of one backward pass, as "
                "DistributedDataParallel does, and a step has several. Leave it out: mtl.Step sums the gradients of "
                "all processes. mtl.distributed.prepare(model) makes the parameters of the processes equal"
            )


def check_replicas(model: nn.Module, settings: Mapping[str, object] | None = None) -> None:
    """Checks that all processes have the same parameters and settings.

    Of sharded parameters, the processes that have the same part compare it.

    Args:
        model: The model.
        settings: By name, what else has to be the same.

    Raises:
        UserError: In all processes, if two of them differ, or if the model contains a `SyncBatchNorm`.
    """
    synchronised = [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if synchronised:
        raise UserError(
            f"'{synchronised[0]}' of the model is a SyncBatchNorm, which all processes have to call equally often, "
            "whether they have labels of a task or not. mtl.distributed.sync_batchnorm(model) replaces it by one that "
            "a step knows how to call"
        )
    named = list(model.named_parameters())
    shapes = [(name, tuple(parameter.shape), parameter.requires_grad) for name, parameter in named]
    sums = torch.stack([checksum(local(parameter.detach())) for _, parameter in named]).tolist()
    ours = {**(settings or {}), "parameters": shapes, "values": sums}
    everyone = gather_objects((number_of_part(named[0][1]), ours))
    for what in everyone[0][1]:
        first: dict[int, int] = {}  # by part, the rank of the first process that has it
        for rank, (part, theirs) in enumerate(everyone):
            other = first.setdefault(part if what == "values" else 0, rank)
            values = [everyone[other][1][what], theirs.get(what)]
            if values[0] != values[1]:
                message = _DIFFERENT.get(what, _DIFFERENT["setting"])
                one, two = _where_they_differ(str(values[0]), str(values[1]))
                raise UserError(message.format(ranks=f"{other} and {rank}", what=what, one=one, two=two))


def _where_they_differ(one: str, two: str) -> tuple[str, str]:
    """Returns two texts from the value on in which they differ, at most 100 characters of each."""
    same = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    starts = [one.rfind(mark, 0, same) + len(mark) for mark in ("(", ", ") if mark in one[:same]]
    start = max(starts, default=0) if max(len(one), len(two)) > 100 else 0
    shown = [f"{'...' if start else ''}{text[start:]}" for text in (one, two)]
    return tuple(text if len(text) <= 100 else f"{text[:97]}..." for text in shown)  # type: ignore[return-value]


def difference(value: object) -> int:
    """Returns the rank of the first process in which a value differs from that in the process of rank 0; 0 if none."""
    values = gather_objects(value)
    return next((number for number, other in enumerate(values) if other != values[0]), 0)


def checksum(values: torch.Tensor) -> torch.Tensor:
    """Returns an integer that depends on each bit of a tensor and on the order of its elements."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    real = torch.view_as_real(values) if values.is_complex() else values
    bits = real.contiguous().flatten().view(kinds[real.element_size()])
    factors = torch.arange(1, 8192, device=bits.device).repeat(128)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in torch.split(
        bits, len(factors)
    ):  # a whole parameter as integers of 64 bits would take twice its memory
        total += (chunk * factors[: len(chunk)]).sum()
    return total


_DIFFERENT = {
    "tasks": "the processes of rank {ranks} have different tasks; give mtl.Step the same tasks in all processes",
    "setting": "{what}: the processes of rank {ranks} have different settings, {one} and {two}; give mtl.Step the same "
    "arguments in all processes, and the same state if the training is resumed",
    "parameters": "the models in the processes of rank {ranks} have different parameters; build the same model in all "
    "processes",
    "values": "the parameters in the processes of rank {ranks} have different values; call "
    "mtl.distributed.prepare(model) before the first step, which gives all processes the parameters of rank 0. If they "
    "became different in the training, an optimizer or a callback draws random numbers or changes them in one process",
}
