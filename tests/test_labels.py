"""Labels that are missing don't count: NaN, an ignored class, a mask; by sample and by element."""

import math

import pytest
import torch
from test_accumulation import Plain
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy

import mtl
from mtl.data import Fields, Loader
from mtl.labels import denominator, select, shares, there
from mtl.passes import PASSES
from mtl.validation import Validation

nan = math.nan


def task(loss, **options):
    return mtl.Task("t", head=nn.Identity(), loss=loss, target="y", **{"missing": True, **options})


def test_what_is_there_by_hand() -> None:
    y = torch.tensor([[1.0, nan], [nan, nan], [3.0, 4.0]])
    assert there(task(nn.MSELoss()), {"y": y}).tolist() == [[True, False], [False, False], [True, True]]
    classes = torch.tensor([1, -100, 2])
    assert there(task(nn.CrossEntropyLoss()), {"y": classes}).tolist() == [True, False, True]
    assert there(task(nn.CrossEntropyLoss(ignore_index=2)), {"y": classes}).tolist() == [True, True, False]
    assert there(task(lambda p, y: p.mean()), {"y": classes}) is None
    mask = torch.tensor([True, True, False])
    assert there(task(nn.MSELoss(), mask="m"), {"y": y, "m": mask}).tolist() == [
        [True, False],
        [False] * 2,
        [False] * 2,
    ]
    assert there(task(nn.CrossEntropyLoss(), mask="m"), {"y": classes, "m": mask}).tolist() == [True, False, False]
    with pytest.raises(mtl.UserError, match=r"its mask 'm' is of shape \(2,\) and its target 'y' of shape \(3, 2\)"):
        there(task(nn.MSELoss(), mask="m"), {"y": y, "m": mask[:2]})
    with pytest.raises(mtl.UserError, match="mask 'm' not in batch; the dataset gives: y"):
        there(task(nn.MSELoss(), mask="m"), {"y": y})


def test_what_a_loss_is_given_by_hand() -> None:
    y = torch.tensor([[1.0, nan], [nan, nan], [3.0, 4.0]])
    p = torch.arange(6.0).view(3, 2)
    prediction, target = select(task(nn.MSELoss()), p, {"y": y})
    assert (prediction.tolist(), target.tolist()) == ([0, 4, 5], [1, 3, 4])
    with pytest.raises(mtl.UserError, match="some samples have a part of their target 'y' only"):
        select(task(lambda p, y: (p - y).square().mean()), p, {"y": y})
    whole = torch.tensor([[1.0, 2.0], [nan, nan], [3.0, 4.0]])
    prediction, target = select(task(lambda p, y: (p - y).square().mean()), p, {"y": whole})
    assert (prediction.tolist(), target.tolist()) == ([[0, 1], [4, 5]], [[1, 2], [3, 4]])
    # A mask over a map of classes takes positions out; the prediction stays as it is.
    maps = torch.tensor([[[0, 1], [2, 1]]])
    mask = torch.tensor([[[True, False], [True, True]]])
    scores = torch.randn(1, 3, 2, 2)
    prediction, target = select(task(nn.CrossEntropyLoss(), mask="m"), scores, {"y": maps, "m": mask})
    assert prediction is scores
    assert target.tolist() == [[[0, -100], [2, 1]]]


def test_denominators_by_hand() -> None:
    y = torch.tensor([[1.0, nan], [nan, nan], [3.0, 4.0]])
    whole = torch.tensor([[1.0, 2.0], [nan, nan], [3.0, 4.0]])
    mask = torch.tensor([True, True, False])
    assert denominator(task(nn.MSELoss()), {"y": y}) == 3
    assert denominator(task(lambda p, y: p.mean()), {"y": whole}) == 2
    assert denominator(task(lambda p, y: p.mean(), count=lambda y: 10 * len(y)), {"y": whole}) == 20
    assert denominator(task(nn.MSELoss(), mask="m"), {"y": y, "m": mask}) == 1
    weighted = task(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0])), mask="m")
    assert denominator(weighted, {"y": torch.tensor([1, -100, 2]), "m": mask}) == 2
    tasks = [task(nn.MSELoss()), task(nn.MSELoss(), missing=False)]
    assert shares(tasks, [{"y": whole[1:2]}], [[0, 1]]) == [[0, 1]]  # counted where labels may be missing alone


