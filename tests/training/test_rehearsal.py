"""Errors that would end a training after an epoch end it before the first step; trials have no other effect."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command
from test_trainer import make
from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores
from torchmetrics.regression import R2Score

import mtl
from mtl.data import Fields, Loader
from mtl.training.trainer import Trainer

FAST = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=500", "log.every=1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.digit.metrics.accuracy.num_classes=3"], "task 'digit': its metric 'accuracy' failed on a prediction"),
        (["tasks.digit.metrics.accuracy.average=null"], "'accuracy' gives of shape (10,), not one number; set its average"),
        (["trainer.monitor={digit/acuracy: max}"], "trainer.monitor: there is no figure 'digit/acuracy'; did you"),
        (["tasks.digit.metrics.accuracy._target_=torchmetrics.classification.BinaryAccuracy"], "'accuracy'"),
        (["tasks.digit.loss._target_=torch.nn.MSELoss"], "task 'digit': its prediction is of shape (500, 10)"),
    ],
)  # fmt: skip
def test_a_command_ends_before_anything_is_trained_or_saved(here: Path, overrides: list[str], message: str) -> None:
    ended = command("train", *FAST, *overrides)
    assert ended.code == 1
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not list(here.glob("outputs/**/*.pt"))
    rows = [line for path in here.glob("outputs/**/metrics.csv") for line in path.read_text().splitlines()[1:]]
    assert rows == []


class Single(nn.Module):
    """A model with batch norm over samples only, in the trunk or the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def with_norm(where: str, trainer: Trainer) -> Trainer:
    model = trainer.step.model
    if where == "trunk":
        model.trunk.append(Single(8))
    elif where == "head":
        model.heads["b"].add_module("norm", Single(8))
        model.heads["b"].register_forward_pre_hook(lambda head, inputs: (head.norm(inputs[0]),))
    return trainer


def cut(trainer: Trainer, micro: int | None = None, **options: Any) -> None:
    trainer.train = Loader(trainer.train.dataset, batch_size=8, shuffle=True, micro_batch_size=micro, **options)


@pytest.mark.parametrize("where", ["trunk", "head", "nowhere"])
@pytest.mark.parametrize(
    ("count", "micro", "in_step", "drop", "fails"),
    [
        (25, None, None, False, True),  # 8, 8, 8, 1
        (25, None, None, True, False),
        (26, None, None, False, False),
        (24, 7, None, False, True),  # 7 and 1
        (24, None, 7, False, True),
        (24, 4, None, False, False),
        (30, None, 5, False, True),  # 5 and 3, in the end 5 and 1
        (24, 1, None, False, True),
    ],
)
def test_batch_norm_of_one_sample(
    tmp_path: Path, where: str, count: int, micro: int | None, in_step: int | None, drop: bool, fails: bool
) -> None:
    trainer, _ = make(tmp_path, count=count, max_epochs=1)
    cut(trainer, micro, drop_last=drop)
    trainer.step.micro_batch_size = in_step
    trainer = with_norm(where, trainer)
    if where == "nowhere" or not fails:
        trainer.fit()
        assert trainer.epoch == 1
        return
    with pytest.raises(
        mtl.UserError, match=r"Expected more than 1 value per channel.*trainer\.tail=drop .*micro_batch_size"
    ):
        trainer.fit()
    assert trainer.global_step == 0
    assert not list(tmp_path.glob("*.pt"))


class Draws(Metric):
    """A metric that draws random numbers, which it must not, and has a state."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()))
        self.add_state("seen", torch.zeros(()))

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        self.total += (prediction.argmax(1) == target).sum() + 0 * torch.rand(())
        self.seen += len(target)

    def compute(self) -> torch.Tensor:
        return self.total / self.seen + 0 * torch.rand(())


class Counts(nn.Module):
    """A module with a buffer that any pass changes, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return x + 1e-3 * self.passes


