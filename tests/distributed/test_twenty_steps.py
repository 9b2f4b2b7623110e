"""After 20 steps, several processes have the numbers of one process, up to the rounding of sums."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from processes import processes
from test_same_numbers import BALANCERS, problem, spoil
from torch import Tensor, nn

import mtl
from mtl.batch import take
from mtl.distributed.sharding import whole

STEPS = 20
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
Numbers = dict[str, list[list[float]]]


class Bags(nn.Module):
    """A trunk whose inputs are bags of ids, of a different size for each sample."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(20, 5)
        self.trunk = trunk

    def forward(self, ids: Tensor, offsets: Tensor) -> Any:
        return self.trunk(self.bags(ids, offsets))


def with_bags(batch: dict[str, Any]) -> dict[str, Any]:
    """Replaces a list of bags with a flat field of ids and the beginning of each bag."""
    lengths = torch.tensor([len(bag) for bag in batch["bags"]])
    flat = {"ids": torch.cat(batch["bags"]), "offsets": lengths.cumsum(0) - lengths}
    return {name: value for name, value in batch.items() if name != "bags"} | flat


class Rooted(nn.Module):
    """A squared error whose gradient is infinite where a label is above 10, while the loss is finite."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        zero = prediction - prediction.detach()
        return ((prediction - target).square() + torch.where(target > 10, zero, 1.0).sqrt()).mean()


def train(
    balancer: str,
    dtype_name: str,
    optimizer_name: str = "SGD",
    *,
    sizes: tuple[int, ...] = (12, 7, 2, 1),
    ragged: bool = False,
    how: str = "ddp",
    spoilt: str = "loss",
    source: str = "auto",
    **settings: Any,
) -> Numbers:
    """Takes 20 steps with this process's share of each batch, and returns all numbers of each step.

    With another `on_nonfinite` than `error`, a loss, or the gradient of a finite loss, is not finite in each third step,
    in one process.
    """
    dtype = getattr(torch, dtype_name)
    made = BALANCERS[balancer]()
    model, tasks, batches = problem(4, STEPS, list(sizes), made.preference != "none", width=16)
    spoil(batches, settings.get("on_nonfinite", "error"))
    if spoilt == "gradient":
        tasks[1] = replace(tasks[1], loss=Rooted(), mean_over="elements")
        for batch in batches:
            batch["y1"].clamp_(max=20)
    if ragged:
        bags = Bags(model.trunk)
        model = mtl.MultiTaskModel(bags, tasks, inputs=["ids", "offsets"])
        batches = [{**b, "bags": [torch.randint(20, (1 + n % 4,)) for n in range(len(b["x"]))]} for b in batches]
    model.to(dtype)
    for task in tasks:
        task.loss.to(dtype)
    mtl.distributed.prepare(model, how)
    torch.manual_seed(100 + mtl.distributed.rank())  # nothing may depend on the random state of a process
    options = {"SGD": {"lr": 0.05, "momentum": 0.9}, "AdamW": {"lr": 0.02}}[optimizer_name]
    optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), **options)
    step = mtl.Step(model, tasks, optimizer, balancer=made, gradients=mtl.Gradients(source, 1), **settings)
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    kinds = ("losses", "weights", "norms", "cosines", "total norm", "parameters", "left out")
    numbers: Numbers = {kind: [] for kind in kinds}
    for batch in batches:
        n = len(batch["x"])
        cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        share: dict[str, Any] = take(cast, n, list(range(n))[rank::world]) if n > rank else {}
        result = step(with_bags(share) if ragged and share else share, measure=True)
        assert result.nonfinite or None not in (result.grad_norms, result.cosines, result.total_norm)
        for kind, values in (
            ("losses", result.losses.values()),
            ("weights", result.weights.values()),
            ("norms", (result.grad_norms or {}).values()),
            ("cosines", (result.cosines or {}).values()),
            ("total norm", [] if result.total_norm is None else [result.total_norm]),
            ("left out", [task.name in result.nonfinite for task in tasks]),
        ):
            numbers[kind].append([float(value) for value in values])
        numbers["parameters"].append([x for p in model.parameters() for x in whole(p.detach()).flatten().tolist()])
    return numbers


def drift(ours: Numbers, theirs: Numbers) -> dict[str, float]:
    """Returns the largest difference of each kind of numbers, relative to the largest number of the kind in a step."""
    drifts = {}
    for kind, steps in theirs.items():
        assert len(ours[kind]) == len(steps) == STEPS
        drifts[kind] = 0.0
        for one, other in zip(ours[kind], steps, strict=True):
            mine, reference = torch.tensor([one, other], dtype=torch.float64)
            # A maximum of NaN would count as no difference; only the cosines of a gradient of zero are NaN, in both.
            assert torch.equal(mine.isnan(), reference.isnan()), kind
            assert kind == "cosines" or not reference.isnan().any(), kind
            mine, reference = mine.nan_to_num(), reference.nan_to_num()
            largest = 1.0 if kind in ("cosines", "left out") else float(reference.abs().max()) if one else 0.0
            drifts[kind] = max(drifts[kind], float((mine - reference).abs().max()) / largest if one else 0.0)
    return drifts


def together(world: int, *arguments: Any, **settings: Any) -> Numbers:
    """Returns the numbers of the first of several processes, after a comparison with those of the others."""
    numbers = processes(world)(train_with, arguments, settings)
    for others in numbers[1:]:
        assert others == numbers[0]  # bit-equal
    return numbers[0]


def train_with(arguments: tuple[Any, ...], settings: dict[str, Any]) -> Numbers:
    return train(*arguments, **settings)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("world", "balancer", "settings"),
    [
        (2, "Equal", {"passes": "joint"}),
        (2, "UPGrad", {"on_nonfinite": "skip_task", "spoilt": "gradient"}),
        (2, "UW", {"ragged": True}),
        (3, "UPGrad", {"ragged": True}),
        (2, "UPGrad", {"how": "fsdp", "sizes": (12, 7, 4)}),
        (3, "UW", {"how": "fsdp", "sizes": (12, 7, 4), "passes": "joint"}),
        (4, "PCGrad", {"update": mtl.Update(clip_norm=0.1)}),
        (3, "FAMO", {"on_nonfinite": "skip_step"}),
        (3, "UPGrad", {"source": "representation", "passes": "shared"}),
        (4, "MGDA", {"source": "representation", "passes": "shared", "how": "fsdp", "sizes": (12, 7, 4)}),
        (2, "UPGrad", {"ragged": True, "how": "fsdp", "sizes": (12, 7, 4)}),
        (4, "UW", {"ragged": True, "how": "fsdp", "sizes": (12, 7, 4)}),
    ],
)
def test_twenty_steps(world: int, balancer: str, settings: dict[str, Any], dtype: str) -> None:
    alone = train(balancer, dtype, **settings)
    drifts = drift(together(world, balancer, dtype, **settings), alone)
    assert max(drifts.values()) <= TOLERANCE[dtype], drifts
    check_left_out(alone, settings)


def check_left_out(numbers: Numbers, settings: dict[str, Any]) -> None:
    """Checks that a task was left out in each third step if a loss or gradient was made not finite, and in no other."""
    steps = [number for number, tasks in enumerate(numbers["left out"]) if any(tasks)]
    assert steps == (list(range(1, STEPS, 3)) if "on_nonfinite" in settings else [])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("balancer", BALANCERS)
def test_twenty_steps_of_each_balancer(balancer: str, optimizer: str) -> None:
    """In float32, a step may amplify rounding, as does a division by a small norm or by the root of a small square.

    What several processes may differ then is what one process differs that sums micro-batches of three samples.
    """
    for dtype, tolerance in TOLERANCE.items():
        alone = train(balancer, dtype, optimizer)
        if dtype == "float32":
            own = drift(train(balancer, dtype, optimizer, micro_batch_size=3), alone)
            tolerance = max(tolerance, 8 * max(own.values()))
            assert tolerance < 1e-4
        for world in (2, 3, 4):
            drifts = drift(together(world, balancer, dtype, optimizer), alone)
            assert max(drifts.values()) <= tolerance, (dtype, world, drifts)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("balancer", ["Equal", "UPGrad", "GradVac", "FAMO"])
@pytest.mark.parametrize(
    "settings",
    [
        {"passes": "joint"},
        {"passes": "sequential"},
        {"passes": "shared"},
        {"micro_batch_size": 2},
        {"num_micro_batches": 2},
        {"update": mtl.Update(clip_norm=0.1, clip_shared_norm=0.05)},
        {"on_nonfinite": "skip_task"},
        {"on_nonfinite": "skip_step"},
        {"on_nonfinite": "skip_task", "spoilt": "gradient"},
        {"how": "fsdp", "sizes": (12, 7, 4), "on_nonfinite": "skip_task", "spoilt": "gradient"},
        {"ragged": True},
        {"how": "fsdp", "sizes": (12, 7, 4), "ragged": True},
        {"sizes": (40, 23, 4, 1)},
        {"how": "fsdp", "sizes": (12, 7, 4)},
        {"how": "fsdp", "sizes": (12, 7, 4), "passes": "sequential"},
        {"how": "fsdp", "sizes": (12, 7, 4), "micro_batch_size": 2},
        {"how": "fsdp", "sizes": (12, 7, 4), "update": mtl.Update(clip_norm=0.1, clip_shared_norm=0.05)},
    ],
    ids=str,
)
def test_twenty_steps_with_each_setting(balancer: str, settings: dict[str, Any], world: int) -> None:
    alone = train(balancer, "float64", **settings)
    drifts = drift(together(world, balancer, "float64", **settings), alone)
    assert max(drifts.values()) <= TOLERANCE["float64"], drifts
    check_left_out(alone, settings)
