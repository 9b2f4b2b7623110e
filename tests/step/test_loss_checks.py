"""Losses in micro-batches are exact or refused: against the same steps on whole batches, after many steps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mtl
from mtl.batch import cut, num_samples
from mtl.step.mean_comparison import judge
from mtl.step.uneven import uneven_values


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).tanh()


class Bags(nn.Module):
    """Maps (users (N,), ids, segments) to (N, 16): flat fields in addition to fields with one entry per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(50, 16)
        self.users = nn.Embedding(20, 16)

    def forward(self, user: torch.Tensor, ids: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        return self.users(user).index_add(0, segment, self.items(ids)).tanh()


def ends(
    trunk: Callable[[], nn.Module],
    tasks: Callable[[], list[mtl.Task]],
    batches: list[Any],
    inputs: list[str],
    *,
    size: int | None = 2,
    dtype: torch.dtype = torch.float64,
    parts: Callable[[Any], Any] | None = None,
    **options: Any,
) -> float:
    """Returns the largest difference of parameters between steps with whole batches and with micro-batches."""
    found = []
    for micro in (False, True):
        torch.manual_seed(0)
        own = tasks()
        model = mtl.MultiTaskModel(trunk(), own, inputs=inputs).to(dtype)
        given: dict[str, Any] = {} if not micro or parts else {"micro_batch_size": size}
        step = mtl.Step(model, own, torch.optim.AdamW(model.parameters(), 0.01), **given, **options)
        for batch in batches:
            step(parts(batch) if parts and micro else batch)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return (found[0] - found[1]).abs().max().item()


def sentences(count: int, *, padded: bool = True, dtype: torch.dtype = torch.float64, ignored: int = -100) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        labels = torch.randint(0, 40, (8, 10), generator=generator)
        lengths = torch.randint(1, 11, (8,), generator=generator)
        for row, length in zip(labels, lengths if padded or number else lengths * 0 + 10, strict=True):
            row[length:] = ignored
        batches.append({"x": torch.randn(8, 10, 6, generator=generator).to(dtype), "labels": labels})
    return batches


def causal(model: mtl.MultiTaskModel, batch: Any, ignored: int = -100) -> torch.Tensor:
    """Returns a language model's loss, the mean over the tokens that aren't ignored, near log V at initialisation."""
    logits = 0.05 * model(batch)["next"]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=ignored)


def language(**options: Any) -> Callable[[], list[mtl.Task]]:
    return lambda: [mtl.Task("next", head=nn.Linear(16, 40), objective=causal, **options)]


REFUSED = r"task 'next': its (loss|objective) can't be taken in micro-batches"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_language_models_objective_needs_a_count(dtype: torch.dtype) -> None:
    batches = sentences(20, dtype=dtype)
    with pytest.raises(mtl.UserError, match=REFUSED):
        ends(Net, language(), batches, ["x"], dtype=dtype)
    counted = language(count=lambda batch: (batch["labels"] != -100).sum())
    assert ends(Net, counted, batches, ["x"], dtype=dtype) < (1e-12 if dtype == torch.float64 else 1e-6)


def test_a_wrong_count_is_refused() -> None:
    with pytest.raises(mtl.UserError, match=REFUSED):
        ends(Net, language(count=lambda batch: len(batch["labels"])), sentences(1), ["x"])


@pytest.mark.parametrize("ignored", [-100, 0, 255, 39])
def test_padding_that_comes_later_is_seen(ignored: int) -> None:
    """The first batch has none, so that the first test can't tell."""
    batches = sentences(3, padded=False, ignored=ignored)

    def run(number: int, task: mtl.Task) -> None:
        ends(Net, lambda: [copy.deepcopy(task)], batches[:number], ["x"])

    def flat(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(0.05 * prediction.flatten(0, 1), target.flatten(), ignore_index=ignored)

    first = batches[0]["labels"]
    if ignored in (0, 39):
        first[first == ignored] = 1
    for task in (
        mtl.Task("next", head=nn.Linear(16, 40), objective=lambda m, b: causal(m, b, ignored)),
        mtl.Task("next", head=nn.Linear(16, 40), loss=flat, target="labels"),
    ):
        run(1, task)
        with pytest.raises(mtl.UserError, match=REFUSED):
            run(2, task)


def test_what_has_been_tested_is_kept_in_checkpoints() -> None:
    torch.manual_seed(0)
    tasks = [mtl.Task("next", head=nn.Linear(16, 40), loss=lambda p, y: F.cross_entropy(p.mT, y), target="labels")]
    model = mtl.MultiTaskModel(Net(), tasks, inputs=["x"]).double()
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), 0.1), micro_batch_size=2)
    step(sentences(1, padded=False)[0])
    state = step.state_dict()["checked"]
    other = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), 0.1), micro_batch_size=2)
    other.load_state_dict(step.state_dict())
    assert other.state_dict()["checked"] == state
    assert state["next"]
    older = {**step.state_dict(), "checked": ["next"]}  # as checkpoints had it before
    other.load_state_dict(older)
    assert other.state_dict()["checked"] == {"next": []}


