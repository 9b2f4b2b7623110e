"""Steps in micro-batches, against the same step on the whole batch."""

from functools import partial
from typing import Any

import pytest
import torch
from conftest import batches, most_saved, problem
from test_balancing import NAMES, made
from torch import nn
from torch.nn import functional as F

import mtl
from mtl.batch import cut
from mtl.choices import PASSES
from mtl.labels import denominator
from mtl.step.shares import Shares, count, known


class Plain(nn.Module):
    """A model without batch norm and dropout, since these depend on the division into micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 16), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Squeezed(nn.Module):
    def __init__(self, num: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, num)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).squeeze(1)


def uneven(*, seed: int = 0) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    """Returns tasks whose means have different denominators."""
    torch.manual_seed(seed)
    class_weights = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
    tasks = [
        mtl.Task("ignoring", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(ignore_index=-1), target="sparse"),
        mtl.Task(
            "weighted",
            head=nn.Linear(16, 5),
            loss=nn.CrossEntropyLoss(weight=class_weights, ignore_index=-1),
            target="sparse",
            weight=0.5,
        ),
        mtl.Task("elements", head=nn.Linear(16, 3), loss=nn.SmoothL1Loss(), target="vector", weight=2.0),
        mtl.Task("samples", head=Squeezed(1), loss=lambda p, y: (p - y[:, 0]).square().mean(), target="vector"),
        mtl.Task("soft", head=nn.Linear(16, 3), loss=nn.CrossEntropyLoss(label_smoothing=0.1), target="soft"),
        mtl.Task(
            "counted",
            head=Squeezed(1),
            loss=lambda p, y: F.mse_loss(p[~y.isnan()], y[~y.isnan()]),
            target="missing",
            count=lambda y: (~y.isnan()).sum(),
        ),
    ]
    return mtl.MultiTaskModel(Plain(), tasks, inputs=["x"]).double(), tasks


def uneven_batch(seed: int, size: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.randint(-1, 5, (size,), generator=generator)
    sparse[:4] = -1  # the first micro-batches have no label at all
    sparse[5] = 2
    missing = torch.randn(size, generator=generator, dtype=torch.float64)
    missing[4:9] = torch.nan
    return {
        "x": torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64),
        "sparse": sparse,
        "vector": torch.randn(size, 3, generator=generator, dtype=torch.float64),
        "soft": torch.rand(size, 3, generator=generator, dtype=torch.float64).softmax(1),
        "missing": missing,
    }


def trained(kind: str, steps: int = 5, **options):
    model, tasks = uneven()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = mtl.Step(model, tasks, optimizer, passes=kind, **options)
    results = [step(uneven_batch(seed), measure=seed == 1) for seed in range(steps)]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), results


@pytest.mark.parametrize("how", [{"micro_batch_size": 4}, {"micro_batch_size": 1}, {"num_micro_batches": 3}])
@pytest.mark.parametrize("kind", list(PASSES))
def test_parts_move_as_the_whole_does(kind: str, how: dict[str, int]) -> None:
    whole, whole_results = trained(kind, steps=40)
    parts, part_results = trained(kind, steps=40, **how)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    for mine, its in zip(part_results, whole_results, strict=True):
        for name, loss in its.losses.items():
            torch.testing.assert_close(mine.losses[name], loss, rtol=1e-12, atol=0)
    mine, its = part_results[1], whole_results[1]
    assert mine.reach == its.reach
    for name, norm in its.grad_norms.items():
        torch.testing.assert_close(mine.grad_norms[name], norm, rtol=1e-10, atol=0)
    for pair, cosine in its.cosines.items():
        torch.testing.assert_close(mine.cosines[pair], cosine, rtol=1e-9, atol=1e-11)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mean of means it does."""

    def moved(how: dict[str, int]) -> torch.Tensor:
        model, tasks = uneven()
        step = mtl.Step(model, tasks[2:5], torch.optim.AdamW(model.parameters(), lr=1e-3), **how)
        for seed in range(5):
            step(uneven_batch(seed))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = moved({})
    assert (moved({"micro_batch_size": 4}) - whole).abs().max() < 1e-12

    def alike(tasks: list[mtl.Task], batches: list[Any], *_: Any, **options: Any) -> Shares:
        return known([[1 / len(batches)] * len(tasks)] * len(batches))

    monkeypatch.setattr("mtl.step.micro_batches.count_labels", alike)
    assert (moved({"micro_batch_size": 4}) - whole).abs().max() > 1e-5


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("name", NAMES)
def test_every_balancer_sees_the_whole_batch(name: str, kind: str) -> None:
    whole, _ = trained_with(name, kind, {})
    parts, results = trained_with(name, kind, {"micro_batch_size": 4})
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert all(weight.isfinite() for weight in results[-1].weights.values()) or name == "torchjd"


