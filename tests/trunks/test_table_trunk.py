"""The network for tables: the inputs of its first layer, and raw values."""

import math

import pytest
import torch

import mtl
from mtl.trunks import Table

COLUMNS = {
    "age": {"kind": "number", "mean": 40.0, "std": 10.0},
    "city": {"kind": "category", "vocabulary": ["Basel", "Bern"]},
    "size": {"kind": "number", "mean": 1.5, "std": 0.5},
}


def first_inputs(trunk: Table, *columns: object) -> torch.Tensor:
    seen = []
    trunk.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trunk(*columns)
    return seen[0]


def test_what_the_first_layer_sees() -> None:
    trunk = Table(COLUMNS, ["age", "city", "size"], num_features=6, hidden=[7, 8])
    age, city, size = torch.tensor([30.0, math.nan]), torch.tensor([2, 0]), torch.tensor([math.nan, 2.5])
    weight = trunk.embeddings[0].weight
    assert weight.shape == (3, 3)  # 1.6 · 3^0.56 = 2.96
    assert weight[0].tolist() == [0, 0, 0]
    expected = torch.tensor([[-1.0, 0, 0, 1], [0, 2, 1, 0]])  # standardised, then which are missing
    seen = first_inputs(trunk, age, city, size)
    torch.testing.assert_close(seen, torch.cat([expected, weight[[2, 0]]], 1))
    features = trunk(age, city, size)
    assert features.shape == (2, 6)
    assert (features >= 0).all()
    assert [layer.out_features for layer in trunk.layers if isinstance(layer, torch.nn.Linear)] == [7, 8, 6]


def test_a_part_of_the_columns_in_another_order() -> None:
    trunk = Table(COLUMNS, ["size", "city"])
    seen = first_inputs(trunk, [2.0], ["Bern"])
    assert seen[0, :2].tolist() == [1, 0]
    assert torch.equal(seen[0, 2:], trunk.embeddings[0].weight[2])
    assert first_inputs(Table(COLUMNS, ["city"]), ["Bern"]).shape == (1, 3)
    with pytest.raises(mtl.UserError, match=r"model\.inputs: the table has no column 'town' \(possible: age, city, si"):
        Table(COLUMNS, ["town"])


def test_raw_values_are_taken_as_the_datas_fields_are() -> None:
    trunk = Table(COLUMNS, ["age", "city", "size"]).eval()
    fields = (
        torch.tensor([31.0, math.nan, math.nan, 7.5]),
        torch.tensor([2, 0, 0, 1]),
        torch.tensor([1.0, 2.0, math.nan, 3.0]),
    )
    raw = ([31, None, math.nan, "7.5"], [" Bern", "Atlantis", None, "Basel"], (1, 2.0, "", "3"))
    assert torch.equal(trunk(*raw), trunk(*fields))
    numbered = Table({"zip": {"kind": "category", "vocabulary": ["3000", "4000"]}}, ["zip"])
    assert torch.equal(numbered([4000, 4000.0, "4000", 5]), numbered(torch.tensor([2, 2, 2, 0])))


def test_what_is_refused() -> None:
    trunk = Table(COLUMNS, ["age", "city"])
    with pytest.raises(mtl.UserError, match="'age': 'old' is not a finite number"):
        trunk(["old"], ["Bern"])
    with pytest.raises(mtl.UserError, match=r"'age' is a tensor of torch\.int64; numbers must be floats"):
        trunk(torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(mtl.UserError, match=r"'city' is a tensor of torch\.float32; .* categories integers"):
        trunk(torch.tensor([1.0]), torch.tensor([2.0]))
    with pytest.raises(mtl.UserError, match=r"the trunk got 1 columns, but model\.inputs is age, city"):
        trunk([1])


def test_sparse_embeddings() -> None:
    trunk = Table(COLUMNS, ["age", "city"], sparse=True)
    trunk([1, 2], ["Bern", "Bern"]).sum().backward()
    gradient = trunk.embeddings[0].weight.grad
    assert gradient.is_sparse
    assert gradient.coalesce().indices().tolist() == [[2]]


def test_ids_without_a_vocabulary() -> None:
    trunk = Table({"user": {"kind": "category", "size": 1_000}}, ["user"], dimensions=5)
    assert trunk.embeddings[0].weight.shape == (1_001, 5)
    assert trunk.embeddings[0].weight[0].tolist() == [0] * 5
    raw = [1, "1000", 1001, 0, -3, None, "x", 7.0]
    assert torch.equal(trunk(raw), trunk(torch.tensor([1, 1000, 0, 0, 0, 0, 0, 7])))
    assert 0.005 < trunk.embeddings[0].weight.std() < 0.02  # so that one that is seldom seen says little
