"""The summary at the end of a run."""

import json
import math
from pathlib import Path

import pytest
from conftest import command

from mtl.runs.summary import meaning

PARTLY = """
import torch
from mtl.data import Fields, Splits, mnist

def partly(**_):
    '''Every second digit isn't known; nothing is known of parity.'''
    data = mnist()
    for split in (data.train, data.val, data.test):
        split.fields['digit'][::2] = -100
        split.fields['never'] = torch.full_like(split.fields['digit'], -100)
    return data
"""
OWN = [
    "--config-dir",
    "code",
    "task=mnist_two_head",
    "data._target_=partly.partly",
    "~data.source",
    "data.batch_size=500",
]


@pytest.fixture
def code(here: Path) -> Path:
    (here / "code").mkdir()
    (here / "code/partly.py").write_text(PARTLY)
    return here


def test_how_far_an_accuracy_is_to_be_trusted_hangs_on_the_labels_there_are(code: Path) -> None:
    ended = command("train", *OWN, "trainer.max_epochs=1", "only=digit")
    assert ended.code == 0, ended.err
    accuracy = ended.metrics["test"]["digit"]["accuracy"]
    assert ended.metrics["labelled"] == {"digit": 250}
    error = math.sqrt(accuracy * (1 - accuracy) / 250)
    out = " ".join(ended.out.split())
    assert f"500 test samples (250 with a label of digit): an accuracy is uncertain by about ±{error:.3f}" in out


def test_a_task_without_labels_has_no_step_more_measured_than_it_takes_to_see(code: Path) -> None:
    """The steps in which it might have had its turn are measured too, two for each task; and memory is all the same."""
    ended = command("train", *OWN, "trainer.max_epochs=3", "tasks.parity.target=never", "log.every=10")
    assert ended.code == 0, ended.err
    assert ended.metrics["steps"] == 24
    assert ended.metrics["measured_steps"] == 3 * 4  # from steps 1, 10 and 20 on
    assert ended.metrics["memory_per_step"] > 0


def test_without_a_test_split_the_command_is_one_that_works(here: Path) -> None:
    (here / "code").mkdir()
    (here / "code/short.py").write_text(
        "from mtl.data import Splits, mnist\n\ndef short(**_):\n    data = mnist()\n    return Splits(data.train, data.val)\n"
    )
    own = ["--config-dir", "code", "task=mnist_two_head", "data._target_=short.short"]
    ended = command("train", *own, "data.batch_size=500", "trainer.max_epochs=1")
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if line.startswith("evaluate")]
    assert line.endswith(" split=val")
    again = command("evaluate", *line.split("mtl.evaluate ")[1].split())
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("oftener", "end"),
    [
        (3, "too few steps for a conclusion; log.every=3 measures more often."),
        (None, "7 measured steps: too few steps for a conclusion."),
    ],
)
def test_too_few_steps_are_told_with_what_helps(oftener: int | None, end: str) -> None:
    assert meaning(0.5, 0.0, 7, oftener).endswith(end)
    assert meaning(0.5, 0.0, 8, oftener).endswith("sharing suits them.")


@pytest.mark.parametrize(("every", "epochs", "told"), [(100, 5, 2), (2, 5, None), (100, 1, 1), (1, 1, None)])
def test_the_advice_is_to_measure_more_often_than_now(here: Path, every: int, epochs: int, told: int | None) -> None:
    """40 or 8 steps: eight measured steps are enough to say something, sixteen better."""
    ended = command(
        "train", "task=mnist_two_head", "data.batch_size=500", f"trainer.max_epochs={epochs}", f"log.every={every}"
    )
    assert ended.code == 0, ended.err
    out = " ".join(ended.out.split())
    assert ("measures more often" in out) == (told is not None)
    assert told is None or f"log.every={told} measures more often" in out
    assert json.loads((ended.run / "metrics.json").read_text())["measured_steps"] >= 1


