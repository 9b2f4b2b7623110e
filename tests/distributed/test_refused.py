"""Whatever is not supported in several processes is an error, in the step itself."""

import copy
from typing import Any

import pytest
import torch
from processes import processes
from torch import nn
from torch.distributed._composable import replicate, replicate_with_fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DataParallel, DistributedDataParallel

import mtl


def model_of(trunk: nn.Module) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    tasks = [mtl.Task(n, head=nn.Linear(4, 1), loss=nn.MSELoss(), target=n) for n in ("a", "b")]
    return mtl.MultiTaskModel(trunk, tasks, inputs=["x"]), tasks


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(count, size, generator=generator) for name, size in (("x", 3), ("a", 1), ("b", 1))}
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    return {name: value[rank::world] for name, value in drawn.items()}


SHARDED = (
    *("fsdp over a part", "early optimizer", "line search", "layerwise", "scaled", "compiled", "sharded objective"),
    *("learned loss", "tied", "loose", "no samples"),
)


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((self.scale * prediction - target) ** 2).mean()


def sharded_step_of(kind: str, model: mtl.MultiTaskModel, tasks: list[mtl.Task]) -> str:
    """Takes a step with sharded parameters that is refused, and returns the message."""
    options: dict[str, Any] = {
        "line search": {"optimizer": torch.optim.LBFGS},
        "scaled": {"precision": "fp16"},
        "compiled": {"compile": True},
    }.get(kind, {})
    if kind == "layerwise":
        options = {"balancer": mtl.balancers.MGDA(), "gradients": mtl.Gradients("layerwise")}
    if kind == "sharded objective":
        tasks[1] = mtl.Task("b", objective=lambda model, batch: model.features(batch).mean(), count=len)
    if kind == "learned loss":
        tasks[1] = mtl.Task("b", head=nn.Linear(4, 1), loss=Scaled(), target="b", mean_over="samples")
        model = mtl.MultiTaskModel(model.trunk, tasks, inputs=["x"])
    if kind == "tied":
        model.heads["b"].weight = model.heads["a"].weight
    if kind == "loose":
        model.shift = nn.Parameter(torch.zeros(3))
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        if kind == "fsdp over a part":  # each process a copy of its own
            mesh = init_device_mesh("cpu", (mtl.distributed.world_size(), 1), mesh_dim_names=("other", "shard"))
            for module in (model.trunk, *model.heads.values()):
                fully_shard(module, mesh=mesh["shard"])
        else:
            mtl.distributed.prepare(model, "fsdp")
        make = options.pop("optimizer", torch.optim.SGD)
        optimizer = early if kind == "early optimizer" else make(model.parameters(), lr=0.1)
        data = {} if kind == "no samples" and mtl.distributed.rank() else batch()
        mtl.Step(model, tasks, optimizer, **options)(data)
    except mtl.UserError as error:
        return str(error)
    return "nothing"


def synchronised_step_of(kind: str) -> str:
    """Takes a step with synchronised batch norm that is refused, and returns the message."""
    model, tasks = model_of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    mtl.distributed.sync_batchnorm(model)
    mtl.distributed.prepare(model)
    if kind == "norm and objective":
        tasks[1] = mtl.Task("b", objective=lambda model, batch: model.features(batch).mean(), count=len)
    data = {} if kind == "norm and no samples" and mtl.distributed.rank() else batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        mtl.Step(model, tasks, optimizer, compile=kind == "norm and compiled")(data)
    except mtl.UserError as error:
        return str(error)
    return "nothing"