def half_labelled(seed: int, size: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "x": torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64),
        "vector": torch.randn(size, 3, generator=generator, dtype=torch.float64),
        "digit": torch.randint(0, 5, (size,), generator=generator),
        "known": torch.rand(size, generator=generator) < 0.6,
        "number": torch.randn(size, 1, generator=generator, dtype=torch.float64),
    }
    batch["vector"][torch.rand(size, 3, generator=generator) < 0.3] = nan
    batch["number"][torch.rand(size, 1, generator=generator) < 0.3] = nan
    batch["vector"][:4] = nan  # a micro-batch without any
    batch["known"][8:] = False
    return batch


def absolute(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target).abs().mean()


def missing_labels(seed: int = 0):
    torch.manual_seed(seed)
    tasks = [
        mtl.Task("vector", head=nn.Linear(16, 3), loss=nn.MSELoss(), target="vector", missing=True),
        mtl.Task("digit", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target="digit", mask="known", weight=0.5),
        mtl.Task("number", head=nn.Linear(16, 1), loss=absolute, target="number", missing=True),
    ]
    return mtl.MultiTaskModel(Plain(), tasks, inputs=["x"]).double(), tasks


def by_hand(model: mtl.MultiTaskModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses with the samples taken out one by one."""
    predictions = model(batch)
    there = ~batch["vector"].isnan()
    pairs = [(predictions["vector"][i, j], batch["vector"][i, j]) for i, j in there.nonzero().tolist()]
    vector = sum((p - y) ** 2 for p, y in pairs) / len(pairs)
    digit = torch.stack(
        [
            F.cross_entropy(p[None], y[None])
            for p, y, known in zip(predictions["digit"], batch["digit"], batch["known"], strict=True)
            if known
        ]
    ).mean()
    number = torch.stack(
        [(p - y).abs() for p, y in zip(predictions["number"], batch["number"], strict=True) if not y.isnan()]
    ).mean()
    return {"vector": vector, "digit": digit, "number": number}


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 4}, {"micro_batch_size": 5}, {"num_micro_batches": 12}])
@pytest.mark.parametrize("kind", list(PASSES))
def test_steps_with_missing_labels_are_those_by_hand(kind: str, how: dict[str, int]) -> None:
    model, tasks = missing_labels()
    other, _ = missing_labels()
    step = mtl.Step(model, tasks, torch.optim.AdamW(model.parameters(), lr=1e-2), passes=kind, **how)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    for seed in range(5):
        batch = half_labelled(seed)
        result = step(batch, measure=seed == 2)
        optimizer.zero_grad()
        losses = by_hand(other, batch)
        (losses["vector"] + 0.5 * losses["digit"] + losses["number"]).backward()
        optimizer.step()
        for name, loss in losses.items():
            torch.testing.assert_close(result.losses[name].double(), loss.detach(), rtol=1e-12, atol=1e-14)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


def absent(batch: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    batch = dict(batch)
    if name == "digit":
        batch["known"] = torch.zeros_like(batch["known"])
    else:
        batch[name] = torch.full_like(batch[name], nan)
    return batch


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 5}])
@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("name", ["vector", "digit", "number"])
def test_a_task_without_labels_takes_no_part(name: str, kind: str, how: dict[str, int]) -> None:
    """After steps with momentum and weight decay its head and the optimizer's state of it are what they were."""
    model, tasks = missing_labels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    step = mtl.Step(model, tasks, optimizer, passes=kind, **how)
    step(half_labelled(0))
    head = {n: p.detach().clone() for n, p in model.heads[name].named_parameters()}
    state = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in model.heads[name].parameters()}
    trunk = model.trunk.net[0].weight.detach().clone()
    for seed in range(1, 4):
        result = step(absent(half_labelled(seed), name), measure=True)
        assert list(result.losses) == [t.name for t in tasks if t.name != name]
        assert list(result.weights) == list(result.losses) == list(result.grad_norms)
        assert all(name not in reach for reach in result.reach.values())
    assert all(torch.equal(p, head[n]) for n, p in model.heads[name].named_parameters())
    assert all(torch.equal(v, state[p][k]) for p in state for k, v in optimizer.state[p].items())
    assert not torch.equal(trunk, model.trunk.net[0].weight)