@pytest.mark.parametrize("count", [30, 25])
def test_it_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    ended = []
    for name in ("with", "without"):
        trainer, logger = make(tmp_path / name, count=count, monitor={"a/share": "max"})
        trainer.step.model.trunk.append(Counts())
        for task in trainer.step.tasks:
            task.metrics = {"share": Draws}
        trainer.selection.test = Loader(trainer.selection.val.dataset, batch_size=3)
        trainer.selection.val.batch_size = 7
        if name == "without":
            monkeypatch.setattr(trainer.selection, "rehearse", lambda *_: None)
        trainer.fit()
        lines = [(s, e, {k: v for k, v in f.items() if "speed" not in k}) for s, e, f in logger.lines]
        best = trainer.selection.state_dict()
        ended.append((trainer.step.model.state_dict(), torch.get_rng_state(), lines, best))
    (mine, drawn, lines, *rest), (its, drawn_there, lines_there, *rest_there) = ended
    assert all(torch.equal(mine[key], its[key]) for key in its)
    assert mine["trunk.3.passes"] > 10
    assert torch.equal(drawn, drawn_there)
    assert lines == lines_there
    assert rest == rest_there


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(
    ("fields", "metric", "message"),
    [
        ({"x": None}, None, "model.inputs: 'x' not in batch"),
        ({"a": None}, None, "task 'a': target 'a' not in batch"),
        ({"a": torch.full((20,), 7)}, None, "task 'a': its loss failed"),
        ({}, {"accuracy": partial(MulticlassAccuracy, num_classes=5, average="micro")}, "its metric 'accuracy' failed"),
        (
            {},
            {"counts": partial(MulticlassStatScores, num_classes=2, average="none")},
            "metric 'counts' gives of shape (2, 5)",
        ),
    ],
)
def test_each_split_is_tried(tmp_path: Path, split: str, fields: Any, metric: Any, message: str) -> None:
    trainer, _ = make(tmp_path, monitor={"a/loss": "min"})
    whole = {**trainer.selection.val.dataset.fields, **fields}
    if split == "test":
        trainer, _ = make(tmp_path, val=False)
    task = trainer.step.tasks[0]
    task.metrics = metric or task.metrics
    broken = Loader(Fields({name: value for name, value in whole.items() if value is not None}), batch_size=8)
    setattr(trainer.selection, split, broken)
    named = {"val": "validation", "test": "the test split"}[split]
    with pytest.raises(
        mtl.UserError, match=rf"{re.escape(message)}.* \(on one batch of {named}, tried before the first step"
    ):
        trainer.fit()
    assert trainer.global_step == 0
    assert not list(tmp_path.glob("*.pt"))


def test_a_metric_that_has_too_little_in_one_batch_is_no_mistake(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, max_epochs=1, monitor={"a/loss": "min"})
    x = torch.randn(6, 6)
    task = trainer.step.tasks[0]
    task.loss = nn.MSELoss()
    task.metrics = {"r2": R2Score}
    task.head.register_forward_hook(lambda head, inputs, output: output[:, 0])
    values = {"x": x, "a": torch.randn(6), "b": torch.zeros(6, dtype=torch.long)}
    trainer.train = Loader(Fields(values), batch_size=3)
    trainer.selection.val = Loader(Fields(values), batch_size=1)
    trainer.fit()
    assert trainer.selection.figures["a"]["r2"] == trainer.selection.figures["a"]["r2"]  # a number
    trainer.selection.val = Loader(Fields({name: value[:1] for name, value in values.items()}), batch_size=1)
    trainer.max_epochs = 2
    with pytest.raises(
        mtl.UserError, match="its metric 'r2' failed on the whole split: ValueError: Needs at least two"
    ):
        trainer.fit()
    assert trainer.epoch == 1


def test_a_metric_that_fails_at_the_end_says_so_in_a_sentence(tmp_path: Path) -> None:
    class Fails(Draws):
        def compute(self) -> torch.Tensor:
            raise RuntimeError("too little")

    trainer, _ = make(tmp_path, max_epochs=1, monitor={"a/share": "max"})
    trainer.step.tasks[0].metrics = {"share": Fails}
    with pytest.raises(mtl.UserError, match="its metric 'share' failed on the whole split: RuntimeError: too little"):
        trainer.fit()
    assert trainer.global_step == 0  # one batch is the whole split