def step_of(kind: str) -> str:
    """Takes a step that is refused, and returns the message."""
    if kind.startswith("norm and "):
        return synchronised_step_of(kind)
    torch.manual_seed(mtl.distributed.rank() if kind == "other values" else 0)
    trunk: nn.Module = nn.Linear(3, 4)
    if kind == "ddp trunk":
        trunk = DistributedDataParallel(trunk)
    if kind == "data parallel trunk":
        trunk = DataParallel(trunk)
    if kind == "fsdp 1 trunk":
        trunk = FullyShardedDataParallel(trunk, device_id=torch.device("cpu"))
    if kind == "composable ddp":
        replicate(trunk)
    if kind == "composable ddp by fsdp":
        replicate_with_fsdp.replicate(trunk)
    if kind == "tensor parallel":
        mesh = init_device_mesh("cpu", (mtl.distributed.world_size(),))
        parallelize_module(trunk, mesh, ColwiseParallel(output_layouts=Replicate()))
    if kind == "fsdp trunk":
        fully_shard(trunk, mesh=init_device_mesh("cpu", (mtl.distributed.world_size(),)))
    if kind == "synchronised norm":
        trunk = nn.Sequential(trunk, nn.SyncBatchNorm(4))
    if kind == "sparse":
        trunk = nn.EmbeddingBag(5, 4, sparse=True)
    model, tasks = model_of(trunk)
    if kind == "unknown loss":
        tasks[1].loss = lambda prediction, target: (prediction - target).square().mean()
    if kind == "objective":
        tasks[1] = mtl.Task("b", objective=lambda model, batch: model.features(batch).mean())
    if kind == "whole_batch":
        tasks[1] = mtl.Task("b", objective=lambda model, batch: model.features(batch).mean(), whole_batch=True)
    if kind == "other tasks" and mtl.distributed.rank():
        tasks.reverse()
    if kind == "other parameters" and mtl.distributed.rank():
        model.trunk.bias.requires_grad_(False)
    if kind in SHARDED:
        return sharded_step_of(kind, model, tasks)
    wrapped: Any = DistributedDataParallel(model) if kind == "ddp model" else model
    if kind == "fsdp model":
        fully_shard(wrapped, mesh=init_device_mesh("cpu", (mtl.distributed.world_size(),)))
    data = batch()
    if kind == "sharded later":
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))
        mtl.distributed.prepare(model, "fsdp")
        try:
            step(data)
        except mtl.UserError as error:
            return str(error)
        return "nothing"
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
        ("data parallel trunk", "'trunk' of the model is wrapped in DataParallel"),
        ("fsdp 1 trunk", "'trunk' of the model is wrapped in FullyShardedDataParallel"),
        ("composable ddp", "'trunk' of the model was given to replicate"),
        ("composable ddp by fsdp", "'trunk' of the model was given to replicate"),
        ("tensor parallel", "'trunk.weight' of the model is sharded and 'heads.a.weight' is not"),
        ("fsdp trunk", "'trunk.weight' of the model is sharded and 'heads.a.weight' is not"),
        ("fsdp model", "the model as a whole is sharded, and a step calls its trunk and heads one by one"),
        ("fsdp over a part", "is divided as"),
        (
            "early optimizer",
            "SGD has none of the sharded parameters; call mtl.distributed.prepare(model, 'fsdp') before",
        ),
        ("line search", "LBFGS joins all parameters into one vector"),
        ("layerwise", "with sharded parameters, layerwise is not supported"),
        ("compiled", "compiled modules with sharded parameters or synchronised batch norm are not supported"),
        ("scaled", "with sharded parameters, take bf16"),
        (
            "sharded objective",
            "task 'b' has an objective, and a process without labels of the task can't run its passes",
        ),
        ("learned loss", "task 'b': its loss has parameters"),
        ("tied", "share a parameter, which fully_shard can't divide"),
        ("loose", "'shift' belongs to the model itself and not to a module that is called"),
        ("no samples", "with sharded parameters or synchronised batch norm each process needs samples of each source"),
        ("whole_batch", "task 'b': with whole_batch its objective needs the whole batch"),
        ("other values", "have different values; call mtl.distributed.prepare(model)"),
        ("other tasks", "have different tasks"),
        ("other parameters", "have different parameters"),
        ("sparse", "sparse=False"),
        ("unknown loss", "Set tasks.b.count or tasks.b.mean_over"),
        ("objective", "Set tasks.b.count"),
        ("sharded later", "the model was sharded after the step was made"),
        ("norm and objective", "task 'b' has an objective, and a process without labels of the task can't run"),
        ("norm and compiled", "compiled modules with sharded parameters or synchronised batch norm are not supported"),
        ("norm and no samples", "synchronised batch norm each process needs samples of each source in each step"),
        ("synchronised norm", "'trunk.1' of the model is a SyncBatchNorm"),
    ],
)
def test_refused(kind: str, part: str) -> None:
    for message in processes(2)(step_of, kind):
        assert part in message


def prepared() -> list[dict[str, torch.Tensor]]:
    """Returns the state of a model before and after it is prepared and after a step, and that of one forward pass."""
    torch.manual_seed(mtl.distributed.rank())
    model, tasks = model_of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model.trunk[1].running_mean.add_(1 + mtl.distributed.rank())
    states = [copy.deepcopy(model.state_dict())]
    mtl.distributed.prepare(model)
    states.append(copy.deepcopy(model.state_dict()))
    forward = copy.deepcopy(model)
    forward.features(batch(7))
    mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))(batch(7))
    return [*states, model.state_dict(), forward.state_dict()]


def test_prepared_models_stay_alike_and_have_the_statistics_of_rank_0() -> None:
    (before, ready, after, alone), theirs = processes(2)(prepared)
    assert_same(ready, before)
    assert_same(theirs[1], before)
    assert_same(theirs[2], after)
    for state in (theirs[0], theirs[3]):  # the process of rank 1 by itself has others
        assert not torch.equal(state["trunk.1.running_mean"], alone["trunk.1.running_mean"])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(after[f"trunk.1.{name}"], alone[f"trunk.1.{name}"])


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
