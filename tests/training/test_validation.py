"""Figures over a split: means over samples, for every batch size."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import problem
from torch import nn
from torch.utils.data import Dataset
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MulticlassF1Score

import mtl
from mtl.data import Fields, Loader
from mtl.training.figures import Kind
from mtl.training.validation import Validation

METRICS = {
    "accuracy": partial(MulticlassAccuracy, num_classes=5, average="micro"),
    "f1": partial(MulticlassF1Score, num_classes=5, average="macro"),
}


def data(count: int = 23) -> Fields:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Fields({"x": x} | {f"y{i}": torch.randint(0, 5, (count,), generator=generator) for i in range(2)})


@pytest.mark.parametrize("batch_size", [1, 4, 23])
def test_figures_are_those_of_the_whole_split_at_once(batch_size: int) -> None:
    model, tasks = problem(2)
    for task in tasks:
        task.metrics = METRICS
    before = {name: value.clone() for name, value in model.state_dict().items()}
    validation = Validation(model, tasks, nullcontext)
    draws = torch.get_rng_state()
    figures = validation(Loader(data(), batch_size=batch_size))
    assert figures == validation(Loader(data(), batch_size=batch_size))  # nothing is left from the first time
    assert torch.equal(draws, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    model.eval()
    fields = data().fields
    for task, prediction in zip(tasks, model({"x": fields["x"]}).values(), strict=True):
        target = fields[task.target]
        loss = nn.functional.cross_entropy(prediction, target).item()
        assert figures[task.name]["loss"] == pytest.approx(loss, rel=1e-12)
        assert figures[task.name]["accuracy"] == pytest.approx((prediction.argmax(1) == target).double().mean().item())
        hits = [((prediction.argmax(1) == c) & (target == c)).sum().item() for c in range(5)]
        sizes = [((prediction.argmax(1) == c).sum() + (target == c).sum()).item() for c in range(5)]
        f1 = [2 * h / s for h, s in zip(hits, sizes, strict=True) if s]
        assert figures[task.name]["f1"] == pytest.approx(sum(f1) / len(f1), rel=1e-6)


class Nested(Dataset):
    """Targets that are dicts of tensors."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, object]:
        x = torch.tensor([float(index), 1.0])
        return {"x": x, "y": {"first": x[:1] * 2, "second": x[1:]}}


@pytest.mark.parametrize("batch_size", [10, 4, 3])
def test_targets_that_are_nests_are_counted_by_sample(batch_size: int) -> None:
    loss = lambda p, y: (p[:, :1] - y["first"]).square().mean() + (p[:, 1:] - y["second"]).square().mean()  # noqa: E731
    tasks = [mtl.Task("a", head=nn.Identity(), loss=loss, target="y")]
    model = mtl.MultiTaskModel(nn.Linear(2, 2, bias=False), tasks, inputs=["x"])
    nn.init.eye_(model.trunk.weight)
    figures = Validation(model, tasks, nullcontext)(Loader(Nested(), batch_size=batch_size))
    assert figures["a"]["loss"] == pytest.approx(sum(i * i for i in range(10)) / 10)


def test_units() -> None:
    model, tasks = problem(2)
    tasks[0].metrics = {"accuracy": BinaryAccuracy, "error": MeanAbsoluteError}
    tasks[0].loss = nn.BCEWithLogitsLoss()
    tasks[1].metrics = {"accuracy": partial(MulticlassAccuracy, num_classes=5), "error": MeanAbsoluteError}
    tasks[1].loss = nn.MSELoss()
    kinds = Validation(model, tasks, nullcontext).kinds()
    assert kinds["t0/accuracy"] == kinds["t1/accuracy"]  # shares, both
    assert kinds["t0/error"] != kinds["t1/error"]  # metres and degrees, for all we know
    assert (kinds["t0/loss"].unit, kinds["t1/loss"].unit) == ("nats", "loss of y1")