class Focal(nn.CrossEntropyLoss):
    """A subclass of torch's loss with another forward, so that the denominator isn't known."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        each = F.cross_entropy(input, target, reduction="none")
        wanted = target != 3
        return each[wanted].mean()


def test_a_subclass_with_a_forward_of_its_own_is_no_torch_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(9, 6, generator=generator).double(), "y": torch.arange(9) % kinds} for kinds in (3, 5)]
    tasks = lambda: [mtl.Task("next", head=nn.Linear(16, 5), loss=Focal(), target="y")]  # noqa: E731
    assert ends(Net, tasks, batches[:1], ["x"], size=4) < 1e-12
    with pytest.raises(mtl.UserError, match=REFUSED):
        ends(Net, tasks, batches, ["x"], size=4)


def test_a_mean_over_samples_needs_no_count() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(11, 6, generator=generator).double()} for _ in range(20)]
    tasks = lambda: [  # noqa: E731
        mtl.Task("residual", head=nn.Linear(16, 1), objective=lambda m, b: m(b)["residual"].square().mean())
    ]
    assert ends(Net, tasks, batches, ["x"], size=4) < 1e-12
    over = lambda: [  # noqa: E731
        mtl.Task("residual", head=nn.Linear(16, 1), objective=lambda m, b: m(b)["residual"][b["x"][:, 0] > 0].mean())
    ]
    with pytest.raises(mtl.UserError, match="task 'residual': its objective can't be taken in micro-batches"):
        ends(Net, over, batches, ["x"], size=4)


class Noisy(nn.Module):
    """A trunk with dropout and batch norm, so that a sample's prediction depends on the other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_an_objective_is_tested_in_eval_mode_and_nothing_moves() -> None:
    """By hand, from the same state: three micro-batches by their shares, and no test."""

    def built() -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
        torch.manual_seed(0)
        tasks = [mtl.Task("r", head=nn.Linear(16, 1), objective=lambda m, b: m(b)["r"].square().mean())]
        return mtl.MultiTaskModel(Noisy(), tasks, inputs=["x"]).double(), tasks

    batch = {"x": torch.randn(11, 6, generator=torch.Generator().manual_seed(2)).double()}
    (model, tasks), (fresh, _) = built(), built()
    step = mtl.Step(model, tasks, micro_batch_size=4)
    torch.manual_seed(1)
    step.backward(batch)
    draws = torch.get_rng_state()
    torch.manual_seed(1)
    for part in cut(batch, size=4):
        (fresh(part)["r"].square().mean() * len(part["x"]) / 11).backward()
    assert torch.equal(draws, torch.get_rng_state())
    for mine, its in zip(model.buffers(), fresh.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)
    for mine, its in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-15)


