"""Data sets of other libraries: names for their values, and batches that aren't plain tensors."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command
from torch.utils.data import IterableDataset, TensorDataset

import mtl
from mtl.data import Loader, Named, Stream, datasets

PAIRS = TensorDataset(torch.arange(6.0).view(3, 2), torch.tensor([5, 6, 7]))


class Rows:
    """A data set with the interface of Hugging Face datasets that is used: a length, and dicts by index."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"img": torch.full((2,), float(index)), "label": index, "id": str(index)}


def test_tuples_by_position() -> None:
    splits = datasets(PAIRS, None, PAIRS, fields=["image", "digit"])
    assert splits.val is None
    assert {name: value.tolist() for name, value in splits.test[1].items()} == {"image": [2, 3], "digit": 6}
    assert splits.summary() == "TensorDataset: 3 train, 3 test; fields: image, digit"
    assert Named(PAIRS, {"digit": 1})[2] == {"digit": 7}
    assert Named([namedtuple("Pair", "a b")(1, 2)], ["x", "y"])[0] == {"x": 1, "y": 2}


def test_dicts_by_key() -> None:
    splits = datasets(Rows(), fields={"image": "img", "digit": "label"})
    (batch,) = Loader(splits.train, batch_size=3).batches()
    assert {name: value.tolist() for name, value in batch.items()} == {
        "image": [[0, 0], [1, 1], [2, 2]],
        "digit": [0, 1, 2],
    }
    assert datasets(Rows()).fields() == ["img", "label", "id"]


class Lines(IterableDataset):
    """A data set that yields three tuples, one after the other."""

    def __iter__(self):
        return iter([(torch.tensor([float(index)]), index % 2) for index in range(3)])


def test_streams() -> None:
    splits = datasets(Stream(Lines(), 2), Stream(Lines(), 3), fields=["x", "y"])
    assert splits.summary() == "Stream: 2 train, 3 val; fields: x, y"
    assert [batch["y"].tolist() for batch in Loader(splits.val, batch_size=2).batches()] == [[0, 1], [0]]
    assert next(iter(Stream(Lines(), 2, {"odd": 1}))) == {"odd": 0}
    with pytest.raises(mtl.UserError, match=r"data\.train: Stream has no length; set data\.epoch"):
        datasets(Lines(), fields=["x", "y"])
    with pytest.raises(
        mtl.UserError, match=r"data\.val: data\.fields names the 1 values of a tuple, x; a sample of Lines is"
    ):
        datasets(Named(PAIRS, ["x", "y"]), Stream(Lines(), 2, ["x"]))


@pytest.mark.parametrize(
    ("dataset", "fields", "message"),
    [
        (PAIRS, ["a"], "data.fields names the 1 values of a tuple, a; a sample of TensorDataset is a tuple of 2"),
        (
            Rows(),
            ["a", "b", "c"],
            "data.fields names the 3 values of a tuple, a, b, c; a sample of Rows is a dict with i",
        ),
        (Rows(), {"a": "lable"}, "data.fields: there is no 'lable'; a sample of Rows is a dict with img, label, id"),
        (PAIRS, {"a": 2}, "data.fields: there is no 2; a sample of TensorDataset is a tuple of 2"),
        (
            torch.zeros(2, 3),
            ["a", "b", "c"],
            "data.fields names the 3 values of a tuple, a, b, c; a sample of Tensor is a T",
        ),
        (PAIRS, "image", "data.fields is 'image'; it must be a list of names"),
    ],
)
def test_messages(dataset: Any, fields: Any, message: str) -> None:
    with pytest.raises(mtl.UserError) as error:
        datasets(dataset, fields=fields)
    assert str(error.value).removeprefix("data.train: ").startswith(message)


