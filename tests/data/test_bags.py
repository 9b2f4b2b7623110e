"""Bags of items with ids in flat fields, from the command line: whole batches and micro-batches train the same way."""

from pathlib import Path

import pytest
from conftest import Ended, command

CODE = '''
import torch
from torch import nn
from torch.utils.data import Dataset

import mtl


class Users(Dataset):
    """A user's bag of one to nine items, and whether the user clicks and how often."""

    def __init__(self, count, seed):
        draws = torch.Generator().manual_seed(seed)
        self.bags = [torch.randint(0, 50, (int(torch.randint(1, 10, (1,), generator=draws)),), generator=draws)
                     for _ in range(count)]

    def __len__(self):
        return len(self.bags)

    def __getitem__(self, index):
        items = self.bags[index]
        return {"ids": items, "click": (items < 20).any().long(), "often": (items < 20).sum().float()}


def users():
    return mtl.data.Splits(Users(100, 0), Users(30, 1), Users(30, 2), name="users")


def collate(samples):
    lengths = torch.tensor([len(sample["ids"]) for sample in samples])
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("click", "often")}
    offsets = lengths.cumsum(0) - lengths
    return {**batch, "ids": torch.cat([sample["ids"] for sample in samples]), "offsets": offsets}


class Bags(nn.Module):
    num_features = 16

    def __init__(self):
        super().__init__()
        self.items = nn.EmbeddingBag(50, 16, mode="mean")

    def forward(self, ids, offsets):
        return self.items(ids, offsets)


def squared(prediction, target):
    return (prediction - target).square().mean()
'''
TASK = """
# @package _global_
defaults:
  - /objective@tasks.click: classification
  - /objective@tasks.often: regression
  - _self_
  - override /model: hard_sharing
  - override /model/trunk: custom
data: {_target_: users.users, batch_size: 32, eval_batch_size: 32, num_workers: 0,
       collate: {_target_: users.collate, _partial_: true}}
model: {inputs: [ids, offsets], trunk: {_target_: users.Bags}}
tasks:
  click: {target: click, num_outputs: 2, metrics: null}
  often: {target: often, num_outputs: 1, metrics: null, head: {squeeze: true},
          loss: {_target_: users.squared, _partial_: true}}
optimizer: {lr: 0.05}
trainer: {max_epochs: 3, monitor: {click/loss: min}}
logger: {}
"""


def train(*overrides: str) -> Ended:
    Path("mine/task").mkdir(parents=True, exist_ok=True)
    Path("mine/users.py").write_text(CODE)
    Path("mine/task/users.yaml").write_text(TASK)
    ended = command("train", "--config-dir", "mine", "task=users", *overrides)
    assert ended.code == 0, ended.out + ended.err
    return ended


def figures(ended: Ended) -> dict[str, float]:
    return {f"{task}/{split}": each["loss"] for split in ("val", "test") for task, each in ended.metrics[split].items()}


@pytest.mark.parametrize("how", ["trainer.micro_batch_size=7", "trainer.num_micro_batches=3"])
def test_bags_train_alike_in_micro_batches(here: Path, how: str) -> None:
    whole, micro = figures(train()), figures(train(how))
    assert micro == pytest.approx(whole, rel=1e-5)


def test_samples_are_counted_and_not_items(here: Path) -> None:
    train("trainer.max_epochs=1")
    ended = command("graph", "--config-dir", "mine", "task=users")
    assert "batch    32 samples, the first of epoch 1" in ended.out, ended.out + ended.err
