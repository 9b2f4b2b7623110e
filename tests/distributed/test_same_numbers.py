"""Several processes take the steps that one process takes with the whole batches."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import processes
from torch import Tensor, nn

import mtl
from mtl.batch import take
from mtl.distributed.sharding import whole
from mtl.gradients import at_features
from mtl.step import compiling

BALANCERS: dict[str, Any] = {
    name: getattr(mtl.balancers, name)
    for name in mtl.balancers.__all__
    if isinstance(getattr(mtl.balancers, name), type) and name not in {"Balancer", "TorchJD", "Manual"}
}
DTYPE = torch.float64


def problem(
    count: int, steps: int, sizes: list[int], weighted: bool, width: int = 8
) -> tuple[mtl.MultiTaskModel, list[mtl.Task], list[dict[str, Tensor]]]:
    """A model with tasks of four kinds of losses, some labels of which are missing, and batches of several sizes."""
    torch.manual_seed(0)
    kinds = [
        (nn.Linear(6, 3), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=DTYPE)), {}),
        (nn.Linear(6, 2), nn.MSELoss(), {}),
        (nn.Linear(6, 2), nn.BCEWithLogitsLoss(), {"mask": "known"}),
        (nn.Linear(6, 4), nn.CrossEntropyLoss(), {"missing": True}),
    ]
    tasks = [
        mtl.Task(f"t{n}", head=head, loss=loss, target=f"y{n}", weight=1.0 + n / 4 if weighted else 1.0, **more)
        for n, (head, loss, more) in enumerate(kinds[:count])
    ]
    trunk = nn.Sequential(
        *(
            nn.Linear(5, width),
            nn.Tanh(),
            nn.Linear(width, width, bias=False),
            nn.Tanh(),
            nn.Linear(width, 6),
            nn.Tanh(),
        )
    )
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"]).to(DTYPE)
    batches = []
    for number in range(steps):
        n = sizes[number % len(sizes)]
        numbers = torch.randn(n, 2, dtype=DTYPE)
        numbers[torch.rand(n, 2) < 0.3] = torch.nan
        classes = torch.randint(4, (n,))
        classes[1:] = -100  # the labels of one sample alone, so that the task is absent in most processes
        batches.append(
            {
                "x": torch.randn(n, 5, dtype=DTYPE),
                "y0": torch.randint(3, (n,)),
                "y1": numbers,
                "y2": torch.rand(n, 2, dtype=DTYPE).round(),
                "known": torch.rand(n) < 0.6,
                "y3": classes if number % 3 else torch.full((n,), -100),
            }
        )
    return model, tasks, batches


def spoil(batches: list[dict[str, Tensor]], on_nonfinite: str) -> None:
    """Makes a target of one sample infinite in some batches, and so a loss in one process, where that is no error."""
    if on_nonfinite != "error":
        for number, batch in enumerate(batches):
            if number % 3 == 1:
                batch["y1"][-1] = torch.inf


def train(setting: dict[str, Any]) -> dict[str, Any]:
    """Takes some steps with this process's share of each batch, and returns all numbers."""
    settings = dict(setting)
    balancer = BALANCERS[settings.pop("balancer")]()
    weighted = balancer.preference != "none"
    model, tasks, batches = problem(
        settings.pop("count"), settings.pop("steps"), settings.pop("sizes"), weighted, settings.pop("width")
    )
    spoil(batches, settings.get("on_nonfinite", "error"))
    if settings.pop("norm"):
        model.trunk.insert(1, nn.BatchNorm1d(8, dtype=DTYPE))
        model.heads["t2"] = tasks[2].head = nn.Sequential(nn.BatchNorm1d(6, dtype=DTYPE, momentum=None), tasks[2].head)
        mtl.distributed.sync_batchnorm(model)
    if settings.pop("whole"):
        tasks[1] = replace(tasks[1], loss=successive, whole_batch=True, mean_over="elements")
        tasks[2] = replace(tasks[2], loss=spread, whole_batch=True)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    mtl.distributed.prepare(model, settings.pop("how"))
    torch.manual_seed(100 + mtl.distributed.rank())  # nothing may depend on the random state of a process
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    gradients = mtl.Gradients(settings.pop("source"), settings.pop("every"))
    update = mtl.Update(clip_norm=settings.pop("clip"), clip_shared_norm=settings.pop("clip_shared"))
    step = mtl.Step(model, tasks, optimizer, balancer=balancer, gradients=gradients, update=update, **settings)
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    record: dict[str, list[Any]] = {"losses": [], "weights": [], "norms": [], "cosines": [], "total": [], "reach": []}
    record["nonfinite"] = []
    for number, batch in enumerate(batches):
        n = len(batch["x"])
        share = take(batch, n, list(range(n))[rank::world]) if n > rank else {}
        result = step(share, measure=number % 2 == 0)
        record["nonfinite"].append(result.nonfinite)
        record["losses"].append({k: float(v) for k, v in result.losses.items()})
        record["weights"].append({k: float(v) for k, v in result.weights.items()})
        if result.grad_norms is not None and result.cosines is not None:
            record["norms"].append({k: float(v) for k, v in result.grad_norms.items()})
            record["cosines"].append({k: float(v) for k, v in result.cosines.items()})
            record["total"].append(None if result.total_norm is None else float(result.total_norm))
            record["reach"].append(result.reach)
    step.epoch_end()
    return {**record, "parameters": {k: whole(v).tolist() for k, v in model.state_dict().items()}}


