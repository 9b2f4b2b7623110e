"""ESMM and AITM, compared with products of probabilities, forward passes written by hand, and the original trainer."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import command
from torch import Tensor, nn
from torch.nn import functional

import mtl
from mtl.architectures import AITM, ESMM, events
from mtl.architectures.esmm import logit_of_product
from mtl.architectures.towers import Towers
from mtl.gradients.at_features import AtFeatures
from mtl.trunks import Table

EVENTS = ["click", "cart", "purchase"]
COLUMNS = {"user": {"kind": "category", "size": 20}, "item": {"kind": "category", "size": 10}}
ARCHITECTURES = {"esmm": ESMM, "aitm": AITM}


def tasks_of(names: list[str], width: int = 6) -> list[mtl.Task]:
    loss = nn.BCEWithLogitsLoss()
    return [mtl.Task(name, head=mtl.heads.Linear(width, 1), loss=loss, target=name) for name in names]


def trunk() -> Table:
    return Table(COLUMNS, ["user", "item"], num_features=6, hidden=[8], dimensions=4)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def made(kind: str, names: list[str] = EVENTS, **options: Any) -> tuple[Any, list[mtl.Task]]:
    torch.manual_seed(0)
    tasks = tasks_of(names)
    return ARCHITECTURES[kind](trunk, tasks, inputs=["user", "item"], **options).double(), tasks


def batch_of(count: int = 32, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        name: torch.randint(1, column["size"] + 1, (count,), generator=generator) for name, column in COLUMNS.items()
    }
    happened = torch.ones(count, dtype=torch.float64)
    for name in EVENTS:
        happened = happened * (torch.rand(count, generator=generator) < 0.6)
        batch[name] = happened
    return batch


def test_logits_of_products() -> None:
    first, second = (6 * torch.randn(2, 1_000, dtype=torch.float64)).unbind()
    product = first.sigmoid() * second.sigmoid()
    torch.testing.assert_close(logit_of_product(first, second).sigmoid(), product, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(logit_of_product, (first[:20].requires_grad_(), second[:20].requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_products_at_the_extremes(dtype: torch.dtype) -> None:
    """For large logits, the odds are those of the less probable event: 1/o = 1/o_1 + 1/o_2."""
    pairs = [(500, 500), (500, 90), (-500, 80), (-500, -400), (90, 0), (1e30, -3)]
    expected = [500 - math.log(2), 90, -500, -900, 0, -3]
    first, second = torch.tensor(pairs, dtype=dtype).T.clone().requires_grad_().unbind()
    logits = logit_of_product(first, second)
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(functional.binary_cross_entropy_with_logits(logits, (logits > 0).to(dtype)), first)
    assert gradients[0].isfinite().all()


def test_probabilities_multiply() -> None:
    model, _ = made("esmm")
    batch = batch_of()
    features = model.features(batch)
    predictions = model(batch)
    product = torch.ones(32, dtype=torch.float64)
    for name in EVENTS:
        product = product * model.heads[name](model.towers[name](model.trunk(batch["user"], batch["item"]))).sigmoid()
        torch.testing.assert_close(predictions[name].sigmoid(), product, rtol=1e-12, atol=0)
    reordered, _ = made("esmm", chain=["purchase", "click"])
    reordered.eval()  # since training refuses this order
    assert reordered.before("click") == ["purchase"]
    assert reordered.before("cart") == []
    both = [reordered.conditional(name, features).sigmoid() for name in ("purchase", "click")]
    torch.testing.assert_close(reordered(batch)["click"].sigmoid(), both[0] * both[1], rtol=1e-12, atol=0)
    assert torch.equal(reordered(batch)["cart"], reordered.conditional("cart", reordered.features(batch)))


class Original(nn.Module):
    """The forward pass of DeepCTR-Torch's ESMM: embeddings, two towers, two probabilities, the second a product."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(21, 4), nn.Embedding(11, 4)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)) for _ in range(2)
        )

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        embedded = torch.cat([self.users(user), self.items(item)], 1)
        ctr, cvr = (tower(embedded).squeeze(1).sigmoid() for tower in self.towers)
        return ctr, ctr * cvr