SENTENCES = """\
import torch
from torch import nn

class Sentences(torch.utils.data.Dataset):
    '''Lists of 1 to 4 words; is their sum odd?'''
    def __init__(self, count):
        self.words = [[(3 * i + j) % 7 + 1 for j in range(i % 4 + 1)] for i in range(count)]
    def __len__(self):
        return len(self.words)
    def __getitem__(self, index):
        return self.words[index], sum(self.words[index]) % 2

def pad(samples, value=0):
    length = max(len(sample["words"]) for sample in samples)
    rows = [sample["words"] + [value] * (length - len(sample["words"])) for sample in samples]
    lengths = torch.tensor([len(sample["words"]) for sample in samples])
    return {
        "words": torch.tensor(rows),
        "mask": torch.arange(length) < lengths[:, None],
        "odd": torch.tensor([sample["odd"] for sample in samples]),
    }

class Bag(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.embedding = nn.Embedding(9, num_features)
    def forward(self, words, mask):
        assert words.shape == mask.shape and (words[~mask] == 8).all() and (words[mask] < 8).all()
        return (self.embedding(words) * mask[..., None]).sum(1)
"""
TASK = """\
# @package _global_
defaults:
  - /objective@tasks.odd: classification
  - _self_
  - override /data: datasets
  - override /model: hard_sharing
  - override /model/trunk: custom
model:
  inputs: [words, mask]
  trunk: {_target_: sentences.Bag, num_features: 4}
tasks:
  odd: {target: odd, num_outputs: 2}
data:
  train: {_target_: sentences.Sentences, count: 20}
  val: {_target_: sentences.Sentences, count: 8}
  fields: [words, odd]
  collate: {_target_: sentences.pad, _partial_: true, value: 8}
  batch_size: 5
trainer: {max_epochs: 1, micro_batch_size: 2}
"""


@pytest.fixture
def sentences(here: Path) -> list[str]:
    (here / "mine" / "task").mkdir(parents=True)
    (here / "mine" / "sentences.py").write_text(SENTENCES)
    (here / "mine" / "task" / "sentences.yaml").write_text(TASK)
    return ["--config-dir", "mine", "task=sentences"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_padded_words_with_their_mask(sentences: list[str], num_workers: int) -> None:
    ended = command("train", *sentences, f"data.num_workers={num_workers}")
    assert ended.code == 0, ended.err
    assert "Sentences: 20 train, 8 val; fields: words, odd" in ended.out


def test_a_stream_from_its_config_trains_as_its_samples_do(sentences: list[str]) -> None:
    whole = command("train", *sentences)
    text = TASK.replace(
        "{_target_: sentences.Sentences, count: 20}",
        "{_target_: mtl.data.Stream, length: 20, dataset: {_target_: sentences.Sentences, count: 30}}",
    )
    Path("mine/task/stream.yaml").write_text(text)
    ended = command("train", "--config-dir", "mine", "task=stream")
    assert ended.code == 0, ended.err
    assert ended.metrics["steps"] == whole.metrics["steps"] == 4
    assert ended.metrics["data"] == "Stream: 20 train, 8 val; fields: words, odd"
    again = command("train", "--config-dir", "mine", "task=stream", f"resume={ended.run}", "trainer.max_epochs=2")
    assert again.code == 0, again.err
    assert ended.metrics["steps"] == 8


def test_collate_messages(sentences: list[str]) -> None:
    for overrides, message in (
        (["data.collate._partial_=false"], "missing a required argument: 'samples'"),
        (
            ["data.collate._partial_=false", "data.collate._target_=builtins.dict"],
            "data.collate: builtins.dict gives a dict; for a function add _partial_: true",
        ),
        (["data.collate._target_=builtins.dict"], "target 'odd' not in batch; the dataset gives: words, value"),
        (["data.collate=null"], "'mask' not in batch; the dataset gives: words, odd"),
        (["data.collate=pad"], "data.collate is 'pad'; it must be a mapping with a _target_, or null"),
    ):
        ended = command("train", *sentences, *overrides)
        assert ended.code == 1
        assert message in ended.err
