"""Missing labels don't count: NaN, an ignored class, a mask; by sample and by element."""

import math

import pytest
import torch
from test_accumulation import Plain
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy

import mtl
from mtl.choices import PASSES
from mtl.data import Fields, Loader
from mtl.labels import denominator, label_mask, select
from mtl.step.forward import loss_of
from mtl.step.shares import count
from mtl.training.validation import Validation

nan = math.nan


def absolute(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target).abs().mean()


def task(loss, **options):
    return mtl.Task("t", head=nn.Identity(), loss=loss, target="y", **{"missing": True, **options})


def test_what_is_there_by_hand() -> None:
    y = torch.tensor([[1.0, nan], [nan, nan], [3.0, 4.0]])
    assert label_mask(task(nn.MSELoss()), {"y": y}).tolist() == [[True, False], [False, False], [True, True]]
    classes = torch.tensor([1, -100, 2])
    assert label_mask(task(nn.CrossEntropyLoss()), {"y": classes}).tolist() == [True, False, True]
    assert label_mask(task(nn.CrossEntropyLoss(ignore_index=2)), {"y": classes}).tolist() == [True, True, False]
    assert label_mask(task(lambda p, y: p.mean()), {"y": classes}) is None
    mask = torch.tensor([True, True, False])
    assert label_mask(task(nn.MSELoss(), mask="m"), {"y": y, "m": mask}).tolist() == [
        [True, False],
        [False] * 2,
        [False] * 2,
    ]
    assert label_mask(task(nn.CrossEntropyLoss(), mask="m"), {"y": classes, "m": mask}).tolist() == [True, False, False]
    with pytest.raises(mtl.UserError, match=r"its mask 'm' is of shape \(2,\) and its target 'y' of shape \(3, 2\)"):
        label_mask(task(nn.MSELoss(), mask="m"), {"y": y, "m": mask[:2]})
    with pytest.raises(mtl.UserError, match="mask 'm' not in batch; the dataset gives: y"):
        label_mask(task(nn.MSELoss(), mask="m"), {"y": y})


def test_what_a_loss_is_given_by_hand() -> None:
    y = torch.tensor([[1.0, nan], [nan, nan], [3.0, 4.0]])
    p = torch.arange(6.0).view(3, 2)
    prediction, target = select(task(nn.MSELoss()), p, {"y": y})
    assert (prediction.tolist(), target.tolist()) == ([0, 4, 5], [1, 3, 4])
    with pytest.raises(mtl.UserError, match="some samples have only a part of their target 'y'"):
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
    counted = count(tasks, [{"y": whole[1:2]}], [[0, 1]])  # where labels may be missing alone
    assert (counted.rows, counted.present) == ([[0, 1]], {1})


MAPS = torch.tensor([[[0, 1], [2, 1]], [[1, 1], [0, 2]]])  # class numbers (N, H, W)
KINDS = [
    (nn.MSELoss(), torch.rand(4, 3), {}),
    (nn.BCEWithLogitsLoss(), torch.ones(4, 3), {}),
    (nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 1]), {}),
    (nn.CrossEntropyLoss(), MAPS, {}),
    (nn.CrossEntropyLoss(), torch.rand(2, 3, 2, 2), {}),
    (absolute, torch.rand(4, 1), {}),
    (absolute, torch.rand(2, 3, 2, 2), {"mean_over": "positions"}),
    (absolute, torch.rand(2, 3), {"mean_over": "elements"}),
]


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_labels_are_complete_only_if_none_is_missing(number: int) -> None:
    loss, whole, options = KINDS[number]
    each = task(loss, **options)
    assert count([each], [{"y": whole}], [[0]]).complete == [{0}]
    value = -100 if not whole.is_floating_point() else nan
    missing = whole.clone()
    for index in range(len(whole)):  # from one sample without a label to none with one
        missing[index] = value
        assert count([each], [{"y": missing}], [[0]]).complete == [set()]
    if isinstance(loss, nn.CrossEntropyLoss) and whole is MAPS:  # as many labels as W · N, which is not all of them
        partial = whole.clone()
        partial[:, 1] = value
        assert count([each], [{"y": partial}], [[0]]).complete == [set()]
    mask = torch.ones(len(whole), dtype=torch.bool)
    assert count([task(loss, mask="m", **options)], [{"y": whole, "m": mask}], [[0]]).complete == [{0}]
    mask[0] = False
    assert count([task(loss, mask="m", **options)], [{"y": whole, "m": mask}], [[0]]).complete == [set()]