def bags(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        lengths = torch.randint(1, 6, (12,), generator=generator)
        batches.append(
            {
                "user": torch.randint(0, 20, (12,), generator=generator),
                "ids": torch.randint(0, 50, (int(lengths.sum()),), generator=generator),
                "segment": torch.repeat_interleave(torch.arange(12), lengths),
                "click": torch.randint(0, 2, (12,), generator=generator),
            }
        )
    return batches


def by_bags(batch: dict[str, torch.Tensor], size: int = 5) -> list[dict[str, torch.Tensor]]:
    """Returns micro-batches of a batch of bags, made by hand."""
    pieces = []
    for start in range(0, 12, size):
        end = min(start + size, 12)
        here = (batch["segment"] >= start) & (batch["segment"] < end)
        flat = {"ids": batch["ids"][here], "segment": batch["segment"][here] - start}
        pieces.append({name: batch[name][start:end] for name in ("user", "click")} | flat)
    return pieces


@pytest.mark.parametrize("passes", ["joint", "sequential", "shared"])
def test_flat_fields_are_refused_and_a_list_of_micro_batches_is_exact(passes: str) -> None:
    inputs = ["user", "ids", "segment"]
    tasks = lambda: [  # noqa: E731
        mtl.Task("click", head=nn.Linear(16, 2), loss=nn.CrossEntropyLoss(), target="click"),
        mtl.Task("like", head=nn.Linear(16, 2), loss=lambda p, y: F.cross_entropy(p, 1 - y), target="click"),
    ]
    with pytest.raises(mtl.UserError, match=r"its field 'ids' is a tensor of shape \(\d+,\), and the batch has 12"):
        ends(Bags, tasks, bags(1), inputs, size=5, passes=passes)
    assert ends(Bags, tasks, bags(20), inputs, parts=by_bags, passes=passes) < 1e-12


def test_an_objective_on_flat_fields_needs_a_count() -> None:
    inputs = ["user", "ids", "segment"]

    def clicks(model: mtl.MultiTaskModel, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch)["next"], batch["click"])

    def tasks(**options: Any) -> Callable[[], list[mtl.Task]]:
        return lambda: [mtl.Task("next", head=nn.Linear(16, 2), objective=clicks, **options)]

    for options in ({}, {"target": "click"}):
        with pytest.raises(mtl.UserError, match="number of samples in a batch isn't known|" + REFUSED):
            ends(Bags, tasks(**options), bags(1), inputs, parts=by_bags)
    counted = tasks(count=lambda batch: len(batch["click"]))
    assert ends(Bags, counted, bags(5), inputs, parts=by_bags) < 1e-12


def padded(batch: Any, size: int = 3) -> list[Any]:
    """Returns micro-batches, each padded only to its own width."""
    pieces = []
    for piece in cut(batch, size=size):
        width = int((piece["labels"] != -100).sum(1).max())
        pieces.append({name: value[:, :width] for name, value in piece.items()})
    return pieces


class Classes(nn.Module):
    """Cross-entropy over the tokens of (N, L, V), through torch's own class."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.mT


def test_micro_batches_that_are_padded_to_their_own_widths() -> None:
    def known() -> list[mtl.Task]:
        head = nn.Sequential(nn.Linear(16, 40), Classes())
        return [mtl.Task("next", head=head, loss=nn.CrossEntropyLoss(), target="labels")]

    def tokens(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(prediction.flatten(0, 1), target.flatten())

    def own(**options: Any) -> Callable[[], list[mtl.Task]]:
        return lambda: [mtl.Task("next", head=nn.Linear(16, 40), loss=tokens, target="labels", **options)]

    batches = sentences(20)
    assert ends(Net, known, batches, ["x"], parts=padded) < 1e-12
    assert ends(Net, own(count=lambda y: (y != -100).sum()), batches, ["x"], parts=padded) < 1e-12
    assert ends(Net, language(count=lambda b: (b["labels"] != -100).sum()), batches, ["x"], parts=padded) < 1e-12
    for tasks in (own(), language()):
        with pytest.raises(mtl.UserError, match=REFUSED):
            ends(Net, tasks, batches, ["x"], parts=padded)
    with pytest.raises(mtl.UserError, match=r"micro-batches can't be joined to one batch: their field 'prediction'"):
        ends(Net, own(whole_batch=True), batches, ["x"], parts=padded)


def balance(model: mtl.MultiTaskModel, batch: Any) -> torch.Tensor:
    """Returns a router's load, the squared mean use of each expert over the batch, which is no mean over samples."""
    return model(batch)["load"].softmax(-1).mean(0).square().sum()


