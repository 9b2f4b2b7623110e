"""Whatever is not supported in several processes is an error, in the step itself."""

from typing import Any

import pytest
import torch
from processes import processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mtl


def model_of(trunk: nn.Module) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    tasks = [mtl.Task(n, head=nn.Linear(4, 1), loss=nn.MSELoss(), target=n) for n in ("a", "b")]
    return mtl.MultiTaskModel(trunk, tasks, inputs=["x"]), tasks


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(count, size, generator=generator) for name, size in (("x", 3), ("a", 1), ("b", 1))}
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    return {name: value[rank::world] for name, value in drawn.items()}


def step_of(kind: str) -> str:
    """Takes a step that is refused, and returns the message."""
    torch.manual_seed(mtl.distributed.rank() if kind == "other values" else 0)
    trunk: nn.Module = nn.Linear(3, 4)
    if kind == "ddp trunk":
        trunk = DistributedDataParallel(trunk)
    if kind == "fsdp trunk":
        fully_shard(trunk, mesh=init_device_mesh("cpu", (mtl.distributed.world_size(),)))
    if kind == "synchronised norm":
        trunk = nn.Sequential(trunk, nn.SyncBatchNorm(4))
    if kind == "sparse":
        trunk = nn.EmbeddingBag(5, 4, sparse=True)
    model, tasks = model_of(trunk)
    if kind == "whole_batch":
        tasks[0].whole_batch = True
    if kind == "other tasks" and mtl.distributed.rank():
        tasks.reverse()
    if kind == "other parameters" and mtl.distributed.rank():
        model.trunk.bias.requires_grad_(False)
    wrapped: Any = DistributedDataParallel(model) if kind == "ddp model" else model
    if kind == "fsdp model":
        fully_shard(wrapped, mesh=init_device_mesh("cpu", (mtl.distributed.world_size(),)))
    data = batch()
    if kind == "sparse":
        data["x"] = torch.zeros(len(data["a"]), 2, dtype=torch.long)
    try:
        mtl.Step(wrapped, tasks, torch.optim.SGD(model.parameters(), lr=0.1))(data)
    except mtl.UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("ddp trunk", "'trunk' of the model is wrapped in DistributedDataParallel"),
        ("ddp model", "the model is wrapped in DistributedDataParallel"),
        ("fsdp trunk", "'trunk' of the model is sharded by fully_shard"),
        ("fsdp model", "the model is sharded by fully_shard"),
        ("whole_batch", "task 'a': with whole_batch its loss needs the predictions for the whole batch"),
        ("other values", "have different values; call mtl.distributed.prepare(model)"),
        ("other tasks", "have different tasks"),
        ("other parameters", "have different parameters"),
        ("sparse", "sparse=False"),
        ("synchronised norm", "'trunk.1' of the model is a SyncBatchNorm"),
    ],
)
def test_refused(kind: str, part: str) -> None:
    for message in processes(2)(step_of, kind):
        assert part in message


def prepared() -> list[list[float]]:
    torch.manual_seed(mtl.distributed.rank())
    model, tasks = model_of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model.trunk[1].running_mean.add_(mtl.distributed.rank())
    mtl.distributed.prepare(model)
    mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))(batch(7))
    return [value.flatten().tolist() for value in model.state_dict().values()]


def test_prepared_models_stay_alike_and_have_the_statistics_of_rank_0() -> None:
    first, second = processes(2)(prepared)
    assert first == second


def drawn(count: int, size: int) -> list[list[int]]:
    sampler = mtl.distributed.Sampler(count, size, seed=3)
    sampler.set_epoch(2)
    assert len(list(sampler)) == len(sampler)
    return list(sampler)


@pytest.mark.parametrize(("count", "size"), [(20, 8), (17, 8), (16, 8), (9, 4), (5, 3)])
def test_the_sampler_divides_the_batches_of_one_process(count: int, size: int) -> None:
    for world in (2, 3):
        shares = processes(world)(drawn, count, size)
        alone = drawn(count, size)
        joined = [sorted(sum(batches, [])) for batches in zip(*shares, strict=True)]
        assert sorted(sum(joined, [])) == list(range(count))  # each sample once
        whole = sum(len(batch) == size for batch in alone)
        assert joined[: whole - 1] == [sorted(batch) for batch in alone[: whole - 1]]