@pytest.mark.parametrize("passes", ["joint", "sequential", "shared"])
def test_moves_as_the_original(passes: str) -> None:
    """Twenty steps of SGD on both binary cross-entropies; the operations differ, since the original multiplies."""
    model, tasks = made("esmm", ["click", "purchase"])
    original = Original().double()
    towers = [[*model.towers[name].parameters(), *model.heads[name].parameters()] for name in ("click", "purchase")]
    ours = [*model.trunk.parameters(), *towers[0], *towers[1]]
    with torch.no_grad():
        for theirs, mine in zip(original.parameters(), ours, strict=True):
            theirs.copy_(mine)
    first = [p.detach().clone() for p in ours]
    optimizer, theirs = torch.optim.SGD(ours, lr=0.5), torch.optim.SGD(original.parameters(), lr=0.5)
    step = mtl.Step(model, tasks, optimizer, passes=passes)
    for number in range(20):
        batch = batch_of(seed=number)
        step(batch)
        theirs.zero_grad()
        ctr, ctcvr = original(batch["user"], batch["item"])
        loss = functional.binary_cross_entropy(ctr, batch["click"])
        (loss + functional.binary_cross_entropy(ctcvr, batch["purchase"])).backward()
        theirs.step()
    for mine, its, before in zip(ours, original.parameters(), first, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)
        assert not torch.equal(mine, before)


def test_information_is_transferred_by_attention() -> None:
    """The forward pass of three events, written out sample by sample and vector by vector."""
    model, _ = made("aitm")
    batch = batch_of(5)
    bottom, predictions = model.trunk(batch["user"], batch["item"]), model(batch)
    for sample in range(5):
        own = [model.towers[name](bottom)[sample] for name in EVENTS]
        z = own[0]
        for name, q in zip(EVENTS[1:], own[1:], strict=True):
            transfer = model.transfers[name]
            layer = transfer.transferred[0]
            vectors = [(layer.weight @ z + layer.bias).clamp(min=0), q]
            maps = [transfer.query.weight, transfer.key.weight, transfer.value.weight]
            scores = [((maps[0] @ u).dot(maps[1] @ u) / math.sqrt(6)).exp() for u in vectors]
            weights = [score / sum(scores) for score in scores]
            z = sum(w * (maps[2] @ u) for w, u in zip(weights, vectors, strict=True))
            logit = model.heads[name].weight[0] @ z + model.heads[name].bias[0]
            torch.testing.assert_close(predictions[name][sample], logit, rtol=1e-12, atol=1e-14)
    stacked = torch.randn(7, 2, 6, dtype=torch.float64)
    torch.testing.assert_close(model.transfers["cart"].weights(stacked).sum(1), torch.ones(7, dtype=torch.float64))


def test_the_calibrator_by_hand() -> None:
    model, _ = made("aitm", calibration=0.5)
    features = model.features(batch_of())
    chances = {name: model.predict(name, features).sigmoid() for name in EVENTS}
    assert model.penalty("click", features) is None
    for earlier, later in (("click", "cart"), ("cart", "purchase")):
        expected = [
            0.5 * max(0.0, b - a) for a, b in zip(*(chances[n].tolist() for n in (earlier, later)), strict=True)
        ]
        assert model.penalty(later, features).tolist() == pytest.approx(expected, abs=1e-15)
    assert any(model.penalty(name, features).sum() > 0 for name in EVENTS[1:])
    assert made("aitm", calibration=0.0)[0].penalty("cart", features) is None


@pytest.mark.parametrize("kind", ["esmm", "aitm"])
def test_numbers_of_parameters(kind: str) -> None:
    model, _ = made(kind)
    bottom, tower, head = 4 * (21 + 11), (8 * 8 + 8) + (8 * 6 + 6), 6 + 1
    transfer = (6 * 6 + 6) + 3 * 6 * 6
    number = bottom + 3 * (tower + head) + (2 * transfer if kind == "aitm" else 0)
    assert sum(p.numel() for p in model.parameters()) == number


@pytest.mark.parametrize("kind", ["esmm", "aitm"])
def test_without_a_chain_each_task_has_a_tower(kind: str) -> None:
    model, _ = made(kind, chain=[], shared_stages=2)
    batch = batch_of()
    bottom = model.trunk(batch["user"], batch["item"])
    for task in EVENTS:
        assert torch.equal(model(batch)[task], model.heads[task](model.towers[task](bottom)))
        assert model.penalty(task, model.features(batch)) is None


def step_of(kind: str, **options: Any) -> tuple[Any, Any]:
    model, tasks = made(kind)
    return model, mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.3), **options)