def test_of_many_pairs_it_is_said_that_there_are_more(here: Path) -> None:
    more = [f"/objective@tasks.{name}" for name in "ab"]
    (here / "code/task").mkdir(parents=True)
    (here / "code/task/four.yaml").write_text(
        "# @package _global_\ndefaults:\n  - mnist_two_head\n"
        + "".join(f"  - {each}: classification\n" for each in more)
        + "  - _self_\ntasks:\n  a: {target: digit, num_outputs: 10}\n  b: {target: parity, num_outputs: 2}\n"
    )
    ended = command("train", "--config-dir", "code", "task=four", "data.batch_size=500", "trainer.max_epochs=1")
    assert ended.code == 0, ended.err
    assert "These are the lowest of 6 pairs; metrics.json has all of them." in ended.out
    assert len(ended.metrics["cosine"]) == 6


def test_the_columns_of_the_table_say_whose_figures_they_are(here: Path) -> None:
    """The best epoch is the first, and the training losses are those of the third, as its steps had them."""
    (here / "code").mkdir()
    (here / "code/seen.py").write_text(
        "class Losses:\n    rows = []\n"
        "    def __call__(self, trainer, result):\n"
        "        self.rows.append((trainer.epoch, result.losses['digit'].item()))\n"
    )
    own = ["--config-dir", "code", "task=mnist_two_head", "data.batch_size=500", "optimizer.lr=0.0"]
    ended = command("train", *own, "trainer.max_epochs=3", "+callbacks.seen._target_=seen.Losses")
    assert ended.code == 0, ended.err
    import seen  # the module that the run has imported

    losses = [loss for epoch, loss in seen.Losses.rows if epoch == 3]
    out = " ".join(ended.out.split())
    assert "best.pt is from epoch 1 of 3" in out
    assert ended.metrics["train"]["digit"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert (
        "The training losses are means over the steps of epoch 3, while the parameters were changing; val and test"
        in out
    )
    lines = ended.out.splitlines()
    (rule,) = [number for number, line in enumerate(lines) if line.startswith(" ──")]
    assert lines[rule - 2].split()[:3] == ["train,", "val,", "test,"]
    assert lines[rule - 1].split()[:6] == ["task", "figure", "epoch", "3", "best.pt", "best.pt"]


def test_a_trunk_that_thaws_is_neither_unreached_nor_unshared(here: Path) -> None:
    """Eight steps, of which the first alone would be measured."""
    ended = command(
        "train", "task=mnist_two_head", "data.batch_size=500", "trainer.max_epochs=1", "model.freeze_until={trunk: 4}"
    )
    assert ended.code == 0, ended.err
    assert ended.metrics["unreached"] == []
    assert "Trainable parameters that no task reached: none." in ended.out
    assert "No parameter is shared" not in ended.out
    assert list(ended.metrics["cosine"]) == ["digit~parity"]


def test_a_parameter_that_nothing_uses_is_listed(here: Path) -> None:
    (here / "code").mkdir()
    (here / "code/spare.py").write_text(
        "import torch\nfrom mtl.trunks import LeNet\n"
        "class Spare(LeNet):\n"
        "    def __init__(self, **options):\n"
        "        super().__init__(**options)\n"
        "        self.spare = torch.nn.Linear(2, 2, bias=False)\n"
    )
    own = ["--config-dir", "code", "task=mnist_two_head", "data.batch_size=500", "model.trunk._target_=spare.Spare"]
    ended = command("train", *own, "trainer.max_epochs=1")
    assert ended.code == 0, ended.err
    assert ended.metrics["unreached"] == ["trunk.spare.weight"]


def test_a_monitor_with_scales_is_shown_with_its_terms(here: Path) -> None:
    terms = "{digit/accuracy: {mode: max, scale: 0.1}, parity/loss: {mode: min, scale: 0.5}}"
    ended = command(
        "train", "task=mnist_two_head", "data.batch_size=500", "trainer.max_epochs=1", f"trainer.monitor={terms}"
    )
    assert ended.code == 0, ended.err
    val, value = ended.metrics["val"], ended.metrics["best"]["value"]
    accuracy, loss = val["digit"]["accuracy"], val["parity"]["loss"]
    assert value == pytest.approx((accuracy / 0.1 - loss / 0.5) / 2)
    told = f"{value:.4f} = ({accuracy:.6g} / 0.1 - {loss:.6g} / 0.5) / 2"
    assert told in " ".join(ended.out.split())
    assert ended.metrics["best"]["monitor"] == "mean of digit/accuracy / 0.1, -parity/loss / 0.5 (max)"
