"""Lists of ids: histories and tags of the click log, means and attention over them, and the two-tower trunk."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command
from torch import Tensor

import mtl
from mtl.data import made_ctr
from mtl.trunks import Table, TwoTower

COLUMNS = {
    "user": {"kind": "category", "size": 9},
    "item": {"kind": "category", "size": 6},
    "history": {"kind": "ids", "size": 6},
    "tags": {"kind": "ids", "size": 3},
}
FIELDS = {
    "user": torch.tensor([1, 9, 0]),
    "item": torch.tensor([6, 2, 3]),
    "history": torch.tensor([[1, 2, 0], [5, 0, 0], [0, 0, 0]]),
    "tags": torch.tensor([[1, 0, 3], [0, 2, 0], [1, 2, 3]]),
}


def test_other_fields_and_their_bits_stay() -> None:
    plain, more = made_ctr(num_samples=1_000), made_ctr(num_samples=1_000, history=5, tags=4)
    assert "history" not in plain.facts["columns"]
    assert list(more.facts["columns"])[-2:] == ["history", "tags"]
    for (_, mine), (_, other) in zip(plain.items(), more.items(), strict=True):
        assert set(other.fields) == {*mine.fields, "history", "tags"}
        assert all(torch.equal(mine.fields[n].nan_to_num(-1), other.fields[n].nan_to_num(-1)) for n in mine.fields)
    # The sums of the fields when the log had no lists yet.
    sums = [int(plain.train.fields[name].sum()) for name in ("user", "item", "hour", "device", "click")]
    assert sums == [196_004, 61_097, 10_350, 1_988, 204]


def test_histories_and_tags() -> None:
    splits = made_ctr(num_samples=600, num_users=20, num_items=30, history=3, tags=5)
    clicked: dict[int, list[int]] = {}
    tags: dict[int, list[int]] = {}
    for _, data in splits.items():
        fields = data.fields
        for user, item, click, history, mine in zip(
            *(fields[n].tolist() for n in ("user", "item", "click", "history", "tags")), strict=True
        ):
            before = clicked.get(user, [])[-3:]
            assert history == before + [0] * (3 - len(before))
            if click:
                clicked.setdefault(user, []).append(item)
            assert tags.setdefault(item, mine) == mine
            assert all(tag in (0, place) for place, tag in enumerate(mine, start=1))
    assert len({tuple(each) for each in tags.values()}) > 3


def trunk_of(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    trunk = kind(COLUMNS, list(COLUMNS), dimensions=4, **options).double()
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter)
    return trunk


def embedded(trunk: Table) -> Tensor:
    return trunk.stages()[0](*FIELDS.values())


def test_lists_are_averaged() -> None:
    trunk = trunk_of(Table)
    user, item, history, tags = (each.weight for each in trunk.embeddings)
    zero = torch.zeros(4, dtype=torch.float64)
    expected = [
        torch.cat([user[1], item[6], (history[1] + history[2]) / 2, (tags[1] + tags[3]) / 2]),
        torch.cat([user[9], item[2], history[5], tags[2]]),
        torch.cat([user[0], item[3], zero, (tags[1] + tags[2] + tags[3]) / 3]),
    ]
    torch.testing.assert_close(embedded(trunk), torch.stack(expected), rtol=1e-14, atol=1e-15)


def test_attention_by_hand() -> None:
    trunk = trunk_of(Table, attention={"history": "item"})
    item, score = trunk.embeddings[1].weight, trunk.embeddings[2].score
    pooled = embedded(trunk)[:, 8:12]

    def scored(h: Tensor, c: Tensor) -> float:
        hidden = (score[0].weight @ torch.cat([h, c, h - c, h * c]) + score[0].bias).clamp(min=0)
        return math.exp((score[2].weight @ hidden + score[2].bias).item())

    first, second = scored(item[1], item[6]), scored(item[2], item[6])
    expected = (first * item[1] + second * item[2]) / (first + second)
    torch.testing.assert_close(pooled[0], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pooled[1], item[5], rtol=1e-14, atol=0)
    assert pooled[2].tolist() == [0, 0, 0, 0]
    longer = {**FIELDS, "history": torch.nn.functional.pad(FIELDS["history"], (0, 4))}
    torch.testing.assert_close(trunk(*longer.values()), trunk(*FIELDS.values()), rtol=1e-13, atol=1e-13)
    pooled.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trunk.parameters())


@pytest.mark.parametrize("attention", [None, {"history": "item"}])
def test_raw_lists(attention: Any) -> None:
    trunk = trunk_of(Table, attention=attention)
    raw = [["1", 9, None], [6, 2.0, 3], [[1, 2], [5], []], [[1, 3], [2], [1, 2, 3]]]
    torch.testing.assert_close(trunk(*raw), trunk(*FIELDS.values()), rtol=1e-14, atol=1e-14)
    assert trunk([None], [1], [[]], [[7]]).isfinite().all()  # a new user, and an unknown tag


@pytest.mark.parametrize("attention", [{"history": "user"}, {"item": "history"}, {"history": "tags"}, {"h": "item"}])
def test_attention_that_does_not_fit(attention: dict[str, str]) -> None:
    with pytest.raises(mtl.UserError, match="model.trunk.attention: .* doesn't fit"):
        Table(COLUMNS, list(COLUMNS), attention=attention)


@pytest.mark.parametrize("combine", ["product", "concatenation"])
def test_two_towers(combine: str) -> None:
    trunk = trunk_of(TwoTower, user=["user", "history"], item=["item", "tags"], width=5, combine=combine)
    u = trunk.user(trunk.user_columns(FIELDS["user"], FIELDS["history"]))
    v = trunk.item(trunk.item_columns(FIELDS["item"], FIELDS["tags"]))
    features = trunk(*FIELDS.values())
    assert torch.equal(features, u * v if combine == "product" else torch.cat([u, v], 1))
    assert features.shape == (3, trunk.num_features)
    # A change of the item changes nothing of the user's tower.
    other = trunk(*{**FIELDS, "item": torch.tensor([1, 1, 1])}.values())
    assert not torch.equal(features, other)
    if combine == "concatenation":
        assert torch.equal(features[:, :5], other[:, :5])


def test_towers_need_each_input_once() -> None:
    with pytest.raises(mtl.UserError, match="list 'tags' once, either in user or in item"):
        TwoTower(COLUMNS, list(COLUMNS), user=["user", "history"], item=["item"])
    with pytest.raises(mtl.UserError, match="'hour' isn't in model.inputs"):
        TwoTower(COLUMNS, list(COLUMNS), user=["user", "history", "hour"], item=["item", "tags"])


SMALL = ["data.num_samples=4_000", "data.num_users=50", "data.num_items=20", "trainer.max_epochs=1", "data.history=4"]


@pytest.mark.parametrize(
    "more",
    [
        ["data.tags=3", "model.inputs=[user,item,history,tags]"],
        ["model.inputs=[user,item,history]", "model.trunk.attention={history: item}", "balancer=upgrad"],
        [
            *("model/trunk=two_tower", "model.inputs=[user,item,history]", "model.trunk.item=[item]"),
            *("model.trunk.user=[user,history]", "model=hard_sharing"),
        ],
    ],
)
def test_from_the_config(here: Path, more: list[str]) -> None:
    done = command("train", "task=made_ctr_chain", *more, *SMALL)
    assert done.code == 0, done.err
    assert all(math.isfinite(value) for figures in done.metrics["test"].values() for value in figures.values())
    evaluated = command("evaluate", f"run={done.run}")
    assert evaluated.code == 0, evaluated.err