def test_labels_that_are_weighted_or_counted_are_not_known_to_be_complete() -> None:
    weighted = task(nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.5])))  # 0.5 + 1.5 of one label each
    of_own = task(absolute, count=len)
    batches = [{"y": torch.tensor([0, 1])}], [{"y": torch.rand(2, 1)}]
    assert count([weighted], batches[0], [[0]]).complete == [set()]
    assert count([of_own], batches[1], [[0]]).complete == [set()]


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


def missing_labels(seed: int = 0):
    torch.manual_seed(seed)
    tasks = [
        mtl.Task("vector", head=nn.Linear(16, 3), loss=nn.MSELoss(), target="vector", missing=True),
        mtl.Task("digit", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target="digit", mask="known", weight=0.5),
        mtl.Task("number", head=nn.Linear(16, 1), loss=absolute, target="number", missing=True),
    ]
    return mtl.MultiTaskModel(Plain(), tasks, inputs=["x"]).double(), tasks


def by_hand(model: mtl.MultiTaskModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the losses, with the labelled samples selected one by one."""
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


def test_a_plain_task_leaves_nan_out_as_a_config_does() -> None:
    """The rule needs no word: in a step, in micro-batches and in the figures; false leaves NaN to the loss."""
    tasks = [
        mtl.Task("vector", head=nn.Linear(16, 3), loss=nn.MSELoss(), target="vector"),
        mtl.Task("number", head=nn.Linear(16, 1), loss=absolute, target="number"),
    ]
    model = mtl.MultiTaskModel(Plain(), tasks, inputs=["x"]).double()
    batch = half_labelled(0)
    predictions = model(batch)
    known = ~batch["vector"].isnan()
    vector = (predictions["vector"] - batch["vector"])[known].square().sum() / known.sum()
    known = ~batch["number"].isnan()
    number = (predictions["number"] - batch["number"])[known].abs().mean()
    gradients = torch.autograd.grad(vector + number, list(model.parameters()))
    for how in ({}, {"micro_batch_size": 5}):
        result = mtl.Step(model, tasks, **how).backward(batch)
        torch.testing.assert_close(result.losses["vector"].double(), vector.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(result.losses["number"].double(), number.detach(), rtol=1e-12, atol=0)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)
    assert list(mtl.Step(model, tasks).backward(absent(batch, "number")).losses) == ["vector"]
    tasks[0].missing = False
    assert mtl.Step(model, tasks).backward(batch).losses["vector"].isnan()


@pytest.mark.parametrize("how", [{}, {"num_micro_batches": 3}])
def test_minus_100_of_yes_and_no_is_missing_in_a_plain_task(how: dict[str, int]) -> None:
    yes = mtl.Task("yes", head=mtl.heads.Linear(16, 1), loss=mtl.losses.BinaryCrossEntropy(), target="yes")
    model = mtl.MultiTaskModel(Plain(), [yes], inputs=["x"]).double()
    batch = half_labelled(0) | {"yes": torch.tensor([1, 0, -100, 1, 0, 0, -100, -100, -100, 1, 1, 0])}
    known = batch["yes"] >= 0
    right = F.binary_cross_entropy_with_logits(model(batch)["yes"][known], batch["yes"][known].double())
    found = mtl.Step(model, [yes], **how).backward(batch).losses["yes"]
    torch.testing.assert_close(found.double(), right.detach(), rtol=1e-12, atol=0)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 5}])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pixels", [False, True])
def test_class_numbers_of_any_integer_type(
    dtype: torch.dtype, how: dict[str, int], masked: bool, weighted: bool, pixels: bool
) -> None:
    """The loss, the gradient, the figures and the picture are those of int64."""
    from contextlib import nullcontext

    from mtl.training.predictions import show

    weight = torch.tensor([0.3, 2.0], dtype=torch.float64) if weighted else None
    metrics = {
        "accuracy": lambda: MulticlassAccuracy(num_classes=2, average="micro", ignore_index=-100),
        "macro": lambda: MulticlassAccuracy(num_classes=2),
    }
    shape = (12, 4, 4) if pixels else (12,)
    numbers = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1))
    numbers[0] = numbers[0] * 0 + 1
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.7
    found = []
    for type_ in (torch.int64, dtype):
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(16, 32), nn.Unflatten(1, (2, 4, 4))) if pixels else nn.Linear(16, 2)
        kind = mtl.Task(
            "t", head=head, loss=nn.CrossEntropyLoss(weight), target="y", metrics=metrics, mask="m" if masked else None
        )
        model = mtl.MultiTaskModel(Plain(), [kind], inputs=["x"]).double()
        batch = {"x": half_labelled(0)["x"], "y": numbers.to(type_), "m": mask}
        loss = mtl.Step(model, [kind], **how).backward(batch).losses["t"]
        figures = Validation(model, [kind], nullcontext)(Loader(Fields(batch), batch_size=5))["t"]
        with torch.no_grad():
            picture = show(kind, model(batch)["t"], batch, None)
        found.append((loss, [p.grad for p in model.parameters()], figures, picture))
    (right, gradients, rights, pictured), (loss, others, figures, picture) = found
    assert torch.equal(loss, right)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert figures == rights
    assert type(picture) is type(pictured)
    predictions = model(batch)["t"].detach()
    known = mask if masked else torch.ones_like(mask)
    of_all = F.cross_entropy(predictions.movedim(1, -1)[known], numbers[known], weight)
    torch.testing.assert_close(loss.double(), of_all, rtol=1e-12, atol=0)
    accuracy = (predictions.argmax(1) == numbers)[known].double().mean().item()
    assert figures["accuracy"] == pytest.approx(accuracy, rel=1e-6)


def test_a_class_that_uint8_holds_as_156_is_one() -> None:
    """As an int64 it isn't -100; what marks a missing label in a mask of bytes, 255, is an ignore_index."""
    y = torch.tensor([156, 255, 3], dtype=torch.uint8)
    assert label_mask(task(nn.CrossEntropyLoss()), {"y": y}).tolist() == [True, True, True]
    assert label_mask(task(nn.CrossEntropyLoss(ignore_index=255)), {"y": y}).tolist() == [True, False, True]
    yes = task(mtl.losses.BinaryCrossEntropy())
    assert label_mask(yes, {"y": y}).all()
    logits = torch.randn(3, 256)
    prediction, target = select(task(nn.CrossEntropyLoss(), mask="m"), logits, {"y": y, "m": torch.tensor([1, 0, 1])})
    assert target.tolist() == [156, -100, 3]
    torch.testing.assert_close(
        F.cross_entropy(prediction, target), F.cross_entropy(logits[::2], torch.tensor([156, 3]))
    )


@pytest.mark.parametrize(
    ("target", "mask", "options"),
    [
        (torch.zeros(2, 3, 4, 4), torch.ones(2, 4, 4), {}),
        (torch.zeros(2, 3, 4, 4), torch.ones(2, 3), {}),
        (torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 1), {"loss": lambda p, y: p.mean()}),
        (torch.zeros(2, 3, 4, 4), torch.ones(2, 2, 4, 4), {"loss": lambda p, y: p.mean(), "mean_over": "positions"}),
        ([torch.zeros(5), torch.zeros(5)], torch.ones(3), {"loss": lambda p, y: p.mean()}),
    ],
)
def test_a_mask_of_another_shape_is_refused(target: object, mask: torch.Tensor, options: dict) -> None:
    kind = task(mask="m", **{"loss": nn.MSELoss(), **options})
    with pytest.raises(mtl.UserError, match=r"its mask 'm' is of shape"):
        label_mask(kind, {"y": target, "m": mask.bool()})


