"""The generated click log: probabilities by hand, labels, statistical laws, and the problem as a run."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from conftest import command, stopping
from test_resume import same_runs

import mtl
from mtl.data import made_ctr
from mtl.runs import loading as runs

module = importlib.import_module("mtl.data.made_ctr")  # its name in the package is the function's
INPUTS = ["user", "item", "hour", "device"]
SMALL = ["task=made_ctr", "data.num_samples=40_000", "data.num_users=300", "data.num_items=100"]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_chances_by_hand() -> None:
    truth = module.Truth(7, 5, torch.Generator().manual_seed(3))
    fields = truth.draw(50, torch.Generator().manual_seed(4))
    chances = truth.chances(fields)
    for index in range(50):
        user, item, hour, device = (int(fields[name][index]) - 1 for name in INPUTS)
        liking = sum(float(truth.tastes[user][k]) * float(truth.traits[item][k]) for k in range(2))
        (openness, means), (lure, appeal) = truth.users[user].tolist(), truth.items[item].tolist()
        click = -1.2 + openness + lure + float(truth.hours[hour]) + float(truth.devices[device]) + liking
        assert float(chances["click"][index]) == pytest.approx(sigmoid(click), rel=1e-5)
        bought = -0.7 + means + appeal - 0.5 * lure + 0.5 * liking
        assert float(chances["conversion"][index]) == pytest.approx(sigmoid(bought), rel=1e-5)


def test_fields_and_missing_labels() -> None:
    splits = made_ctr(num_samples=5_000, num_users=50, num_items=20)
    assert {name: len(data) for name, data in splits.items()} == {"train": 4_000, "val": 500, "test": 500}
    assert splits.facts["columns"] == {
        name: {"kind": "category", "size": size} for name, size in zip(INPUTS, (50, 20, 24, 4), strict=True)
    }
    for _, data in splits.items():
        click, conversion = data.fields["click"], data.fields["conversion"]
        assert click.dtype == conversion.dtype == torch.float32
        assert set(click.tolist()) == {0, 1}
        assert torch.equal(conversion.isnan(), click == 0)
        assert set(conversion[click == 1].tolist()) == {0, 1}
        for name in INPUTS:
            ids = data.fields[name]
            assert ids.dtype == torch.int64
            assert ids.min() >= 1
            assert ids.max() <= splits.facts["columns"][name]["size"]


def test_seed_alone_decides() -> None:
    state = torch.get_rng_state()
    one = made_ctr(num_samples=1_000)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again, other = made_ctr(num_samples=1_000), made_ctr(num_samples=1_000, seed=1)
    for (_, mine), (_, its), (_, another) in zip(one.items(), again.items(), other.items(), strict=True):
        assert all(
            torch.equal(mine.fields[name].nan_to_num(-1), its.fields[name].nan_to_num(-1)) for name in mine.fields
        )
        assert not torch.equal(mine.fields["user"], another.fields["user"])
    assert one.facts == again.facts
    assert not torch.equal(one.train.fields["user"][:100], one.test.fields["user"])


def test_labels_and_ids_follow_their_laws() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = module.Truth(100, 30, generator)
    fields = truth.draw(200_000, generator)
    chances = truth.chances(fields)
    clicked = fields["click"] == 1
    for name, there in (("click", torch.ones_like(clicked)), ("conversion", clicked)):
        for low in torch.arange(0, 1, 0.1):
            chosen = there & (chances[name] >= low) & (chances[name] < low + 0.1)
            if chosen.sum() > 500:
                expected, share = chances[name][chosen].mean(), fields[name][chosen].mean()
                assert abs(share - expected) < 4 * (0.25 / chosen.sum()).sqrt()
    counts = torch.bincount(fields["user"], minlength=101)[1:].double()
    law = 1 / torch.arange(1, 101, dtype=torch.float64)
    expected = 200_000 * law / law.sum()
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_best_auc_is_what_the_truth_reaches() -> None:
    """By the sum over all pairs, and by the labels of a large sample."""
    generator = torch.Generator().manual_seed(1)
    chance, there = torch.rand(2, 200, generator=generator, dtype=torch.float64)
    pairs = (there * chance).outer(there * (1 - chance))
    won = (chance[:, None] > chance).double() + 0.5 * torch.eye(200)  # against one like itself: a tie
    assert module.best_auc(chance, there) == pytest.approx(float((pairs * won).sum() / pairs.sum()), rel=1e-12)
    from torchmetrics.functional.classification import binary_auroc

    truth = module.Truth(500, 100, generator)
    fields = truth.draw(200_000, generator)
    click, conversion = truth.chances(fields).values()
    clicked = fields["click"] == 1
    assert module.best_auc(click) == pytest.approx(float(binary_auroc(click, fields["click"].long())), abs=0.005)
    reached = float(binary_auroc(conversion[clicked], fields["conversion"][clicked].long()))
    assert module.best_auc(conversion, click) == pytest.approx(reached, abs=0.008)


@pytest.mark.parametrize("name", ["num_samples", "num_users", "num_items"])
def test_numbers_that_cannot_be(name: str) -> None:
    for value in (0, 2.5, "many", True):
        with pytest.raises(mtl.UserError, match=rf"data\.{name} is {value!r}; it must be a whole number of at least"):
            made_ctr(**{name: value})


@pytest.mark.parametrize("balancer", ["equal", "upgrad", "uw"])
def test_training_comes_near_the_best_auc(here: Path, balancer: str) -> None:
    ended = command("train", *SMALL, f"balancer={balancer}", "trainer.max_epochs=2", "data.batch_size=256")
    assert ended.code == 0, ended.err
    best = made_ctr(num_samples=40_000, num_users=300, num_items=100).facts["best_auc"]
    for task in ("click", "conversion"):
        figures = ended.metrics["test"][task]
        assert list(figures) == ["auc", "loss"]  # and not the F1 and accuracy of other tasks of two classes
        assert figures["auc"] - 0.5 > 0.85 * (best[task] - 0.5)
        assert figures["auc"] < best[task] + 0.03  # what 4,000 samples make uncertain
    assert "mean of click/auc, conversion/auc (max)" in " ".join(ended.out.split())
    evaluated = command("evaluate", f"run={ended.run}")
    assert evaluated.code == 0, evaluated.err


def test_a_model_read_back_takes_raw_ids(here: Path) -> None:
    ended = command("train", *SMALL, "trainer.max_epochs=1", "data.num_users=100_000")
    assert ended.code == 0, ended.err
    assert runs.read(ended.run)["config"]["model"]["trunk"]["columns"]["user"] == {"kind": "category", "size": 100_000}
    model = mtl.load(ended.run)
    assert model.trunk.embeddings[0].weight.shape == (100_001, 16)
    raw = {"user": [3, "100000", None], "item": [7, 8.0, 101], "hour": [1, 24, 25], "device": [4, -1, "x"]}
    codes = {"user": [3, 100_000, 0], "item": [7, 8, 0], "hour": [1, 24, 0], "device": [4, 0, 0]}
    fields = {name: torch.tensor(column) for name, column in codes.items()}
    for task in ("click", "conversion"):
        assert torch.equal(model(raw)[task], model(fields)[task])


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*SMALL, "balancer=upgrad", "trainer.max_epochs=2", "log.every=20"]
    (here / "whole").mkdir()
    monkeypatch.chdir(here / "whole")
    whole = command("train", *arguments)
    assert whole.code == 0, whole.err
    run = whole.run.resolve()
    monkeypatch.chdir(here)
    stopped = command("train", *stopping(70), *arguments)
    assert stopped.code == 143
    again = command("train", *arguments, "resume=auto")
    assert again.code == 0, again.err
    assert "resume   from step 70" in again.out
    same_runs(stopped.run, run)