@pytest.mark.parametrize("passes", ["joint", "sequential", "shared"])
@pytest.mark.parametrize("balancer", ["Equal", "UPGrad", "GLS"])
def test_an_objective_over_the_whole_batch(balancer: str, passes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"x": torch.randn(11, 6, generator=generator).double(), "y": torch.randint(0, 5, (11,), generator=generator)}
        for _ in range(20)
    ]

    def tasks(*, whole: bool) -> list[mtl.Task]:
        return [
            mtl.Task("load", head=nn.Linear(16, 4), objective=balance, whole_batch=whole),
            mtl.Task("y", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target="y"),
        ]

    def gap(**options: Any) -> float:
        own = {"balancer": getattr(mtl.balancers, balancer)(), "passes": passes}
        return ends(Net, lambda: tasks(whole=True), batches, ["x"], **options, **own)

    assert gap(size=4) < 1e-12
    assert gap(parts=lambda batch: cut(batch, size=3)) < 1e-12
    with pytest.raises(mtl.UserError, match="task 'load': its objective can't be taken in micro-batches"):
        ends(Net, lambda: tasks(whole=False), batches, ["x"], size=4)


def hard(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the mean over samples that aren't learned yet; in the first step, these are all samples."""
    each = F.cross_entropy(0.1 * prediction, target, reduction="none")
    chosen = each[each > 1.4]
    return chosen.mean() if len(chosen) else each.sum() * 0


def valid(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the mean over elements with a target of at least 0."""
    return (prediction - target)[target >= 0].square().mean()


@pytest.mark.parametrize("passes", ["joint", "sequential", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_loss_counts_is_tested_in_each_step(dtype: torch.dtype, passes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rule = torch.randn(6, 5, generator=generator)
    inputs = [torch.randn(8, 6, generator=generator) for _ in range(60)]
    batches = [{"x": x.to(dtype), "y": (x @ rule).argmax(1)} for x in inputs]
    options: dict[str, Any] = {"passes": passes, "dtype": dtype}

    def both(**options: Any) -> list[mtl.Task]:
        objective = lambda model, batch: hard(model(batch)["next"], batch["y"])  # noqa: E731
        return [
            mtl.Task("next", head=nn.Linear(16, 5), loss=hard, target="y", **options),
            mtl.Task("next", head=nn.Linear(16, 5), objective=objective, **options),
        ]

    for number in range(2):
        ends(Net, lambda number=number: both()[number : number + 1], batches[:2], ["x"], **options)
        with pytest.raises(mtl.UserError, match=REFUSED):
            ends(Net, lambda number=number: both()[number : number + 1], batches, ["x"], **options)
        whole = ends(
            Net, lambda number=number: both(whole_batch=True)[number : number + 1], batches[:20], ["x"], **options
        )
        assert whole < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("options", [{}, {"mean_over": "samples"}, {"count": len}])
def test_a_floats_own_mark_for_missing_that_comes_later_is_seen(size: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(3):
        y = torch.rand(8, 3, generator=generator).double()
        if number:
            y[torch.rand(8, 3, generator=generator) < torch.linspace(0, 0.9, 8)[:, None]] = -1
            y[:, 0] = 1
        batches.append({"x": torch.randn(8, 6, generator=generator).double(), "y": y})
    tasks = lambda: [mtl.Task("next", head=nn.Linear(16, 3), loss=valid, target="y", **options)]  # noqa: E731
    assert ends(Net, tasks, batches[:1], ["x"], size=size) < 1e-12
    with pytest.raises(mtl.UserError, match=REFUSED):
        ends(Net, tasks, batches, ["x"], size=size)


@pytest.mark.parametrize("missing", [False, True])
def test_distributions_of_classes_are_counted_by_position(*, missing: bool) -> None:
    """Micro-batches of widths 3 and 7, against all of their positions as samples of one batch."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(20):
        pieces = []
        for width in (3, 7):
            y = torch.randn(2, 5, width, generator=generator).double().softmax(1)
            if missing and width == 3:
                y[0] = torch.nan
            pieces.append({"x": torch.randn(2, width, 6, generator=generator).double(), "y": y})
        batches.append(pieces)

    found = []
    for together in (False, True):
        torch.manual_seed(0)
        tasks = [mtl.Task("t", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target="y")]
        if not together:
            tasks[0].head = nn.Sequential(tasks[0].head, Classes())
        model = mtl.MultiTaskModel(Net(), tasks, inputs=["x"]).double()
        step = mtl.Step(model, tasks, torch.optim.AdamW(model.parameters(), 0.01))
        for pieces in batches:
            flat = {
                "x": torch.cat([each["x"].flatten(0, 1) for each in pieces]),
                "y": torch.cat([each["y"].mT.flatten(0, 1) for each in pieces]),
            }
            step(flat if together else pieces)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_a_watched_step_changes_no_draw_and_no_buffer() -> None:
    """A loss of one's own leaves what torch's leaves, dropout and batch norm included."""
    states = []
    for loss in (nn.CrossEntropyLoss(), lambda p, y: F.cross_entropy(p, y)):
        torch.manual_seed(0)
        tasks = [mtl.Task("t", head=nn.Linear(16, 5), loss=loss, target="y")]
        model = mtl.MultiTaskModel(Noisy(), tasks, inputs=["x"]).double()
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), 0.1), micro_batch_size=3)
        for _ in range(5):
            step({"x": torch.randn(8, 6).double(), "y": torch.randint(0, 5, (8,))})
        states.append([torch.get_rng_state(), *model.state_dict().values()])
    assert all(torch.equal(mine, its) for mine, its in zip(*states, strict=True))


