"""The set-ups of published papers, `experiment=…`, take steps on small files in the layout of their data sets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import command
from test_dense import MADE
from test_mnist import write_idx
from test_public import ATTRIBUTES, write_celeba

from mtl.problems.celeba import Network


def trained(*arguments: str) -> Any:
    ended = command("train", *arguments, "data.num_workers=0")
    assert ended.code == 0, ended.err
    return ended


def config_of(ended: Any) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ended.run / "config.yaml").read_text())
    return config


def test_multi_mnist_of_mgda(here: Path) -> None:
    folder = here / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 10)):
        write_idx(folder / f"{part}-images-idx3-ubyte", draw.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    ended = trained("experiment=multi_mnist_mgda", "data.batch_size=18", "trainer.max_epochs=1")
    assert ended.metrics["steps"] == 2
    config = config_of(ended)
    assert config["balancer"]["_target_"] == "mtl.balancers.MGDA"
    assert config["scheduler"] == {
        "_target_": "torch.optim.lr_scheduler.StepLR",
        "interval": "epoch",
        "step_size": 30,
        "gamma": 0.5,
    }
    state = torch.load(ended.run / "checkpoints" / "last.pt", weights_only=True)["model"]
    sizes = {name: tuple(value.shape) for name, value in state.items() if name.endswith("weight")}
    assert sizes == {
        "trunk.conv1.weight": (10, 1, 5, 5),
        "trunk.conv2.weight": (20, 10, 5, 5),
        "trunk.linear.weight": (50, 320),
        **{f"heads.{task}.{n}.weight": s for task in ("left", "right") for n, s in ((0, (50, 50)), (3, (10, 50)))},
    }


@pytest.mark.parametrize("balancer", ["famo", "fairgrad"])
def test_celeba_of_famo_and_fairgrad(here: Path, monkeypatch: pytest.MonkeyPatch, balancer: str) -> None:
    write_celeba(here / "data", monkeypatch)
    ended = trained(
        "experiment=celeba_famo", f"balancer={balancer}", "data.size=16", "trainer.max_epochs=2", "logger=[]"
    )
    assert ended.metrics["steps"] == 2
    assert len(ended.metrics["test"]) == len(ATTRIBUTES) == 40
    config = config_of(ended)
    assert config["balancer"].get("weight_decay") == (1e-3 if balancer == "famo" else None)
    assert config["optimizer"] == {"_target_": "torch.optim.Adam", "lr": 3e-4, "groups": None, "then": None}
    assert config["scheduler"] is None


def test_the_network_for_celeba() -> None:
    convolutions = 9 * (3 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512)
    norms = 2 * (64 + 2 * 128 + 2 * 256 + 2 * 512 + 2 * 512)
    network = Network()
    assert sum(parameter.numel() for parameter in network.parameters()) == convolutions + 2 * 512 * 512 + norms
    assert network(torch.rand(2, 3, 32, 24)).shape == (2, 512)


@pytest.mark.parametrize("kind", ["nyuv2", "cityscapes"])
def test_mtan_on_segnet(here: Path, kind: str) -> None:
    MADE.write(here / "data" / kind, kind, {"train": 4, "val": 2}, (32, 32), 0)
    small = ["data.batch_size=2", "trainer.max_epochs=1", "model.trunk.widths=[4,5,6,7,8]"]
    ended = trained(f"experiment={kind}_mtan", *small)
    assert ended.metrics["steps"] == 2
    config = config_of(ended)
    assert config["model"]["_target_"] == "mtl.architectures.MTAN"
    assert config["balancer"]["_target_"] == f"mtl.balancers.{'NashMTL' if kind == 'nyuv2' else 'FAMO'}"
    assert config["balancer"].get("weight_decay") == (None if kind == "nyuv2" else 0.01)
    assert (config["optimizer"]["lr"], config["scheduler"]["step_size"], config["scheduler"]["gamma"]) == (
        1e-4,
        100,
        0.5,
    )
    state = torch.load(ended.run / "checkpoints" / "last.pt", weights_only=True)["model"]
    outputs = {"segmentation": 13, "depth": 1, "normals": 3} if kind == "nyuv2" else {"segmentation": 7, "depth": 1}
    for task, number in outputs.items():
        assert state[f"heads.{task}.0.weight"].shape == (4, 4, 3, 3)
        assert state[f"heads.{task}.1.weight"].shape == (number, 4, 1, 1)
    assert set(ended.metrics["val"]) == set(outputs)
    assert config["trainer"]["last_epochs"] == 10
    assert (ended.metrics["last_epochs"], ended.metrics["last"]["depth"]) == (1, ended.metrics["val"]["depth"])
    better = {  # the figures of the papers' Δm
        **{f"segmentation/{name}": "max" for name in ("iou", "accuracy")},
        **{f"depth/error.{name}": "min" for name in ("absolute", "relative")},
        **({f"normals/angle.{name}": "min" for name in ("mean", "median")} if kind == "nyuv2" else {}),
        **({f"normals/angle.within_{n:g}": "max" for n in (11.25, 22.5, 30)} if kind == "nyuv2" else {}),
    }
    assert {name: ended.metrics["kinds"][name] for name in better} == better
