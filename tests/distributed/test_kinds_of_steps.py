"""Tasks with data of their own, objectives, schedules, line searches and precisions: the numbers of one process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from processes import processes
from torch import Tensor, nn

import mtl
from mtl.batch import take
from mtl.data import Fields, Loader, Mix
from mtl.distributed.collectives import sum_numbers
from mtl.distributed.sharding import whole
from mtl.schedule import Schedule

SOURCES = {"first": "one", "second": "two", "third": "one"}  # of each task
SIZES = {"one": (20, 6), "two": (9, 4)}  # samples and batch size; the last batches have two samples and one
WORKS = ["Equal", "UW", "UPGrad", "FAMO", "GradDrop"]  # a balancer of each kind


def fields(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randn(count, size, generator=generator, dtype=torch.float64)
        for name, size in (("x", 5), ("first", 1), ("third", 2))
    }
    drawn["third"][torch.rand(count, 2, generator=generator) < 0.3] = torch.nan
    return {**drawn, "second": torch.randint(3, (count,), generator=generator)}


def model_of(dtype: torch.dtype, **weights: Any) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    torch.manual_seed(0)
    kinds: dict[str, tuple[int, nn.Module]] = {
        "first": (1, nn.MSELoss()),
        "second": (3, nn.CrossEntropyLoss()),
        "third": (2, nn.MSELoss()),
    }
    tasks = [
        mtl.Task(name, head=nn.Linear(6, size), loss=loss, target=name, weight=weights.get(name, 1.0))
        for name, (size, loss) in kinds.items()
    ]
    trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
    return mtl.MultiTaskModel(trunk, tasks, inputs=["x"]).to(dtype), tasks


def shares(dtype: torch.dtype, steps: int, sizes: tuple[int, ...] = (7, 4, 1, 8)) -> Iterator[dict[str, Any]]:
    """Yields this process's share of each batch."""
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    for number in range(steps):
        n = sizes[number % len(sizes)]
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fields(n, number).items()}
        yield take(batch, n, list(range(n))[rank::world]) if n > rank else {}


def numbers_of(step: mtl.Step, batches: Any) -> dict[str, Any]:
    """Takes the steps, and returns the numbers of each and the parameters at the end."""
    results = [step(batch, measure=number % 2 == 0) for number, batch in enumerate(batches)]
    return {
        "names": [list(result.losses) for result in results],
        "taken": [result.taken for result in results],
        "numbers": [
            float(value)
            for result in results
            for kind in (result.losses, result.weights, result.grad_norms or {}, result.cosines or {})
            for value in kind.values()
        ],
        "parameters": [x for p in step.model.parameters() for x in whole(p.detach()).flatten().tolist()],
    }


