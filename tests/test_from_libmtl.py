"""The example on the page "From LibMTL" takes the steps that LibMTL's own loop takes."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, command
from pages import Page
from test_public import picture
from torch import nn

import mtl
from mtl.build import build

DOMAINS = ("amazon", "dslr", "webcam")
SETTINGS = [
    *("task=office_of_libmtl", "data.batch_size=4", "trainer.max_epochs=1", "+model.trunk.dropout=0.0"),
    *(f"+data.sources.{domain}.size=32" for domain in DOMAINS),
]


@pytest.fixture
def folder(here: Path) -> Path:
    """A folder with the files of the page, and pictures of two classes in each domain."""
    for name, text in Page(ROOT / "docs" / "from" / "libmtl.md").files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    count = 0
    for number, domain in enumerate(DOMAINS):
        for name in ("bike", "mug"):
            for index in range(7 + 3 * number):
                count += 1
                picture(here / "data" / domain / name / f"frame_{index:04}.jpg", 40, 36, count)
    return here


def batches(loader: Any, epochs: int) -> Iterator[dict[str, Any]]:
    """The batches of the loader, in float64."""
    for epoch in range(epochs):
        for batch in loader.batches(epoch):
            yield {
                name: {key: value.double() if value.is_floating_point() else value for key, value in fields.items()}
                for name, fields in batch.items()
            }


def test_the_example_of_libmtl(folder: Path) -> None:
    ended = command("train", "--config-dir", "mine", *SETTINGS)
    assert ended.code == 0, ended.err
    config = yaml.safe_load((ended.run / "config.yaml").read_text())
    built = build(config, code_folders=["mine"])
    model = built.model.double()
    encoder, decoders = deepcopy(model.trunk), deepcopy(model.heads)
    lr, weight_decay = 1e-4, 1e-5

    step = mtl.Step(model, built.tasks, torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay))
    assert config["balancer"] == {"_target_": "mtl.balancers.Equal"}  # the default of `mtl.Step`
    taken = 0
    for batch in batches(built.loaders["train"], 2):
        step(batch)
        taken += 1

    # The loop of LibMTL's Trainer.train with multi_input, and EW.backward
    both = nn.ModuleList([encoder, decoders])
    optimizer = torch.optim.Adam(both.parameters(), lr=lr, weight_decay=weight_decay)
    both.train()
    for batch in batches(built.loaders["train"], 2):
        losses = torch.zeros(3, dtype=torch.float64)
        for number, task in enumerate(DOMAINS):
            prediction = decoders[task](encoder(batch[task]["image"]))
            losses[number] = nn.functional.cross_entropy(prediction, batch[task]["label"])
        optimizer.zero_grad(set_to_none=False)
        losses.sum().backward()
        optimizer.step()

    assert taken == 2 * ended.metrics["steps"] > 4
    ours = {f"0.{k}": v for k, v in model.trunk.state_dict().items()}
    ours |= {f"1.{k}": v for k, v in model.heads.state_dict().items()}
    for name, value in both.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