def test_a_step_without_any_label_moves_nothing() -> None:
    model, tasks = missing_labels()
    step = mtl.Step(model, tasks, torch.optim.AdamW(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    batch = half_labelled(0)
    for task_ in tasks:
        batch = absent(batch, task_.name)
    result = step(batch, measure=True)
    assert (result.losses, result.taken) == ({}, False)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_figures_over_batches_are_those_of_the_whole_split() -> None:
    model, tasks = missing_labels()
    tasks[0].metrics = {"error": MeanSquaredError}
    tasks[1].metrics = {"accuracy": lambda: MulticlassAccuracy(num_classes=5, average="micro")}
    tasks[2].metrics = {"error": MeanSquaredError}
    split = {n: torch.cat([half_labelled(seed)[n] for seed in range(3)]) for n in half_labelled(0)}
    losses = {n: loss.item() for n, loss in by_hand(model.eval(), split).items()}
    with torch.no_grad():
        predictions = model(split)
    there = split["known"]
    accuracy = (predictions["digit"].argmax(1) == split["digit"])[there].double().mean().item()
    labels = ~split["number"].isnan()
    error = (predictions["number"] - split["number"])[labels].square().mean().item()
    from contextlib import nullcontext

    for size in (36, 7, 1):
        figures = Validation(model, tasks, nullcontext)(Loader(Fields(split), batch_size=size))
        for name, loss in losses.items():
            assert figures[name]["loss"] == pytest.approx(loss, rel=1e-12), size
        assert figures["vector"]["error"] == pytest.approx(losses["vector"], rel=1e-5)
        assert figures["digit"]["accuracy"] == pytest.approx(accuracy, rel=1e-6)
        assert figures["number"]["error"] == pytest.approx(error, rel=1e-5)
    nothing = Fields(absent(split, "number"))
    figures = Validation(model, tasks, nullcontext)(Loader(nothing, batch_size=7))
    assert math.isnan(figures["number"]["loss"])
    assert math.isnan(figures["number"]["error"])


def test_a_metric_that_knows_an_ignored_value_gets_whole_samples() -> None:
    from mtl.labels import select_for_metric

    y = torch.tensor([[1.0, nan], [nan, 0.0]])
    p = torch.tensor([[0.9, 0.1], [0.2, 0.7]])
    kind = task(nn.BCEWithLogitsLoss())
    prediction, target = select_for_metric(kind, p, {"y": y}, ignored=-1)
    assert target.tolist() == [[1, -1], [-1, 0]]
    metric = MultilabelAccuracy(num_labels=2, average="micro", ignore_index=-1)
    metric.update(prediction, target.int())
    assert metric.compute() == 0.5
    prediction, target = select_for_metric(kind, p, {"y": y})
    assert (prediction.tolist(), target.tolist()) == (pytest.approx([0.9, 0.7]), [1, 0])


@pytest.mark.parametrize("size", [4, 8])
def test_a_batch_that_is_all_ignored_spoils_no_figure(size: int) -> None:
    model, tasks = missing_labels()
    kind = mtl.Task("digit", head=tasks[1].head, loss=nn.CrossEntropyLoss(), target="digit")
    split = half_labelled(0, size=8)
    split["digit"][:4] = -100
    from contextlib import nullcontext

    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(split)["digit"][4:], split["digit"][4:]).item()
    figures = Validation(model, [kind], nullcontext)(Loader(Fields(split), batch_size=size))
    assert figures["digit"]["loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["numbers", "nan", "floats"])
def test_a_yes_or_no_that_is_missing(kind: str) -> None:
    """-100, as a table gives for an empty cell in a column of yes and no, or NaN."""
    from mtl.losses import BinaryCrossEntropy

    known = torch.tensor([1, 0, 1, 0])
    missing = {"numbers": (-100, -100), "nan": (nan, nan), "floats": (-100.0, nan)}[kind]
    y = torch.tensor([1, missing[0], 0, 1, missing[1], 0])
    yes = task(BinaryCrossEntropy())
    p = torch.randn(6)
    prediction, target = select(yes, p, {"y": y})
    assert target.tolist() == [1, 0, 1, 0]
    expected = F.binary_cross_entropy_with_logits(p[[0, 2, 3, 5]], known.float())
    torch.testing.assert_close(yes.loss(prediction, target), expected)
    assert denominator(yes, {"y": y}) == 4


def test_unequal_shapes_are_no_broadcast() -> None:
    model, _ = missing_labels()
    wrong = mtl.Task("number", head=nn.Linear(16, 1), loss=nn.MSELoss(), target="flat")
    batch = half_labelled(0)
    batch["flat"] = torch.zeros(12, dtype=torch.float64)
    with pytest.raises(
        mtl.UserError, match=r"its prediction is of shape \(12, 1\) and its target 'flat' of shape \(12,\)"
    ):
        mtl.Step(model, [wrong]).backward(batch)