def test_kinds() -> None:
    model, tasks = problem(2)
    tasks[0].metrics = METRICS
    assert Validation(model, tasks, nullcontext).kinds() == {
        "t0/accuracy": Kind("max", "Accuracy"),
        "t0/f1": Kind("max", "F1Score"),
        "t0/loss": Kind("min", "nats"),
        "t1/loss": Kind("min", "nats"),
    }


class Pairs(MeanAbsoluteError):
    """A metric with a value that is neither a number nor a square matrix."""

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        super().update(prediction[:, 0], target.float())

    def compute(self) -> torch.Tensor:
        return super().compute().expand(2, 3)


def test_metrics_that_do_not_fit() -> None:
    model, tasks = problem(1)
    loader = Loader(data(), batch_size=8)
    tasks[0].metrics = {"pairs": Pairs}
    with pytest.raises(mtl.UserError, match=r"task 't0': metric 'pairs' gives of shape \(2, 3\), not one number"):
        Validation(model, tasks, nullcontext)(loader)
    tasks[0].metrics = {"accuracy": partial(MulticlassAccuracy, num_classes=3)}
    with pytest.raises(
        mtl.UserError, match=r"task 't0': its metric 'accuracy' failed on .* Check tasks\.t0\.metrics\.accuracy"
    ):
        Validation(model, tasks, nullcontext)(loader)
    tasks[0].metrics = {"accuracy": lambda: "good"}
    with pytest.raises(mtl.UserError, match="metric 'accuracy' is a str, not a torchmetrics.Metric"):
        Validation(model, tasks, nullcontext)
    assert model.training


@pytest.mark.parametrize(
    ("loss", "batchwise"),
    [
        (lambda p, y: (p[:, 0] - y).square().mean(), set()),
        (lambda p, y: (p[:, 0] - y).square().mean().sqrt(), {"t"}),
        (lambda p, y: (p[:, 0] - y)[y != 3].square().mean(), {"t"}),
        (lambda p, y: (p[:, 0] - y).square().sum(), {"t"}),
    ],
)
def test_losses_that_depend_on_the_batches_are_known(loss, batchwise: set[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    split = Fields({"x": torch.randn(40, 3, generator=generator), "y": torch.arange(40) % 4})
    torch.manual_seed(0)
    for task in (
        mtl.Task("t", head=torch.nn.Linear(3, 1), loss=loss, target="y"),
        mtl.Task("t", head=torch.nn.Linear(3, 1), objective=lambda m, b: loss(m(b)["t"], b["y"])),
    ):
        model = mtl.MultiTaskModel(torch.nn.Identity(), [task], inputs=["x"])
        validation = Validation(model, [task], nullcontext)
        draws = torch.get_rng_state()
        by_sevens = validation(Loader(split, batch_size=7))["t"]["loss"]
        assert validation.batchwise == batchwise
        assert ("depends on data.eval_batch_size" in validation.caveat()) == bool(batchwise)
        assert torch.equal(draws, torch.get_rng_state())
        whole = validation(Loader(split, batch_size=40))["t"]["loss"]
        assert validation.batchwise == set()
        with torch.no_grad():
            expected = loss(model({"x": split.fields["x"]})["t"], split.fields["y"]).item()
        assert whole == pytest.approx(expected, rel=1e-6)
        assert (abs(by_sevens - expected) < 1e-5 * abs(expected)) == (not batchwise)


def test_an_objective_on_flat_fields_is_a_mean_over_samples() -> None:
    """The sampler says how many samples a batch has."""

    class Bags(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"ids": torch.full((1 + index % 3,), float(index)), "y": torch.tensor(float(index))}

    def flat(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"ids": torch.cat([s["ids"] for s in samples]), "y": torch.stack([s["y"] for s in samples])}

    task = mtl.Task("t", head=torch.nn.Linear(1, 1), objective=lambda m, b: b["y"].square().mean())
    model = mtl.MultiTaskModel(torch.nn.Identity(), [task], inputs=["ids"])
    validation = Validation(model, [task], nullcontext)
    assert validation(Loader(Bags(), batch_size=4, collate=flat))["t"]["loss"] == pytest.approx(28.5)
    assert validation.labelled == {"t": 10}