def trained_with(name: str, kind: str, how: dict[str, int]):
    balancer = made(name)
    model, tasks = uneven()
    if balancer.preference == "none":
        for task in tasks:
            task.weight = 1.0
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=1e-2), balancer=balancer, passes=kind, **how)
    results = [step(uneven_batch(seed)) for seed in range(3)]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), results


@pytest.mark.parametrize("labelled", ["all", "some"])
@pytest.mark.parametrize("kind", list(PASSES))
def test_weights_that_are_kept_between_gramians(kind: str, labelled: str) -> None:
    ends = []
    for how in ({}, {"micro_batch_size": 4}):
        model, tasks = uneven()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        step = mtl.Step(
            model, tasks, optimizer, balancer=mtl.balancers.MGDA(), passes=kind, gradients=mtl.Gradients(every=3), **how
        )
        for seed in range(7):
            batch = uneven_batch(seed)
            if labelled == "all":
                batch["sparse"] = batch["sparse"].clamp(min=0)
                batch["missing"] = batch["missing"].nan_to_num(0.3)
            step(batch)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_a_list_of_micro_batches_is_one_step() -> None:
    model, tasks = uneven()
    step = mtl.Step(model, tasks, torch.optim.AdamW(model.parameters(), lr=1e-3), balancer=mtl.balancers.UPGrad())
    other, other_tasks = uneven()
    whole = mtl.Step(
        other, other_tasks, torch.optim.AdamW(other.parameters(), lr=1e-3), balancer=mtl.balancers.UPGrad()
    )
    for seed in range(4):
        step(cut(uneven_batch(seed), size=3))
        whole(uneven_batch(seed))
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-11)
    step = mtl.Step(model, tasks, balancer=mtl.balancers.UPGrad(), gradients=mtl.Gradients(source="layerwise"))
    with pytest.raises(mtl.UserError, match="'layerwise' needs the whole batch's graph"):
        step.backward(cut(uneven_batch(0), size=3))


@pytest.mark.parametrize("source", ["layerwise", "representation"])
def test_sources_that_need_the_whole_graph_are_refused_before_the_first_step(source: str) -> None:
    model, tasks = uneven()
    with pytest.raises(mtl.UserError, match=f"'{source}' needs the whole batch's graph"):
        mtl.Step(
            model, tasks, balancer=mtl.balancers.MGDA(), gradients=mtl.Gradients(source=source), micro_batch_size=4
        )
    assert mtl.Step(model, tasks, balancer=mtl.balancers.MGDA(), micro_batch_size=4).balancing.source == "rows"
    with pytest.raises(mtl.UserError, match="give one of the two"):
        mtl.Step(model, tasks, micro_batch_size=4, num_micro_batches=2)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (lambda p, y: (p - y).square().mean().sqrt(), "rmse"),
        (lambda p, y: (p - y).square().sum(), "sum"),
        (nn.MSELoss(reduction="sum"), "module"),
        (lambda p, y: 1 - (p * y).sum() / (p.square().sum() + y.square().sum()), "dice"),
        (lambda p, y: F.mse_loss(p[y > 0], y[y > 0]), "selected"),
    ],
)
def test_a_loss_that_is_no_mean_is_refused_by_name(loss, name: str) -> None:
    for size, part in ((11, 4), (11, 1), (256, 64), (1000, 250)):
        torch.manual_seed(0)
        tasks = [mtl.Task(name, head=nn.Linear(16, 3), loss=loss, target="vector")]
        model = mtl.MultiTaskModel(Plain(), tasks, inputs=["x"]).double()
        step = mtl.Step(model, tasks, micro_batch_size=part)
        draws = torch.get_rng_state()
        with pytest.raises(mtl.UserError, match=f"task '{name}': its loss can't be taken in micro-batches"):
            step.backward(uneven_batch(0, size=size))
        assert torch.equal(draws, torch.get_rng_state())


def test_a_loss_is_put_to_the_test_when_it_has_labels_in_two_parts() -> None:
    torch.manual_seed(0)

    def rmse(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (p - y).square().mean().sqrt()

    tasks = [mtl.Task("rmse", head=Squeezed(1), loss=rmse, target="missing", missing=True)]
    model = mtl.MultiTaskModel(Plain(), tasks, inputs=["x"]).double()
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), micro_batch_size=4)
    batch = uneven_batch(0)
    batch["missing"][4:] = torch.nan
    step(batch)  # all labels are in the first part
    with pytest.raises(mtl.UserError, match="task 'rmse': its loss can't be taken in micro-batches"):
        step(uneven_batch(1))


