"""The changes of data that a fingerprint detects."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from mtl.data import Fields, Stream
from mtl.runs.fingerprint import fingerprint, fingerprints


class Augmented:
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict:
        return {"x": torch.rand(3) + np.random.rand() + random.random(), "name": f"sample {index}"}


def data(**changes: torch.Tensor) -> Fields:
    return Fields({"x": torch.arange(64.0).view(32, 2), "y": torch.arange(32)} | changes)


def test_the_same_data_have_the_same_and_others_another() -> None:
    assert fingerprint(data()) == fingerprint(data())
    other = torch.arange(64.0).view(32, 2).clone()
    other[7, 1] += 1e-3  # one number of all, wherever it is
    found = {
        fingerprint(each)
        for each in (
            data(),
            data(x=other),
            data(y=torch.arange(32).flip(0)),
            data(x=torch.arange(64).view(32, 2)),  # the same numbers of another type
            data(x=data().fields["x"].view(torch.int32)),  # and the same bytes of another type
            data(x=data().fields["x"].view(32, 1, 2)),  # and shape
            Fields({"x": torch.arange(62.0).view(31, 2), "y": torch.arange(31)}),
            Fields({"z": torch.arange(64.0).view(32, 2), "y": torch.arange(32)}),
        )
    }
    assert len(found) == 8


def test_more_of_the_same_samples_are_other_data() -> None:
    """Of 20 and of 21 equal samples the same ones are looked at."""
    assert fingerprint([{"x": 1}] * 20) == fingerprint([{"x": 1}] * 20)
    assert fingerprint([{"x": 1}] * 20) != fingerprint([{"x": 1}] * 21)


def test_random_transforms_have_one_and_draw_from_nobody() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    first = fingerprint(Augmented())
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert fingerprint(Augmented()) == first


def test_streams_have_none_nor_have_sources_of_which_one_is_a_stream() -> None:
    class Endless(IterableDataset):
        def __iter__(self):
            yield {"x": 1}

    stream = Stream(Endless(), 1)
    assert fingerprint(stream) is None
    found = fingerprints([("train", data()), ("val", data()), ("train", stream)])
    assert found["train"] is None
    assert found["val"] == fingerprint(data())
    two = fingerprints([("train", data()), ("train", data())])
    assert two["train"] == f"{fingerprint(data())}+{fingerprint(data())}"


def test_data_that_cannot_be_read_have_none() -> None:
    class Broken:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict:
            raise OSError("gone")

    assert fingerprint(Broken()) is None


@pytest.mark.parametrize("value", [np.float32(1.5), 3, "text", None, [torch.ones(1), {"a": 2}], torch.tensor(True)])
def test_all_kinds_of_values(value: object) -> None:
    found = fingerprint([{"x": value}])
    assert found is not None
    assert found != fingerprint([{"x": "other"}])