@pytest.mark.parametrize("kind", ["esmm", "aitm"])
def test_passes_and_micro_batches_give_one_gradient(kind: str) -> None:
    batch = batch_of()
    results: list[list[Tensor]] = []
    for passes in ("joint", "sequential", "shared"):
        for cuts in ([0, 32], [0, 10, 32]):
            model, step = step_of(kind, passes=passes)
            parts = [{name: v[a:b] for name, v in batch.items()} for a, b in zip(cuts, cuts[1:], strict=False)]
            step(parts if len(parts) > 1 else parts[0])
            results.append([p.detach() for p in model.parameters()])
    for other in results[1:]:
        for mine, its in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["esmm", "aitm"])
@pytest.mark.parametrize("balancer", ["UPGrad", "UW", "DWA", "GradDrop"])
def test_balancers_take_steps(kind: str, balancer: str) -> None:
    model, step = step_of(kind, balancer=getattr(mtl.balancers, balancer)())
    before = [p.detach().clone() for p in model.parameters()]
    losses = [step(batch_of()).losses for _ in range(30)]
    assert sum(losses[-1].values()) < sum(losses[0].values())
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["esmm", "aitm"])
def test_shared_parameters(kind: str) -> None:
    """The tower of an event reaches all later events, so all towers but the last are shared, and one head in ESMM's."""
    from mtl.gradients.reach import Reach

    model, tasks = made(kind)
    named = dict(model.named_parameters())
    reach = Reach(named, EVENTS)
    reach.begin()
    batch = batch_of()
    features = model.features(batch)
    for task in tasks:
        reach.add(task.name, model.predict(task.name, features).sum())
    shared = {id(p) for p in reach.shared()}
    prefixes = ["trunk.", "towers.click.", "towers.cart."]
    prefixes += ["heads.click.", "heads.cart."] if kind == "esmm" else ["transfers.cart."]
    assert {name for name, p in named.items() if id(p) in shared} == {n for n in named if n.startswith(tuple(prefixes))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: made("esmm", chain=["click", "buy"]), "model.chain: there is no task 'buy'"),
        (lambda: made("esmm", chain=["click", "click"]), "model.chain names 'click' twice"),
        (lambda: made("aitm", shared_stages=0), "model.shared_stages is 0; it must be a whole number of at least 1"),
        (lambda: made("aitm", shared_stages=3), "needs a trunk of at least 4 stages, and Table has 3"),
        (
            lambda: ESMM(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU()), tasks_of(EVENTS), inputs=["x"]),
            r"model\.shared_stages is 1, and no later stage of the trunk has parameters",
        ),
    ],
)
def test_refused(change: Callable[[], Any], message: str) -> None:
    with pytest.raises(mtl.UserError, match=message):
        change()


@pytest.mark.parametrize("kind", ["esmm", "aitm"])
def test_from_the_config(here: Any, kind: str) -> None:
    small = ["data.num_samples=5_000", "data.num_users=50", "data.num_items=20", "trainer.max_epochs=1"]
    done = command("train", "task=made_ctr_chain", f"model={kind}", *small)
    assert done.code == 0, done.err
    assert list(done.metrics["test"]) == ["click", "purchase"]
    refused = command("train", "task=mnist_two_head", f"model={kind}")
    assert refused.code != 0
    assert "the output of task 'digit' is logits" in " ".join(refused.err.split())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_labels_that_are_missing_where_the_event_before_did_not_happen_are_refused(kind: str) -> None:
    """Otherwise the product would be fitted on the samples of the event before alone."""
    _, step = step_of(kind)
    batch = batch_of(320)
    step(batch)
    for later in (batch["cart"], batch["purchase"]):
        masked = later.masked_fill(batch["click"] == 0, torch.nan)
        changed = {**batch, "cart": masked} if later is batch["cart"] else {**batch, "purchase": masked}
        step(changed)  # a batch before had labels there
        _, fresh = step_of(kind)
        if later is batch["cart"]:
            with pytest.raises(mtl.UserError, match=r"'cart' is missing wherever 'click' is 0.*model\.chain=\[\]"):
                fresh(changed)
        else:
            fresh(changed)  # some labels of purchase are there where cart is 0
    model, tasks = made(kind, chain=[])
    mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.3))(
        {**batch, "cart": batch["cart"].masked_fill(batch["click"] == 0, torch.nan)}
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("passes", ["shared", "sequential"])
def test_labels_that_a_few_samples_miss_by_chance_are_accepted(kind: str, passes: str) -> None:
    """In a small micro-batch, the only sample without a click may be one whose next label isn't known."""
    _, step = step_of(kind, passes=passes)
    step(
        [
            {**batch_of(2), "click": tensor([0, 1]), "cart": tensor([torch.nan, 1]), "purchase": tensor([0, 0])},
            batch_of(),
        ]
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_labels_that_small_batches_always_miss_are_refused(kind: str) -> None:
    """Each batch alone could be a chance, and all together can't."""
    _, step = step_of(kind)

    def train(steps: int) -> None:
        for seed in range(steps):
            batch = batch_of(4, seed)
            step({**batch, "cart": batch["cart"].masked_fill(batch["click"] == 0, torch.nan)})

    train(5)
    with pytest.raises(mtl.UserError, match="'cart' is missing wherever 'click' is 0"):
        train(60)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("names", [["cart", "click", "purchase"], ["click", "purchase", "cart"]])
def test_events_in_the_wrong_order_are_refused(kind: str, names: list[str]) -> None:
    model, tasks = made(kind, names)
    wrong = {"cart": "'click' as an event after 'cart'", "click": "'cart' as an event after 'purchase'"}[names[0]]
    with pytest.raises(mtl.UserError, match=rf"{wrong}.* is 1 in \d+ of \d+ samples .*model\.chain lists the tasks"):
        mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.3))(batch_of())