class Scaled(nn.Module):
    """An RMSE with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (self.log_scale.exp() * prediction - target).square().mean().sqrt()


def contrastive(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compares every sample with every other sample."""
    return F.cross_entropy(F.normalize(prediction) @ F.normalize(target).T / 0.1, torch.arange(len(target)))


def dice(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    p = prediction.sigmoid()
    return 1 - 2 * (p * target).sum() / (p.square().sum() + target.square().sum())


def no_means(dropout: float = 0.0):
    torch.manual_seed(0)
    trunk = nn.Sequential(Plain(), nn.Dropout(dropout))
    tasks = [
        mtl.Task("rmse", head=nn.Linear(16, 3), loss=Scaled(), target="vector", whole_batch=True),
        mtl.Task("ignoring", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(ignore_index=-1), target="sparse"),
        mtl.Task("pairs", head=nn.Linear(16, 3), loss=contrastive, target="soft", whole_batch=True, weight=0.5),
        mtl.Task("dice", head=nn.Linear(16, 3), loss=dice, target="soft", whole_batch=True),
        mtl.Task(
            "gaps",
            head=Squeezed(1),
            loss=lambda p, y: (p - y).square().sum(),
            target="missing",
            missing=True,
            whole_batch=True,
        ),
    ]
    return mtl.MultiTaskModel(trunk, tasks, inputs=["x"]).double(), tasks


@pytest.mark.parametrize("how", [{"micro_batch_size": 4}, {"num_micro_batches": 11}, "list"])
@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("balancer", ["equal", "gls", "famo", "upgrad", "moco"])
def test_losses_that_are_no_means_are_taken_of_the_whole_batch(balancer: str, kind: str, how) -> None:
    """RMSE, dice, contrastive, a sum over the labels there are: the gradient, and what balancers see, is the whole's."""
    ends = []
    for given in ({}, how):
        kind_of = made(balancer)
        model, tasks = no_means()
        if kind_of.preference == "none":
            tasks[2].weight = 1.0
        options = {} if given == "list" else given
        step = mtl.Step(
            model, tasks, torch.optim.SGD(model.parameters(), lr=1e-2), balancer=kind_of, passes=kind, **options
        )
        results = []
        for seed in range(4):
            batch = uneven_batch(seed)
            results.append(step(cut(batch, size=3) if given == "list" else batch, measure=seed == 1))
        ends.append((torch.cat([p.detach().flatten() for p in model.parameters()]), results))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=1e-12 if balancer == "equal" else 1e-9)
    for whole, parts in zip(ends[0][1], ends[1][1], strict=True):
        for name, loss in whole.losses.items():
            torch.testing.assert_close(parts.losses[name].double(), loss, rtol=1e-9, atol=1e-12)
    for name, norm in ends[0][1][1].grad_norms.items():
        torch.testing.assert_close(ends[1][1][1].grad_norms[name], norm, rtol=1e-9, atol=1e-12)


def test_what_goes_forward_twice_draws_alike() -> None:
    """With dropout the replayed forward is the one that the loss was taken of, for every kind of passes."""
    ends = []
    for kind in PASSES:
        model, tasks = no_means(dropout=0.3)
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=1e-2), passes=kind, micro_batch_size=4)
        torch.manual_seed(5)
        step(uneven_batch(0))
        ends.append((torch.cat([p.detach().flatten() for p in model.parameters()]), torch.get_rng_state()))
    # By hand: the masks of the three micro-batches drawn in order, then one loss over all.
    model, tasks = no_means(dropout=0.3)
    torch.manual_seed(5)
    parts = cut(uneven_batch(0), size=4)
    features = torch.cat([model.trunk(part["x"]) for part in parts])
    batch = uneven_batch(0)
    total = 0.0
    for task in tasks:
        prediction, target = model.heads[task.name](features), batch[task.target]
        if task.name == "gaps":
            prediction, target = prediction[~target.isnan()], target[~target.isnan()]
        total = total + task.weight * task.loss(prediction, target)
    total.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for end, draws in ends:
        torch.testing.assert_close(end, expected, rtol=0, atol=1e-12)
        assert torch.equal(draws, torch.get_rng_state())


