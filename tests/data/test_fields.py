"""Data by field, and splits."""

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import mtl
from mtl.data import Fields, Splits


def test_fields() -> None:
    data = Fields({"x": torch.arange(6).view(3, 2), "y": torch.tensor([5, 6, 7])})
    assert len(data) == 3
    assert {name: value.tolist() for name, value in data[1].items()} == {"x": [2, 3], "y": 6}
    assert data.take(torch.tensor([2, 0]))["x"].tolist() == [[4, 5], [0, 1]]
    with pytest.raises(mtl.UserError, match="one length"):
        Fields({"x": torch.zeros(3), "y": torch.zeros(2)})
    with pytest.raises(mtl.UserError, match="one length"):
        Fields({})


class Tuples(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"x": 1}])


def test_what_splits_refuse() -> None:
    data = Fields({"x": torch.zeros(2)})
    with pytest.raises(
        mtl.UserError, match=r"data\.train: Stream has no length; set data\.epoch to the number of steps in an epoch"
    ):
        Splits(Stream())
    with pytest.raises(mtl.UserError, match=r"data\.val: a sample of Tuples is a tuple; it must be a dict of fields"):
        Splits(data, Tuples())
    with pytest.raises(mtl.UserError, match=r"data\.test: Fields has no samples"):
        Splits(data, None, Fields({"x": torch.zeros(0)}))
    assert Splits(data).summary() == "Fields: 2 train; fields: x"
