"""Sharded parameters, and batch norm over all processes: the numbers of one process, or of replicas."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import processes
from test_same_numbers import BALANCERS, DTYPE, SETTINGS, check, check_drawn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mtl
from mtl.distributed.sharding import whole
from mtl.recompute import recompute


@pytest.mark.parametrize("balancer", BALANCERS)
def test_each_balancer_with_sharded_parameters(balancer: str) -> None:
    check(2, balancer=balancer, how="fsdp", sizes=[12, 7, 2])


@settings(max_examples=8)
@given(
    world=st.sampled_from([2, 3, 4]),
    setting=st.fixed_dictionaries(SETTINGS),
    sizes=st.lists(st.integers(4, 9), min_size=1, max_size=4),
    how=st.sampled_from(["fsdp", "hsdp"]),
    source=st.sampled_from(["auto", "representation"]),
)
def test_all_settings_with_sharded_parameters(
    world: int, setting: dict[str, Any], sizes: list[int], how: str, source: str
) -> None:
    at_features = setting["passes"] == "shared" and setting["balancer"] != "GradDrop" and not setting["micro"]
    how = "fsdp" if world == 3 else how
    check_drawn(world, setting, sizes=sizes, how=how, source=source if at_features else "auto")


def varied(how: str, precision: str) -> dict[str, Any]:
    """Trains a model with batch norm, dropout, recomputed activations and temporarily frozen parameters."""
    torch.manual_seed(0)
    tasks = [mtl.Task(f"t{n}", head=nn.Linear(6, 2), loss=nn.MSELoss(), target=f"y{n}") for n in range(3)]
    block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3))
    trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), block, nn.Linear(8, 6))
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    recompute(model, ["trunk.2"])
    model.freeze(["trunk.0"], until=2)
    mtl.distributed.prepare(model, how)
    torch.manual_seed(mtl.distributed.rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    step = mtl.Step(model, tasks, optimizer, balancer=mtl.balancers.UPGrad(), precision=precision)
    losses = []
    for number in range(5):
        generator = torch.Generator().manual_seed(10 * number + mtl.distributed.rank())
        batch = {"x": torch.randn(6, 5, generator=generator)}
        batch |= {f"y{n}": torch.randn(6, 2, generator=generator) for n in range(3)}
        losses.append({name: float(loss) for name, loss in step(batch, measure=number == 3).losses.items()})
    return {"losses": losses, "state": {k: whole(v).tolist() for k, v in model.state_dict().items()}}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_sharded_parameters_are_those_of_replicas(precision: str, tolerance: float) -> None:
    replicated = processes(2)(varied, "ddp", precision)
    sharded = processes(2)(varied, "fsdp", precision)
    assert sharded[0] == sharded[1]
    assert len({repr(losses) for losses in sharded[0]["losses"]}) == 5
    ours, theirs = (torch.tensor(tree_leaves(each)) for each in (sharded[0], replicated[0]))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=8)
@given(
    world=st.sampled_from([2, 3, 4]),
    how=st.sampled_from(["ddp", "fsdp"]),
    balancer=st.sampled_from(["Equal", "UW", "UPGrad", "GradDrop", "FAMO"]),
    passes=st.sampled_from(["joint", "sequential", "shared"]),
    sizes=st.lists(st.integers(4, 9), min_size=1, max_size=4),
)
def test_batch_norm_over_all_processes(world: int, how: str, balancer: str, passes: str, sizes: list[int]) -> None:
    check(world, how=how, balancer=balancer, passes=passes, sizes=sizes, norm=True)


def test_batch_norm_over_all_processes_is_that_of_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 5, dtype=DTYPE)
    for momentum in (0.1, None):
        theirs = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum, dtype=DTYPE))
        parts = processes(2)(normalised, theirs.state_dict(), momentum, x)
        y = theirs(x)
        y = theirs(y.cos())
        (y**3).sum().backward()
        torch.testing.assert_close(torch.stack([parts[n % 2][0][n // 2] for n in range(6)]), y.detach())
        for gradient, parameter in zip(
            zip(*(part[1] for part in parts), strict=True), theirs.parameters(), strict=True
        ):
            torch.testing.assert_close(sum(gradient), parameter.grad)
        for _, _, state in parts:
            torch.testing.assert_close(state, dict(theirs.state_dict()))


def normalised(state: dict[str, Tensor], momentum: float | None, x: Tensor) -> Any:
    """Normalises this process's share twice, and returns outputs, gradients and the state of the module."""
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum, dtype=DTYPE))
    model.load_state_dict(state)
    mtl.distributed.sync_batchnorm(model)
    y = model(x[mtl.distributed.rank() :: mtl.distributed.world_size()])
    y = model(y.cos())
    (y**3).sum().backward()
    return y.detach(), [p.grad for p in model.parameters()], dict(model.state_dict())
