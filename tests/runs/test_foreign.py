"""Errors that a user's class may raise anywhere: exceptions without a text, sys.exit, Ctrl-C."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import Ended, command

import mtl
from mtl.errors import describe_error, first_line
from mtl.training import checkpoint

MINE = """
import sys, torch, mtl.loggers
from torch import nn

class NoText(Exception):
    def __str__(self): raise RuntimeError("no text")

class NoRepr:
    def __repr__(self): raise RuntimeError("no repr")

def fail(how):
    if how == "no text": raise NoText()
    if how == "no repr": raise KeyError(NoRepr())
    if how == "exit 0": sys.exit()
    if how == "exit 3": sys.exit(3)
    if how == "exit text": sys.exit("good bye")
    if how == "interrupt": raise KeyboardInterrupt

class Points(torch.utils.data.Dataset):
    def __init__(self, count, how=None, at=None):
        self.count, self.how, self.at = count, how, at
        if at == "made": fail(how)
    def __len__(self): return self.count
    def __getitem__(self, index):
        if self.at == "sample" and index == 77: fail(self.how)
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(4, generator=generator)
        return {"x": x, "sign": (x[0] > 0).long()}

class Trunk(nn.Sequential):
    def __init__(self, num_features, how=None, at="made"):
        if at == "made": fail(how)
        super().__init__(nn.Linear(4, num_features), nn.ReLU())
        self.how, self.at = how, at
    def forward(self, x):
        if self.at == "forward" and self.training: fail(self.how)
        return super().forward(x)

class Loss(nn.CrossEntropyLoss):
    def __init__(self, how): super().__init__(); self.how = how
    def forward(self, *given): fail(self.how)

class Callback:
    def __init__(self, how, at="called"):
        self.how = how
        if at == "made": fail(how)
    def __call__(self, trainer, result):
        if trainer.global_step == 3: fail(self.how)

class Logger(mtl.loggers.Logger):
    def __init__(self, folder, tasks, how): self.how = how
    def log(self, step, epoch, scalars): fail(self.how)
    def close(self): pass
"""
TASK = """
# @package _global_
defaults:
  - /objective@tasks.sign: classification
  - _self_
  - override /data: datasets
  - override /model: hard_sharing
  - override /model/trunk: custom
model: {inputs: [x], trunk: {_target_: foreign.Trunk, num_features: 8}}
tasks: {sign: {target: sign, num_outputs: 2}}
data:
  train: {_target_: foreign.Points, count: 200}
  val: {_target_: foreign.Points, count: 50}
  batch_size: 20
  num_workers: 0