@pytest.mark.parametrize("batch", [[], ({"x": torch.zeros(2, 6)},), [torch.zeros(2, 6)]])
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    tasks = [mtl.Task("t", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target="y")]
    with pytest.raises(mtl.UserError, match="a step takes a batch, which is a dict of fields"):
        mtl.Step(mtl.MultiTaskModel(Net(), tasks, inputs=["x"]), tasks).backward(batch)


def test_the_error_of_shares_is_judged_not_that_of_the_loss() -> None:
    """Ten samples with losses that differ in the sixth digit; the sum of shares by twos is wrong by a third."""
    losses = [1 + 1e-6 * i for i in range(10)]
    weights = [1.0, 2.0] * 5

    def counted(which: list[int], *, right: bool) -> tuple[float, float]:
        total = sum(weights[i] for i in which)
        return (total if right else float(len(which))), sum(weights[i] * losses[i] for i in which) / total

    right = judge(lambda w: counted(w, right=True), list(range(10)), 1e-6, 64 * 2.2e-16)
    assert (right.differs, right.decided, right.finite) == (False, True, True)
    wrong = judge(lambda w: counted(w, right=False), list(range(10)), 1e-6, 64 * 2.2e-16)
    assert wrong.differs
    assert wrong.whole == pytest.approx(wrong.mean, rel=1e-5)
    alike = judge(lambda w: (float(len(w)), 1.0), list(range(10)), 1e-6, 64 * 2.2e-16)
    assert (alike.differs, alike.decided) == (False, False)


def test_what_is_uneven() -> None:
    task = mtl.Task("t", head=nn.Identity(), loss=lambda p, y: p.mean(), target="y")

    def of(y: torch.Tensor) -> set[str]:
        return uneven_values(task, [{"y": y}])

    assert of(torch.zeros(4, 3).long()) == set()
    assert of(torch.tensor([[1, 2], [2, 1]])) == set()
    assert of(torch.tensor([[1, 2], [2, 2]])) == {"1 in y", "2 in y"}
    assert of(torch.tensor([[1.0, torch.nan], [2.0, 1.0]])) == {"nan in y"}
    many = torch.arange(300).view(3, 100)
    assert of(many) == {"0 in y", "255 in y"}
    many[0, 90:] = 7
    assert of(many) == {"0 in y", "255 in y", "repetition of the last in y"}
    assert uneven_values(task, [{"y": torch.ones(2, 3)}, {"y": torch.ones(2, 4)}]) == {"the width of y"}


def test_the_number_of_samples_is_the_targets() -> None:
    batch = {"ids": torch.zeros(446), "segment": torch.zeros(446), "click": torch.zeros(128)}
    assert num_samples(batch, ["click"]) == 128
    with pytest.raises(mtl.UserError, match="different lengths: 'ids' 446, 'segment' 446, 'click' 128"):
        num_samples(batch)
    assert num_samples({"x": torch.zeros(3, 2), "boxes": [1, 2, 3], "scale": 2.0}) == 3