def assert_close(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key, value in theirs.items():
            assert_close(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for number, value in enumerate(theirs):
            assert_close(ours[number], value, f"{where}[{number}]")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-6 if ".weights" in where else 1e-9, abs=1e-9, nan_ok=True), where
    else:
        assert ours == theirs, where


DEFAULT = {
    "count": 4,
    "steps": 6,
    "sizes": [12, 7, 2, 1],
    "width": 8,
    "balancer": "Equal",
    "source": "auto",
    "every": 1,
    "clip": None,
    "clip_shared": None,
    "how": "ddp",
    "norm": False,
    "whole": False,
}


def check(world: int, **setting: Any) -> None:
    setting = DEFAULT | setting
    alone = train(setting)
    together = processes(world)(train, setting)
    for other in together[1:]:
        assert other == together[0]  # bit-equal in all processes
    assert_close(together[0], alone)


@pytest.mark.parametrize("balancer", BALANCERS)
def test_each_balancer(balancer: str) -> None:
    check(2, balancer=balancer)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("on_nonfinite", ["skip_step", "skip_task"])
@pytest.mark.parametrize("balancer", ["Equal", "UW", "UPGrad", "FAMO"])
def test_a_loss_that_is_not_finite_in_one_process(balancer: str, on_nonfinite: str, how: str) -> None:
    setting = {"balancer": balancer, "on_nonfinite": on_nonfinite, "how": how, "sizes": [12, 7]}
    check(2, **setting)
    assert [list(each) for each in train(DEFAULT | setting)["nonfinite"]] == [[], ["t1"], [], [], ["t1"], []]


SETTINGS = {  # of steps with any parameters
    "balancer": st.sampled_from(["Equal", "UW", "MGDA", "UPGrad", "PCGrad", "GradDrop", "FAMO", "IMTL"]),
    "passes": st.sampled_from(["joint", "sequential", "shared"]),
    "micro": st.sampled_from([{}, {"micro_batch_size": 2}, {"num_micro_batches": 2}]),
    "clip": st.sampled_from([{}, {"clip": 0.1}, {"clip_shared": 0.05}, {"clip": 0.1, "clip_shared": 0.05}]),
    "count": st.integers(1, 4),
    "every": st.sampled_from([1, 2]),
    "on_nonfinite": st.sampled_from(["error", "skip_step", "skip_task"]),
}


def check_drawn(world: int, setting: dict[str, Any], **more: Any) -> None:
    """Checks a setting that was drawn from `SETTINGS`; a balancer that works on rows needs them in each step."""
    every = 1 if setting["balancer"] == "GradDrop" else setting["every"]
    rest = {key: value for key, value in setting.items() if key not in ("micro", "clip")}
    check(world, **{**rest, **setting["micro"], **setting["clip"], **more, "every": every})


@settings(max_examples=12)
@given(
    world=st.sampled_from([2, 3, 4]),
    setting=st.fixed_dictionaries(SETTINGS),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_all_settings(world: int, setting: dict[str, Any], sizes: list[int]) -> None:
    check_drawn(world, setting, sizes=sizes)


@pytest.mark.parametrize("world", [2, 3])
def test_gramian_at_the_representation(world: int) -> None:
    check(world, balancer="MGDA", source="representation", passes="shared")


def gathered(setting: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """Trains, and returns the numbers and how many layers each step has gathered."""
    numbers: list[int] = []
    gather, choose = at_features.gather, at_features.choose

    def counted(*arguments: Any, **options: Any) -> Any:
        chosen = choose(*arguments, **options)
        numbers.append(len(chosen))
        return chosen

    at_features.choose = counted
    try:
        return train(setting), numbers
    finally:
        at_features.gather, at_features.choose = gather, choose


@pytest.mark.parametrize("source", ["auto", "layerwise"])
@pytest.mark.parametrize("world", [2, 3])
def test_layers_that_are_gathered(world: int, source: str) -> None:
    setting = DEFAULT | {"balancer": "UPGrad", "passes": "shared", "source": source, "width": 64, "sizes": [9, 4, 1]}
    alone = train(setting)
    together = processes(world)(gathered, setting)
    assert together[0][1] == [2, 3, 3, 2, 3, 3]  # the first layer has 5 inputs, fewer than 9 samples
    for numbers, _ in together[1:]:
        assert numbers == together[0][0]
    assert_close(together[0][0], alone)


def successive(prediction: Tensor, target: Tensor) -> Tensor:
    """A loss that depends on the order of the samples."""
    difference = (prediction - target).flatten()
    return (difference * difference.roll(1)).mean().square()


def spread(prediction: Tensor, target: Tensor) -> Tensor:
    """A loss that is no mean over samples."""
    return (prediction - target).square().mean().sqrt() + prediction.std(unbiased=False)


@settings(max_examples=6)
@given(
    world=st.sampled_from([2, 3, 4]),
    how=st.sampled_from(["ddp", "fsdp"]),
    balancer=st.sampled_from(["Equal", "UW", "UPGrad", "GradDrop", "FAMO"]),
    passes=st.sampled_from(["joint", "sequential", "shared"]),
    micro=st.sampled_from([{}, {"micro_batch_size": 2}, {"num_micro_batches": 2}]),
    sizes=st.lists(st.integers(4, 9), min_size=1, max_size=4),
)
def test_losses_of_the_whole_batch(
    world: int, how: str, balancer: str, passes: str, micro: dict[str, int], sizes: list[int]
) -> None:
    sizes = sizes if how == "fsdp" else [*sizes, 1, 2]
    check(world, how=how, balancer=balancer, passes=passes, sizes=sizes, whole=True, **micro)


def compiled(setting: dict[str, Any]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "BACKEND", "aot_eager")
        return train(setting | {"compile": True})


@pytest.mark.slow
@pytest.mark.parametrize("balancer", ["Equal", "UPGrad"])
def test_compiled_modules(balancer: str) -> None:
    setting = DEFAULT | {"balancer": balancer, "sizes": [12, 7], "steps": 2, "num_micro_batches": 2}
    for each in processes(2)(compiled, setting):
        assert_close(each, train(setting))