trainer: {max_epochs: 1}
"""
PLACES = {
    "trunk made": ["+model.trunk.how={how}"],
    "trunk called": ["+model.trunk.how={how}", "+model.trunk.at=forward"],
    "loss": ["tasks.sign.loss._target_=foreign.Loss", "+tasks.sign.loss.how={how}"],
    "data made": ["+data.train.how={how}", "+data.train.at=made"],
    "sample": ["+data.train.how={how}", "+data.train.at=sample"],
    "callback made": [
        "+callbacks.mine._target_=foreign.Callback",
        "+callbacks.mine.how={how}",
        "+callbacks.mine.at=made",
    ],
    "callback called": ["+callbacks.mine._target_=foreign.Callback", "+callbacks.mine.how={how}"],
    "logger": ["+logger.mine._target_=foreign.Logger", "+logger.mine.how={how}"],
}
SAID = {
    "no text": "NoText: its message can't be shown, since its __str__ raises RuntimeError",
    "no repr": "KeyError: its message can't be shown, since its __str__ raises RuntimeError",
    "exit 0": r"SystemExit(: 0)? \(foreign.py, line",  # W&B's own sys.exit says 0 where nothing is said
    "exit 3": r"SystemExit: 3 \(foreign.py, line",
    "exit text": r"SystemExit: good bye \(foreign.py, line",
}
RUN = ["--config-dir", "mine", "task=foreign"]


@pytest.fixture
def mine(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "path", list(sys.path))  # which mtl.load adds to
    (here / "mine/task").mkdir(parents=True)
    (here / "mine/foreign.py").write_text(MINE)
    (here / "mine/task/foreign.yaml").write_text(TASK.lstrip())
    sys.modules.pop("foreign", None)
    return RUN


def run(place: str, how: str) -> Ended:
    return command("train", *RUN, *(each.format(how=f"'{how}'") for each in PLACES[place]))


@pytest.mark.parametrize("place", PLACES)
def test_each_is_a_sentence_and_no_success(mine: list[str], here: Path, place: str) -> None:
    for how, said in SAID.items():
        if place == "logger" and "no" in how:  # a logger's mistake is shown with its traceback
            continue
        ended = run(place, how)
        assert ended.code == 1, (how, ended.err)
        assert re.search(said, ended.err), (how, ended.err)
        assert "Traceback" not in ended.err
        if ended.run is not None and (ended.run / "metrics.json").exists():
            assert ended.metrics["status"] == "failed"
        if place == "callback called":  # what had been trained is saved
            assert "saved    step 3" in ended.out
            assert checkpoint.load(ended.run / "checkpoints/last.pt")["global_step"] == 3


@pytest.mark.parametrize("place", ["trunk made", "callback made", "callback called", "sample"])
def test_an_interrupt_is_one_wherever_it_comes_from(mine: list[str], here: Path, place: str) -> None:
    ended = run(place, "interrupt")
    assert ended.code == 130
    assert ended.err in ("", "interrupted\n")
    if "made" in place:
        assert ended.err == "interrupted\n"
        assert not list(here.glob("outputs/foreign/*"))  # nothing had begun
    else:
        assert ended.metrics["status"] == "stopped"


def test_evaluation_and_graphs(mine: list[str], here: Path) -> None:
    done = command("train", *RUN)
    assert done.code == 0, done.err
    path = here / "mine/foreign.py"
    for how, said in SAID.items():
        path.write_text(MINE.replace('if at == "made": fail(how)\n        super()', f'fail("{how}")\n        super()'))
        shutil.rmtree(here / "mine/__pycache__", ignore_errors=True)
        for module, arguments in (
            ("evaluate", ["--config-dir", "mine", f"run={done.run}", "split=val"]),
            ("graph", RUN),
        ):
            sys.modules.pop("foreign", None)
            ended = command(module, *arguments)
            assert ended.code == 1
            assert re.search(said, ended.err), ended.err
            assert "Traceback" not in ended.err
        sys.modules.pop("foreign", None)
        with pytest.raises(mtl.UserError) as error:
            mtl.load(done.run)
        assert re.search(said, str(error.value))


def test_a_module_that_exits_when_it_is_imported(mine: list[str], here: Path) -> None:
    (here / "mine/script.py").write_text("import sys\nsys.exit(0)\n")
    ended = command("train", *RUN, "model.trunk._target_=script.Trunk")
    assert ended.code == 1
    assert "model.trunk._target_: importing 'script' failed: SystemExit: 0 (script.py, line 2)" in ended.err


def test_jobs_of_a_multirun(mine: list[str], here: Path) -> None:
    """One that exits has failed, and the others run."""
    ended = command("train", "-m", *RUN, "+model.trunk.how='exit 0','no text',null")
    assert ended.code == 1
    outcomes = [line.split()[1] for line in ended.out.splitlines() if line.startswith(("  0_", "  1_", "  2_"))]
    assert outcomes == ["failed", "failed", "done"], ended.err
    (sweep,) = here.glob("outputs/multirun/*")
    statuses = [json.loads(path.read_text())["status"] for path in sorted(sweep.glob("*/metrics.json"))]
    assert statuses == ["failed", "failed", "finished"]


def test_texts_of_exceptions() -> None:
    class NotText(Exception):
        def __str__(self) -> str:
            return 3  # type: ignore[return-value]

    class Deep(Exception):
        def __str__(self) -> str:
            return str(self)

    assert first_line(NotText()) == "its message can't be shown, since its __str__ raises TypeError"
    assert first_line(Deep()) == "its message can't be shown, since its __str__ raises RecursionError"
    assert describe_error(SystemExit(3)) == "SystemExit: 3"
    assert describe_error(SystemExit()) == "SystemExit"
    assert first_line(ValueError("a\nb")) == "a"