def test_a_subclass_without_logits_says_so() -> None:
    class Chain(Towers):
        pass

    model = Chain(trunk, tasks_of(EVENTS), inputs=["user", "item"])
    with pytest.raises(NotImplementedError, match=r"Chain needs a method logits\(events, bottom\)"):
        model(batch_of(2))


def test_an_event_without_the_one_before_is_counted() -> None:
    model, tasks = made("esmm", ["click", "cart"])
    batch = {**batch_of(5), "click": tensor([0, 0, 0, 1, torch.nan]), "cart": tensor([1, 0, torch.nan, 1, 1])}
    with pytest.raises(mtl.UserError, match="the label 'cart' is 1 in 1 of 3 samples in which 'click' is 0"):
        model.features(batch)
    model.eval().features(batch)  # a prediction needs no labels


def test_the_labels_are_looked_at_in_ever_fewer_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look is a synchronisation with the device."""
    model, _ = made("esmm")
    looked: list[int] = []
    counts = events._counts
    monkeypatch.setattr(events, "_counts", lambda *given: (looked.append(number), counts(*given))[1])
    for number in range(1, 65):
        model.features(batch_of(seed=number))
    assert looked == [each for each in (1, 2, 4, 8, 16, 32, 64) for _ in range(2)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_embeddings_that_all_events_use_have_no_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The events reach different towers, but all of them reach the embeddings and the first tower."""
    gradients: list[list[Tensor]] = []
    seen: list[Tensor] = []
    note = AtFeatures._note
    monkeypatch.setattr(
        AtFeatures, "_note", lambda self, layer, deltas: (seen.extend(layer.parameters), note(self, layer, deltas))
    )
    for source in ("rows", "layerwise"):
        model, step = step_of(kind, balancer=mtl.balancers.MGDA(), gradients=mtl.Gradients(source=source))
        step.backward(batch_of(8))
        gradients.append([p.grad for p in model.parameters()])
        names = {name for name, p in model.named_parameters() if any(p is each for each in seen)}
    assert {name for name in names if "embeddings" in name} == {f"trunk.0.embeddings.{n}.weight" for n in (0, 1)}
    assert not any("purchase" in name or "cart" in name for name in names)
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("only", ["click", "purchase"])
def test_a_chain_that_is_named_is_reduced_to_the_tasks_that_are_trained(here: Any, only: str) -> None:
    small = ["task=made_ctr_chain", "model.chain=[click,purchase]", "data.num_samples=2000", "trainer.max_epochs=1"]
    ended = command("train", *small, f"only={only}")
    assert ended.code == 0, ended.err
    assert list(mtl.load(ended.run).towers) == [only]
    unknown = command("train", *small, f"only={only}", "model.chain=[click,purchased]")
    assert unknown.code == 1
    assert "model.chain: there is no task 'purchased'" in unknown.err
