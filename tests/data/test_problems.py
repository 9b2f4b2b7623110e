"""Problems on public sets and on a user's images, from the config alone, with a small trunk."""

from pathlib import Path

import pytest
from conftest import command
from test_image_table import folder as pictures  # noqa: F401  (a fixture)
from test_public import ATTRIBUTES, write_celeba, write_cifar, write_pets

from mtl.runs import loading as runs

TRUNK = """\
import torch
from torch import nn

class Trunk(nn.Module):
    '''A map of features, or its mean over the places.'''
    def __init__(self, num_features, name="", pooled=True):
        super().__init__()
        self.conv, self.pooled = nn.Conv2d(3, num_features, 5, stride=3), pooled
    def forward(self, image):
        features = torch.relu(self.conv(image))
        return features.mean((2, 3)) if self.pooled else features
"""
SMALL = [
    "model/trunk=custom",
    "model.trunk._target_=small.Trunk",
    "+model.trunk.num_features=4",
    "trainer.max_epochs=1",
]


@pytest.fixture
def train(here: Path):
    (here / "mine" / "task").mkdir(parents=True)
    (here / "mine" / "small.py").write_text(TRUNK)
    return lambda *arguments: command("train", "--config-dir", "mine", *arguments, *SMALL)


def test_cifar100(train, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(here / "data", monkeypatch)
    ended = train("task=cifar100")
    assert ended.code == 0, ended.err
    assert "CIFAR-100 in data/cifar-100-python: 18 train, 2 val, 5 test; fields: image, fine, coarse" in ended.out
    assert set(ended.metrics["test"]) == {"fine", "coarse"}
    assert runs.read(ended.run)["model"]["heads.coarse.weight"].shape == (20, 4)
    evaluated = command("evaluate", f"run={ended.run}")
    assert evaluated.code == 0, evaluated.err


def test_celeba(train, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_celeba(here / "data", monkeypatch)
    ended = train("task=celeba", "data.size=16", "data.num_workers=0")
    assert ended.code == 0, ended.err
    config = runs.read(ended.run)["config"]
    assert [task["target"] for task in config["tasks"].values()] == ATTRIBUTES
    assert list(config["tasks"])[:2] == ["Five_o_Clock_Shadow", "Arched_Eyebrows"]


def test_pets(train, here: Path) -> None:
    write_pets(here / "data")
    ended = train("task=pets", "data.size=[16,20]", "data.num_workers=0", "data.validation=0.25")
    assert ended.code == 0, ended.err
    assert set(ended.metrics["test"]["mask"]) == {"accuracy", "iou", "loss"}


def test_files_that_are_not_there(train) -> None:
    ended = train("task=pets")
    assert ended.code == 1
    assert ended.err.startswith("error: Oxford-IIIT Pet: its files can't be read in ")


OWN = """\
# @package _global_
defaults:
  - /objective@tasks.kind: classification
  - /objective@tasks.sharp: classification
  - _self_
  - override /data: image_table
  - override /model: hard_sharing
  - override /model/trunk: custom
model: {inputs: [image]}
tasks:
  kind: {target: kind, num_outputs: 2}
  sharp: {target: sharp, num_outputs: 2}
data:
  images: pictures
  labels: pictures/labels.csv
  targets: [kind, sharp]
  classes: [sharp]
  split_column: part
  size: 8
"""


def test_pictures_of_ones_own(train, here: Path, pictures: Path) -> None:  # noqa: F811
    (pictures / "labels.csv").write_text(
        "file,kind,sharp,part\na.png,cat,1,train\nmore/b.jpg,dog,0,train\nd.png,dog,1,val\n"
    )
    (here / "pictures").symlink_to(pictures)
    (here / "mine" / "task" / "own.yaml").write_text(OWN)
    ended = train("task=own")
    assert ended.code == 0, ended.err
    assert "pictures of labels.csv, split by 'part': 2 train, 1 val; fields: image, kind, sharp" in ended.out


def test_office(train, here: Path, pictures: Path) -> None:  # noqa: F811
    for name in ("mug", "pen"):
        for index in range(5):
            path = here / "office" / "amazon" / "images" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((pictures / "a.png").read_bytes())
    (here / "mine" / "task" / "amazon.yaml").write_text(
        OWN.split("tasks:\n")[0]
        .replace("image_table", "office")
        .replace("  - /objective@tasks.sharp: classification\n", "")
        + "tasks:\n  kind: {target: label, num_outputs: 31}\n"
        + "data: {kind: office31, domain: amazon, root: office, size: 8}\n"
    )
    ended = train("task=amazon", "data.num_workers=0")
    assert ended.code == 0, ended.err
    assert "Office-31, amazon, split at random (data.seed=0): 6 train, 2 val, 2 test; fields: image, label" in ended.out
