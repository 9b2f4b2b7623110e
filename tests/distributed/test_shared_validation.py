"""Samples are divided over the processes, and validated, as in one process."""

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torchmetrics
from processes import processes
from torch import nn

import mtl
from mtl.data import Fields
from mtl.metrics import DepthErrors, GroupAUROC, Named, NormalAngles
from mtl.training.validation import Validation


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


class Unsynchronised(torchmetrics.Metric):
    """A metric that adds up in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        self.total += float(target.sum())

    def compute(self) -> torch.Tensor:
        return torch.tensor(self.total)


def validated(metric: Any, count: int, how: str = "ddp") -> Any:
    """Validates with a metric, and returns the figures or the message."""
    torch.manual_seed(0)
    head = nn.Linear(4, 3)
    loss = (
        {"loss": _ordered, "whole_batch": True, "output": "logits"}
        if how == "whole"
        else {"loss": nn.CrossEntropyLoss()}
    )
    task = mtl.Task("a", head=head, target="a", metrics={"m": metric}, **loss)
    model = mtl.MultiTaskModel(nn.Linear(3, 4), [task], inputs=["x"])
    mtl.distributed.prepare(model, "fsdp" if how == "fsdp" else "ddp")
    generator = torch.Generator().manual_seed(1)
    fields = {"x": torch.randn(count, 3, generator=generator), "a": torch.randint(3, (count,), generator=generator)}
    loader = mtl.data.Loader(Fields(fields), batch_size=4)
    try:
        return Validation(model, [task], nullcontext)(loader)["a"]
    except mtl.UserError as error:
        return str(error)


def validated_twice(how: str) -> Any:
    """Validates two tasks, one with a loss of the whole batch, on splits whose last batch has one sample."""
    torch.manual_seed(0)
    tasks = [
        mtl.Task("a", head=nn.Linear(4, 3), loss=_ordered, target="a", whole_batch=True),
        mtl.Task("b", head=nn.Linear(4, 3), loss=nn.CrossEntropyLoss(), target="a"),
    ]
    model = mtl.MultiTaskModel(nn.Linear(3, 4), tasks, inputs=["x"])
    mtl.distributed.prepare(model, how)
    generator = torch.Generator().manual_seed(1)
    fields = {"x": torch.randn(9, 3, generator=generator), "a": torch.randint(3, (9,), generator=generator)}
    figures = Validation(model, tasks, nullcontext)(mtl.data.Loader(Fields(fields), batch_size=4))
    return [value for of_task in figures.values() for value in of_task.values()]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_without_samples_communicate_in_the_order_of_the_others(world: int) -> None:
    alone = validated_twice("ddp")
    for figures in processes(world)(validated_twice, "fsdp"):
        assert figures == pytest.approx(alone, rel=1e-5)


def _ordered(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that depends on the order of the samples and is no mean over them."""
    return (nn.functional.cross_entropy(prediction, target) * prediction * prediction.roll(1, 0)).std()


@pytest.mark.parametrize("how", ["fsdp", "whole"])
@pytest.mark.parametrize("count", [9, 13])
def test_validation_is_that_of_one_process(how: str, count: int) -> None:
    metric = partial(torchmetrics.classification.MulticlassAccuracy, 3)
    alone = validated(metric, count, how)
    for world in (2, 3):
        for figures in processes(world)(validated, metric, count, how):
            assert figures == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("count", [9, 12, 13])
@pytest.mark.parametrize("name", ["MulticlassAUROC", "MulticlassAccuracy", "MulticlassCalibrationError"])
def test_metrics_are_exact_over_uneven_shares(name: str, count: int) -> None:
    """The last batch of 9 or 13 samples has one sample, which one process gets."""
    metric = partial(getattr(torchmetrics.classification, name), num_classes=3)
    expected = validated(metric, count)
    for figures in processes(3)(validated, metric, count):
        assert figures == pytest.approx(expected, rel=1e-6)


def test_a_metric_that_is_not_synchronised_is_refused() -> None:
    for message in processes(2)(validated, Unsynchronised, 9):
        assert "task 'a': 'm' has different values in the processes" in message


def several_figures(labelled: list[int], count: int) -> tuple[dict[str, float], list[str]]:
    """Validates metrics with several figures, and one of groups, on `count` samples; only some of them have labels.

    Returns the figures and the warnings.
    """
    torch.manual_seed(0)
    per_class = torchmetrics.classification.MulticlassJaccardIndex
    maps = {"mean_over": "positions", "output": "values"}
    heads = {size: nn.Sequential(nn.Linear(4, 4 * size), nn.Unflatten(1, (size, 2, 2))) for size in (1, 3)}
    angle, depth = {"angle": NormalAngles}, {"depth": DepthErrors}
    gauc, iou = {"gauc": partial(GroupAUROC, "user")}, {"iou": lambda: Named(per_class(3, average="none"), "pqr")}
    tasks = [
        mtl.Task("a", head=heads[3], loss=mtl.losses.CosineDistance(), target="normal", metrics=angle, **maps),
        mtl.Task("b", head=heads[1], loss=nn.L1Loss(), target="depth", metrics=depth, output="values"),
        mtl.Task(
            "c", head=mtl.heads.Linear(4, 1, squeeze=True), loss=nn.BCEWithLogitsLoss(), target="click", metrics=gauc
        ),
        mtl.Task("d", head=nn.Linear(4, 3), loss=nn.CrossEntropyLoss(), target="kind", metrics=iou),
    ]
    model = mtl.MultiTaskModel(nn.Linear(3, 4), tasks, inputs=["x"])
    mtl.distributed.prepare(model)
    generator = torch.Generator().manual_seed(1)
    fields = {
        "x": torch.randn(count, 3, generator=generator),
        "normal": torch.randn(count, 3, 2, 2, generator=generator),
        "depth": torch.rand(count, 1, 2, 2, generator=generator),
        "click": torch.randint(2, (count,), generator=generator).float(),
        "kind": torch.randint(3, (count,), generator=generator),
        "user": torch.randint(3, (count,), generator=generator),
    }
    fields["normal"][:, :, 0, 1], fields["depth"][:, :, 0, 1] = torch.nan, torch.nan
    without = [number for number in range(count) if number not in labelled]
    fields["kind"][without] = -100
    for name in ("normal", "depth", "click"):
        fields[name][without] = torch.nan
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        figures = Validation(model, tasks, nullcontext)(mtl.data.Loader(Fields(fields), batch_size=4))
    named = {f"{task}/{name}": value for task, of_task in figures.items() for name, value in of_task.items()}
    return named, [str(each.message) for each in warned]


@pytest.mark.parametrize(
    ("labelled", "count"),
    [
        ([*range(13)], 13),  # the last of the batches has one sample, which rank 0 gets
        ([0, 3, 4, 7, 8, 11, 12], 13),
        ([0, 2, 4, 6, 8, 10, 12], 13),  # those of rank 0 of two processes
        ([1, 3, 5, 7, 9, 11], 13),  # those of rank 1
    ],
    ids=str,
)
@pytest.mark.parametrize("world", [2, 3])
def test_metrics_with_several_figures_are_exact(world: int, labelled: list[int], count: int) -> None:
    alone, _ = several_figures(labelled, count)
    names = {"a/angle.mean", "a/angle.median", "b/depth.rmse", "c/gauc", "d/iou.p", "d/iou.q", "d/iou.r"}
    assert names <= {name for name, value in alone.items() if value == value}  # none of these is NaN
    for figures, warned in processes(world)(several_figures, labelled, count):
        assert figures == pytest.approx(alone, rel=1e-6)
        assert not warned