def test_how_a_batch_is_cut() -> None:
    batch = {"x": torch.arange(7), "nested": {"y": torch.arange(14).view(7, 2)}, "names": list("abcdefg"), "scale": 3.0}
    parts = cut(batch, size=3)
    assert [len(part["x"]) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part["nested"]["y"] for part in parts]), batch["nested"]["y"])
    assert [part["names"] for part in parts] == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert all(part["scale"] == 3.0 for part in parts)
    assert [len(part["x"]) for part in cut(batch, count=3)] == [2, 2, 3]
    assert [len(part["x"]) for part in cut(batch, count=20)] == [1] * 7
    assert len(cut(batch, size=7)) == 1


def test_what_is_counted() -> None:
    batch = {"y": torch.tensor([0, 1, -100, 2]), "map": torch.zeros(4, 2, 5).long(), "v": torch.zeros(4, 3)}
    batch["map"][0] = -100

    def counted(loss, target: str) -> float:
        return float(denominator(mtl.Task("t", head=nn.Identity(), loss=loss, target=target), batch))

    assert counted(nn.CrossEntropyLoss(), "y") == 3
    assert counted(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0])), "y") == 7
    assert counted(nn.NLLLoss(), "map") == 30
    assert counted(nn.MSELoss(), "v") == 12
    assert counted(lambda p, y: p.mean(), "v") == 4
    tasks = [mtl.Task("a", head=nn.Identity(), loss=nn.CrossEntropyLoss(), target="y")]
    shares = count(tasks, cut(batch, size=2), [[0], [0]])
    assert (shares.rows, shares.present) == ([[2 / 3], [1 / 3]], {0})


@pytest.mark.parametrize("balancer", ["Equal", "MGDA"])
@pytest.mark.parametrize("kind", list(PASSES))
def test_one_micro_batchs_graph_is_alive_at_a_time(kind: str, balancer: str) -> None:
    peaks = {}
    for size in (64, 8):
        model, tasks = uneven()
        step = mtl.Step(
            model, tasks[2:4], balancer=getattr(mtl.balancers, balancer)(), passes=kind, micro_batch_size=size
        )
        step.backward(uneven_batch(1, size=64))  # the first puts losses to the test, with a look
        peaks[size] = most_saved(partial(step.backward, uneven_batch(0, size=64)))
        weights = sum(p.numel() for p in model.parameters())
    assert peaks[8] < peaks[64] / 8 + weights


def test_batch_norm_and_dropout_are_the_exceptions() -> None:
    """They see a micro-batch at a time; what is promised is that all kinds of passes do alike."""
    ends = []
    for kind in PASSES:
        model, tasks = problem(3)
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.01), passes=kind, micro_batch_size=3)
        torch.manual_seed(0)
        for batch in batches(3):
            step(batch)
        ends.append((torch.cat([p.detach().flatten() for p in model.parameters()]), torch.get_rng_state()))
    for end, draws in ends[1:]:
        torch.testing.assert_close(end, ends[0][0], rtol=1e-9, atol=1e-11)
        assert torch.equal(draws, ends[0][1])


@pytest.mark.parametrize("kind", list(PASSES))
def test_ragged_boxes_and_padded_text_in_micro_batches(kind: str) -> None:
    """What a collate function makes: a list of tensors of unlike lengths; tokens with their mask; a nest of both."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 16)

        def forward(self, text: dict[str, torch.Tensor]) -> torch.Tensor:
            there = text["mask"].unsqueeze(-1)
            return torch.tanh((self.embedding(text["tokens"]) * there).sum(1) / there.sum(1))

    def boxes(prediction: torch.Tensor, target: list[torch.Tensor]) -> torch.Tensor:
        """Returns the mean over samples of the mean distance to a sample's boxes, of which there may be none."""
        each = [(p - b).square().mean() if len(b) else 0 * p.sum() for p, b in zip(prediction, target, strict=True)]
        return torch.stack(each).mean()

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (7,), generator=generator)
    batch = {
        "text": {
            "tokens": torch.randint(0, 20, (7, 5), generator=generator),
            "mask": (torch.arange(5) < lengths[:, None]).double(),
        },
        "boxes": [torch.randn(int(n), 4, generator=generator, dtype=torch.float64) for n in (2, 0, 3, 1, 1, 0, 4)],
        "topic": torch.randint(0, 3, (7,), generator=generator),
    }
    ends = []
    for how in ({}, {"micro_batch_size": 3}, {"num_micro_batches": 4}):
        torch.manual_seed(0)
        tasks = [
            mtl.Task("boxes", head=nn.Linear(16, 4), loss=boxes, target="boxes"),
            mtl.Task("topic", head=nn.Linear(16, 3), loss=nn.CrossEntropyLoss(), target="topic"),
        ]
        model = mtl.MultiTaskModel(Text(), tasks, inputs=["text"]).double()
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), passes=kind, **how)
        for _ in range(3):
            step(batch)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=1e-12)
