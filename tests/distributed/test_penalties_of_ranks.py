"""Penalties of architectures in several processes: the numbers of one process."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from conftest import slow_but
from test_kinds_of_steps import check, numbers_of
from test_same_numbers import spread
from torch import Tensor, nn

import mtl
from mtl.architectures import AITM, DSelectK
from mtl.batch import take
from mtl.trunks import MLP

KINDS: dict[str, Any] = {  # with the argument that is the factor of the penalty
    "aitm": (AITM, {}, "calibration"),
    "dselect_k": (partial(DSelectK, experts=3), {"per_sample": True}, "entropy"),
    "dselect_k of the task": (partial(DSelectK, experts=4), {}, "entropy"),
}


def tasks_of(kind: str, whole_batch: bool) -> list[mtl.Task]:
    if kind == "aitm":
        masks = {"first": None, "second": None, "third": "known"}
        return [
            mtl.Task(
                name, head=mtl.heads.Linear(6, 1, squeeze=True), loss=nn.BCEWithLogitsLoss(), target=name, mask=mask
            )
            for name, mask in masks.items()
        ]
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    of_second: dict[str, Any] = {"loss": nn.BCEWithLogitsLoss(), "mask": "known"}
    return [
        mtl.Task("first", head=nn.Linear(6, 3), loss=nn.CrossEntropyLoss(weights), target="first", missing=True),
        mtl.Task(
            "second",
            head=nn.Linear(6, 2),
            target="second",
            **({"loss": spread, "whole_batch": True} if whole_batch else of_second),
        ),
        mtl.Task("third", head=nn.Linear(6, 2), loss=nn.MSELoss(), target="third"),
    ]


def batch_of(kind: str, n: int, seed: int) -> dict[str, Tensor]:
    """A batch with missing labels; those of the second event are missing only where the first one happened."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    known = torch.rand(n, generator=generator) < 0.7
    if kind == "aitm":
        first = (torch.rand(n, generator=generator) < 0.7).double()
        second = first * (torch.rand(n, generator=generator) < 0.6)
        third = second * (torch.rand(n, generator=generator) < 0.5)
        second = torch.where((first > 0) & (torch.rand(n, generator=generator) < 0.3), torch.nan, second)
        return {"x": x, "first": first, "second": second, "third": third, "known": known | ~(third > 0)}
    classes = torch.randint(3, (n,), generator=generator)
    classes[torch.rand(n, generator=generator) < 0.3] = -100
    third = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    third[torch.rand(n, 2, generator=generator) < 0.3] = torch.nan
    second = torch.rand(n, 2, generator=generator, dtype=torch.float64).round()
    return {"x": x, "first": classes, "second": second, "third": third, "known": known}


def train(
    kind: str, balancer: str, how: str, factor: float, whole_batch: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    """Takes steps with this process's share of each batch, and returns all numbers."""
    torch.manual_seed(0)
    architecture, options, name = KINDS[kind]
    tasks = tasks_of(kind, whole_batch)
    model = architecture(lambda: MLP(5, widths=[7, 6]), tasks, inputs=["x"], **options, **{name: factor}).double()
    model.eval()(batch_of(kind, 2, 0))  # gives lazy modules their shapes
    mtl.distributed.prepare(model.train(), how)
    torch.manual_seed(100 + mtl.distributed.rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)(), **settings)
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    sizes = (7, 4, 1, 9) if how == "ddp" else (7, 4, 9)
    batches = [batch_of(kind, sizes[number % len(sizes)], number) for number in range(6)]
    shares = [take(each, len(each["x"]), list(range(len(each["x"])))[rank::world]) for each in batches]
    return numbers_of(step, [share if len(share["x"]) else {} for share in shares])


def compare(world: int, kind: str, balancer: str, how: str, *, whole_batch: bool = False, **settings: Any) -> None:
    alone = check(world, 1e-12, train, kind, balancer, how, 0.5, whole_batch, settings)
    without = train(kind, balancer, how, 0.0, whole_batch, settings)
    assert alone["numbers"] != pytest.approx(without["numbers"], rel=1e-3, nan_ok=True)  # the penalty counts


ALL = [*product(KINDS, ["Equal", "UPGrad", "FAMO", "GradDrop"], [2, 3], ["ddp", "fsdp"])]
QUICK = [*((kind, "UPGrad", 3, "ddp") for kind in KINDS), *((kind, "Equal", 2, "fsdp") for kind in KINDS)]


@pytest.mark.parametrize(("kind", "balancer", "world", "how"), slow_but(QUICK, ALL))
def test_penalties(kind: str, balancer: str, world: int, how: str) -> None:
    compare(world, kind, balancer, how)


@pytest.mark.parametrize("how", slow_but(["ddp"], ["ddp", "fsdp"]))
@pytest.mark.parametrize("settings", [{"micro_batch_size": 2}, {"passes": "sequential"}, {"passes": "joint"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_penalties_in_other_passes(kind: str, settings: dict[str, Any], how: str) -> None:
    compare(3, kind, "UW", how, **settings)


@pytest.mark.parametrize("how", slow_but(["ddp"], ["ddp", "fsdp"]))
@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 2}], ids=str)
def test_penalties_beside_a_loss_of_the_whole_batch(settings: dict[str, Any], how: str) -> None:
    compare(2, "dselect_k", "UPGrad", how, whole_batch=True, **settings)
