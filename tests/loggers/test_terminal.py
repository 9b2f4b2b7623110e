"""The live line and the plain ones."""

import io

import pytest
from rich.console import Console

from mtl.loggers import Terminal

SCALARS = {"loss/a/train": 0.5, "loss/b/train": 0.25, "speed/samples_per_second": 1234.0}


class At:
    """As much of a trainer as the terminal looks at."""

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


def test_plain_line_within_a_long_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, file = shown(live=False)
    terminal.log(7, 2, SCALARS)
    terminal(At(), None)
    assert file.getvalue() == ""
    monkeypatch.setattr("mtl.loggers.terminal.PLAIN", 0.0)
    monkeypatch.setattr("mtl.loggers.terminal.REFRESH", 0.0)
    terminal(At(), None)
    assert "step 7/20: loss a 0.5000" in file.getvalue()


def test_live_line() -> None:
    terminal, file = shown(live=True)
    terminal.log(7, 2, SCALARS | {"metric/a/accuracy/val": 0.875})
    terminal.close()
    for text in ("epoch 2/4", "7/20", "a 0.5000 (0.875), b 0.2500", "1,234 samples/s"):
        assert text in file.getvalue()