def check(world: int, tolerance: float, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Compares the numbers of several processes with those of one, which it returns."""
    alone: dict[str, Any] = function(*arguments)
    together = processes(world)(function, *arguments)
    for other in together[1:]:
        assert repr(other) == repr(together[0])  # bit-equal, and NaN where the other one has NaN
    for kind in ("names", "taken"):
        assert together[0][kind] == alone[kind]
    for kind in ("numbers", "parameters"):
        ours, theirs = (torch.tensor(each[kind], dtype=torch.float64) for each in (together[0], alone))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    return alone


def on_sources(sampling: str, balancer: str, dtype_name: str, how: dict[str, int]) -> dict[str, Any]:
    dtype = getattr(torch, dtype_name)
    model, tasks = model_of(dtype)
    loaders = {
        name: Loader(
            Fields({k: v.to(dtype) if v.is_floating_point() else v for k, v in fields(count, 7).items()}),
            batch_size=size,
            shuffle=True,
            **how,
        )
        for name, (count, size) in SIZES.items()
    }
    mix = Mix(loaders, SOURCES, sampling=sampling, epoch=8, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)(), **how)
    batches = list(mix.batches(1))
    numbers = numbers_of(step, batches)
    return {**numbers, "names": [*numbers["names"], sum_numbers([sum(map(num_samples, batches))])]}


def num_samples(batch: Any) -> int:
    """Returns the number of samples of a batch by task name, or of a list of these; tasks may share a batch."""
    dicts = batch if isinstance(batch, list) else [batch]
    return sum(len(fields.get("x", ())) for each in dicts for fields in {id(f): f for f in each.values()}.values())


@pytest.mark.parametrize("balancer", WORKS)
@pytest.mark.parametrize("sampling", ["all", "proportional"])
@pytest.mark.parametrize("world", [2, 3])
def test_tasks_with_data_of_their_own(world: int, sampling: str, balancer: str) -> None:
    alone = check(world, 1e-12, on_sources, sampling, balancer, "float64", {})
    sets = {tuple(names) for names in alone["names"][:-1]}
    each = {("first", "third"), ("second",)}
    assert sets == ({("first", "second", "third")} if sampling == "all" else each)


@pytest.mark.parametrize("how", [{"micro_batch_size": 2}, {"num_micro_batches": 2}], ids=str)
@pytest.mark.parametrize("sampling", ["all", "proportional"])
def test_micro_batches_of_tasks_with_data_of_their_own(sampling: str, how: dict[str, int]) -> None:
    check(3, 1e-12, on_sources, sampling, "UPGrad", "float64", how)


@pytest.mark.parametrize("sampling", ["all", "proportional"])
def test_tasks_with_data_of_their_own_in_float32(sampling: str) -> None:
    check(3, 1e-6, on_sources, sampling, "UPGrad", "float32", {})


def smooth(model: mtl.MultiTaskModel, batch: dict[str, Tensor]) -> Tensor:
    """An objective that is a mean over the samples."""
    x = batch["x"]
    return (model.features({"x": x}) - model.features({"x": x + 0.1})).square().sum(1).mean()


def on_objectives(balancer: str, passes: str, how: dict[str, int]) -> dict[str, Any]:
    model, tasks = model_of(torch.float64)
    tasks[0] = mtl.Task("first", objective=smooth, count=lambda batch: len(batch["x"]))
    model = mtl.MultiTaskModel(model.trunk, tasks, inputs=["x"]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)(), passes=passes, **how)
    return numbers_of(step, shares(torch.float64, 6))


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize(
    ("balancer", "passes"), [("Equal", "joint"), ("UW", "auto"), ("UPGrad", "auto"), ("GradDrop", "sequential")]
)
@pytest.mark.parametrize("world", [2, 3])
def test_objectives(world: int, balancer: str, passes: str, how: dict[str, int]) -> None:
    check(world, 1e-12, on_objectives, balancer, passes, how)


def on_schedule(balancer: str) -> dict[str, Any]:
    weights = {"first": Schedule(start=1.0, end=0.0, steps=4), "third": Schedule(start=0.0, end=2.0, steps=5)}
    model, tasks = model_of(torch.float64, **weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)())
    return numbers_of(step, shares(torch.float64, 8))


@pytest.mark.parametrize("balancer", ["Equal", "UPGrad"])
@pytest.mark.parametrize("world", [2, 3])
def test_weights_that_depend_on_the_step(world: int, balancer: str) -> None:
    names = check(world, 1e-12, on_schedule, balancer)["names"]
    assert names[0] == ["first", "second"]  # the third one begins with a weight of zero, and the first one ends with it
    assert names[5] == ["second", "third"]


def on_line_search(balancer: str, how: dict[str, int]) -> dict[str, Any]:
    model, tasks = model_of(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)(), **how)
    numbers = numbers_of(step, shares(torch.float64, 5))
    return {**numbers, "names": [numbers["names"], optimizer.state[next(model.parameters())]["func_evals"]]}


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize("balancer", ["Equal", "UPGrad"])
@pytest.mark.parametrize("world", [2, 3])
def test_line_searches(world: int, balancer: str, how: dict[str, int]) -> None:
    """A line search divides by differences of gradients, which amplifies rounding."""
    alone = check(world, 1e-8, on_line_search, balancer, how)
    assert alone["names"][1] > 2 * 5  # evaluations of the closure


def in_half(precision: str, balancer: str) -> dict[str, Any]:
    """Takes steps in half precision; in fp16, the gradient of one sample of the third one overflows, in one process.

    The weights keep the scaled gradients of the other steps in the range of fp16, whatever the number of processes.
    """
    model, tasks = model_of(torch.float32, first=0.01, second=0.01, third=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    made = getattr(mtl.balancers, balancer)()
    step = mtl.Step(model, tasks, optimizer, balancer=made, precision=precision)
    batches = [*shares(torch.float32, 6, sizes=(7, 6))]
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    if precision == "fp16" and rank == min(1, world - 1):
        batches[2]["first"][1 if world == 1 else 0] = 3e4  # the second sample of the batch
    numbers = numbers_of(step, batches)
    return {**numbers, "names": [numbers["names"], step.scaler.get_scale() if step.scaler else None]}


# With UPGrad, whose rows are scaled one by one, which steps overflow in fp16 depends on how the batch is divided.
@pytest.mark.parametrize(
    ("precision", "balancer", "tolerance"), [("bf16", "Equal", 5e-2), ("bf16", "UPGrad", 5e-2), ("fp16", "Equal", 1e-2)]
)
@pytest.mark.parametrize("world", [2, 3])
def test_half_precision(world: int, precision: str, balancer: str, tolerance: float) -> None:
    alone = check(world, tolerance, in_half, precision, balancer)
    assert alone["taken"] == [True, True, precision == "bf16", True, True, True]
    assert alone["names"][1] == (32_768.0 if precision == "fp16" else None)