def test_a_mask_holds_for_the_whole_of_a_sample() -> None:
    """Of whole numbers too, where samples are as many as columns."""
    y = torch.arange(16, dtype=torch.uint8).view(4, 4)
    batch = {"y": y, "m": torch.tensor([1, 0, 0, 1])}
    kind = task(nn.MSELoss(), mask="m")
    p = torch.randn(4, 4)
    prediction, target = select(kind, p, batch)
    torch.testing.assert_close(F.mse_loss(prediction, target), F.mse_loss(p[::3], y[::3].float()))
    assert denominator(kind, batch) == 8
    with pytest.raises(mtl.UserError, match="its mask 'm' has numbers other than 0 and 1"):
        label_mask(kind, {"y": y, "m": torch.tensor([1.0, 0.5, nan, 1.0])})


def test_weights_of_labels_of_which_some_are_missing_are_refused() -> None:
    """They would be taken for those of the elements that are left."""
    y = torch.tensor([[1.0, nan, 0.0], [nan, 1.0, nan]])
    kind = task(nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0])))
    with pytest.raises(
        mtl.UserError, match="its loss has weights for each, which don't fit the elements that are left"
    ):
        select(kind, torch.zeros(2, 3), {"y": y})


def cosine(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the loss of surface normals: 1 minus the cosine of each pixel's vectors, a mean over pixels."""
    return (1 - F.cosine_similarity(prediction, target, dim=1)).mean()


def squared(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target).square().mean()


def focal(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(prediction, target, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


OWN = {"normals": (cosine, "positions"), "numbers": (squared, "elements"), "classes": (focal, "positions")}


def own_means(*, masked: bool):
    torch.manual_seed(0)
    tasks = [
        mtl.Task(
            name,
            head=nn.Sequential(nn.Linear(16, 48), nn.Unflatten(1, (3, 4, 4))),
            loss=loss,
            target=name,
            mean_over=mean_over,
            mask=f"{name}_known" if masked else None,
        )
        for name, (loss, mean_over) in OWN.items()
        if masked or name != "classes"
    ]
    return mtl.MultiTaskModel(Plain(), tasks, inputs=["x"]).double(), tasks


def maps(seed: int, *, masked: bool) -> dict[str, torch.Tensor]:
    """Returns maps with different shares of valid pixels; sample 0 has none."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"x": torch.randn(9, 1, 8, 8, generator=generator, dtype=torch.float64)}
    share = torch.linspace(0, 1, 9).view(9, 1, 1)
    known = torch.rand(9, 4, 4, generator=generator) < share
    batch["normals"] = torch.randn(9, 3, 4, 4, generator=generator, dtype=torch.float64)
    batch["numbers"] = torch.randn(9, 3, 4, 4, generator=generator, dtype=torch.float64)
    batch["classes"] = torch.randint(0, 3, (9, 4, 4), generator=generator)
    elements = torch.rand(9, 3, 4, 4, generator=generator) < share[:, None]
    if masked:
        batch |= {"normals_known": known[:, None] if seed % 2 else known, "classes_known": known}
        return batch | {"numbers_known": elements}
    batch["normals"][~known[:, None].expand(-1, 3, -1, -1)] = nan
    batch["numbers"][~elements] = nan
    return batch


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 2}, {"num_micro_batches": 4}])
def test_a_loss_of_one_s_own_that_is_a_mean_over_elements_or_positions(how: dict[str, int], masked: bool) -> None:
    """Against a loop that picks the valid pixels by hand."""
    from contextlib import nullcontext

    model, tasks = own_means(masked=masked)
    other, _ = own_means(masked=masked)
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), **how)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for seed in range(4):
        batch = maps(seed, masked=masked)
        predictions = other(batch)
        losses = {}
        for each in tasks:
            name, p, y = each.name, predictions[each.name], batch[each.name]
            known = batch[f"{name}_known"] if masked else ~y.isnan()
            if name == "numbers":
                losses[name] = sum((p[i] - y[i]) ** 2 for i in map(tuple, known.nonzero().tolist())) / known.sum()
                continue
            known = known[:, 0] if known.ndim == 4 else known
            picked = [(p[n, :, i, j], y[n, ..., i, j]) for n, i, j in known.nonzero().tolist()]
            losses[name] = sum(each.loss(a[None], b[None]) for a, b in picked) / len(picked)
        figures = Validation(model, tasks, nullcontext)(Loader(Fields(batch), batch_size=2))
        result = step(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        for name, loss in losses.items():
            torch.testing.assert_close(result.losses[name].double(), loss.detach(), rtol=1e-12, atol=1e-14)
            assert figures[name]["loss"] == pytest.approx(loss.item(), rel=1e-12)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


def test_a_mean_that_is_declared_wrongly_is_refused() -> None:
    own = lambda p, y: (p - y).square().mean()  # noqa: E731
    with pytest.raises(mtl.UserError, match="mean_over is 'pixels'; it must be one of samples, elements, positions"):
        task(own, mean_over="pixels")
    with pytest.raises(mtl.UserError, match="mean_over is for custom losses; the mean of MSELoss is known"):
        task(nn.MSELoss(), mean_over="elements")
    with pytest.raises(mtl.UserError, match="both count and mean_over set the loss"):
        task(own, mean_over="elements", count=len)
    half = torch.tensor([[[1.0, nan]], [[1.0, 2.0]]]).movedim(-1, 1)
    with pytest.raises(mtl.UserError, match="some positions have only a part of their target 'y'"):
        select(task(own, mean_over="positions"), torch.zeros(2, 2, 1), {"y": half})
    with pytest.raises(mtl.UserError, match=r"prediction of shape \(2, 1\) must have the channels as dimension 1"):
        select(task(own, mean_over="positions"), torch.zeros(2, 1), {"y": torch.zeros(2)})
    model, _ = missing_labels()
    wrong = mtl.Task("number", head=nn.Linear(16, 1), loss=own, target="flat", mean_over="elements")
    batch = half_labelled(0) | {"flat": torch.zeros(12, dtype=torch.float64)}
    with pytest.raises(mtl.UserError, match="compares them element by element, so they must be of one shape"):
        mtl.Step(model, [wrong]).backward(batch)


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 2}])
def test_a_loss_of_the_whole_batch_s_valid_elements(how: dict[str, int]) -> None:
    rmse = lambda p, y: (p - y).square().mean().sqrt()  # noqa: E731
    head = nn.Sequential(nn.Linear(16, 48), nn.Unflatten(1, (3, 4, 4)))
    kind = mtl.Task("numbers", head=head, loss=rmse, target="numbers", mean_over="elements", whole_batch=True)
    model = mtl.MultiTaskModel(Plain(), [kind], inputs=["x"]).double()
    batch = maps(1, masked=False)
    known = ~batch["numbers"].isnan()
    right = rmse(model(batch)["numbers"][known], batch["numbers"][known])
    gradients = torch.autograd.grad(right, list(model.parameters()))
    result = mtl.Step(model, [kind], **how).backward(batch)
    torch.testing.assert_close(result.losses["numbers"].double(), right.detach(), rtol=1e-12, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


LOSSES_OF_NUMBERS = [
    *(nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.PoissonNLLLoss(), nn.KLDivLoss(reduction="sum")),
    *(nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), mtl.losses.BinaryCrossEntropy()),
    *(nn.MultiLabelSoftMarginLoss(), nn.BCELoss()),
]
TYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float64)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("type_", TYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES_OF_NUMBERS, ids=str)
def test_a_target_of_any_type_for_losses_of_numbers(loss: nn.Module, type_: torch.dtype, masked: bool) -> None:
    """As with the same numbers in float32; torch fails on some types, in the backward pass too, or computes in halves."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 4), *([nn.Sigmoid()] if isinstance(loss, nn.BCELoss) else []))
    x, y, mask = torch.randn(6, 3), torch.rand(6, 4) > 0.5, torch.tensor([True, False, True, True, False, True])
    chosen = mask if masked else torch.ones(6, dtype=torch.bool)
    right = loss(layer(x)[chosen], y[chosen].float())
    gradient = torch.autograd.grad(right, layer[0].weight)[0]
    of = mtl.Task("t", head=layer, loss=loss, target="y", mask="m" if masked else None)
    step = mtl.Step(mtl.MultiTaskModel(nn.Identity(), [of], inputs=["x"]), [of])
    found = step.backward({"x": x, "y": y.to(type_), "m": mask}).losses["t"]
    assert found.item() == pytest.approx(right.item(), abs=1e-6)
    torch.testing.assert_close(layer[0].weight.grad, gradient)


def test_shares_of_classes_in_other_floats() -> None:
    p, y = torch.randn(5, 3), torch.rand(5, 3).softmax(1)
    of = task(nn.CrossEntropyLoss(), missing=None)
    found = loss_of(of, p, {"y": y.double()})
    assert found.item() == pytest.approx(F.cross_entropy(p, y).item(), abs=1e-6)


def test_a_loss_of_one_s_own_is_given_integers_that_do_not_wrap_around() -> None:
    p, y = torch.randn(6), torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.uint8)

    def hinge(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (1 - (2 * y - 1) * p).clamp(min=0).mean()  # in uint8 2 * 0 - 1 is 255

    right = hinge(p, y.float()).item()
    assert loss_of(task(hinge, missing=None), p, {"y": y}).item() == pytest.approx(right, abs=1e-6)
    weights = torch.tensor([0.5, 2.0])
    weighted = loss_of(task(lambda p, y: (weights[y] * p).mean(), missing=None), p, {"y": y})
    assert weighted.item() == pytest.approx((weights[y.long()] * p).mean().item(), abs=1e-6)


@pytest.mark.parametrize("type_", [torch.int8, torch.int64, torch.float32])
@pytest.mark.parametrize("loss", [nn.MultiLabelSoftMarginLoss(), nn.SoftMarginLoss(), nn.BCELoss()], ids=str)
def test_minus_100_is_missing_for_every_loss_of_yes_and_no(loss: nn.Module, type_: torch.dtype) -> None:
    p = torch.rand(5, 2)
    y = torch.tensor([[1, 1], [-100, -100], [1, -1], [-1, 1], [-100, -100]])
    y = y if isinstance(loss, nn.SoftMarginLoss) else y.where(y != -1, 0)
    there_are = y[:, 0] != -100
    right = loss(p[there_are], y[there_are].float()).item()
    assert loss_of(task(loss, missing=None), p, {"y": y.to(type_)}).item() == pytest.approx(right, abs=1e-6)
