"""The live line and the plain lines on the terminal."""

import io

import pytest
import torch
from rich.console import Console

from mtl.loggers import Terminal
from mtl.step import StepResult

SCALARS = {"loss/a/train": 0.5, "loss/b/train": 0.25, "speed/samples_per_second": 1234.0}


class At:
    """The attributes of a trainer that the terminal logger reads."""

    global_step, epoch = 7, 2


def shown(live: bool) -> tuple[Terminal, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=live, width=150)
    return Terminal(console, ["a", "b"], {"a": "accuracy"}, 20, 4), file


def test_plain_lines_come_with_each_validation() -> None:
    terminal, file = shown(live=False)
    terminal.log(7, 2, SCALARS)
    assert file.getvalue() == ""
    terminal.log(7, 2, {"metric/a/accuracy/val": 0.875, "monitor/val": 0.875})
    terminal.close()
    assert file.getvalue() == "epoch 2/4, step 7/20: loss a 0.5000 (accuracy 0.875), b 0.2500, 1,234 samples/s\n"


def result(**losses: float) -> StepResult:
    return StepResult({name: torch.tensor(loss) for name, loss in losses.items()}, {})


def test_plain_lines_within_an_epoch_have_the_losses_of_their_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, file = shown(live=False)
    terminal.log(6, 2, SCALARS)
    terminal(At(), result(a=3.0, b=2.0))
    assert file.getvalue() == ""  # it isn't time yet
    monkeypatch.setattr("mtl.loggers.terminal.PLAIN", 0.0)
    monkeypatch.setattr("mtl.loggers.terminal.REFRESH", 0.0)
    terminal(At(), result(a=3.0, b=2.0))
    terminal(At(), result(b=1.5))  # a step without the other task
    terminal(At(), result())
    assert file.getvalue().splitlines() == [
        "epoch 2/4, step 7/20: loss a 3.0000, b 2.0000, 1,234 samples/s",
        "epoch 2/4, step 7/20: loss b 1.5000, 1,234 samples/s",
        "epoch 2/4, step 7/20: 1,234 samples/s",
    ]


def test_a_validation_without_losses_of_its_step_shows_none() -> None:
    """Nothing was logged since a step before, or, in a run that goes on, nothing at all."""
    validated = {"metric/a/accuracy/val": 0.875, "monitor/val": 0.875}
    terminal, file = shown(live=False)
    terminal.log(7, 2, validated)
    terminal.log(7, 2, SCALARS)
    terminal.log(8, 2, validated)
    terminal.log(9, 2, {"loss/b/train": 0.125})
    terminal.log(9, 2, validated)
    assert file.getvalue().splitlines() == [
        "epoch 2/4, step 7/20: a (accuracy 0.875)",
        "epoch 2/4, step 8/20: a (accuracy 0.875), 1,234 samples/s",
        "epoch 2/4, step 9/20: loss a (accuracy 0.875), b 0.1250, 1,234 samples/s",
    ]


def test_the_live_line_has_the_losses_of_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.loggers.terminal.REFRESH", 0.0)
    terminal, file = shown(live=True)
    terminal.log(6, 2, SCALARS)
    before = len(file.getvalue())
    terminal(At(), result(a=3.0, b=2.0))
    terminal.close()
    assert "a 3.0000, b 2.0000" in file.getvalue()[before:]
    assert "0.5000" not in file.getvalue()[before:]


def test_live_line() -> None:
    terminal, file = shown(live=True)
    terminal.log(7, 2, SCALARS | {"metric/a/accuracy/val": 0.875})
    terminal.close()
    for text in ("epoch 2/4", "7/20", "a 0.5000 (0.875), b 0.2500", "1,234 samples/s"):
        assert text in file.getvalue()
