"""A run that several processes trained is loaded and evaluated in one process, as a run that one process trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import command
from test_torchrun import PROBLEM, assert_same, only_run, run

import mtl
from mtl.training import checkpoint
from mtl.training.validation import Validation


def evaluated(folder: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """Evaluates a run by mtl.evaluate, and returns the figures with all their digits."""
    figures: list[Any] = []
    original = Validation.__call__

    def recorded(self: Validation, loader: Any) -> Any:
        figures.append(original(self, loader))
        return figures[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "__call__", recorded)
        done = command("evaluate", f"run={folder}", f"split={split}")
    assert done.code == 0, done.err
    (of_split,) = figures
    return of_split


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_a_run_of_two_processes_is_that_of_one(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alone = command("train", *PROBLEM, "output_root=1")
    assert alone.code == 0, alone.err
    together = run(tmp_path, 2, *PROBLEM, "output_root=2", f"distributed={how}")
    assert together.returncode == 0, together.stderr
    one, two = only_run(tmp_path, "1"), only_run(tmp_path, "2")
    assert (two / "checkpoints" / "step-16.shards").is_dir() == (how == "fsdp")
    assert not dist.is_initialized()
    for name in ("best", "last"):
        models = [mtl.load(folder, checkpoint=name).state_dict() for folder in (one, two)]
        assert_same(models[1], models[0], 1e-5)
        saved = checkpoint.load(one / "checkpoints" / f"{name}.pt")["model"]
        assert all(torch.equal(value, saved[key]) for key, value in models[0].items())
    before = mtl.load(one, checkpoint="last-1").state_dict()
    assert not all(torch.allclose(value, before[key], atol=1e-4) for key, value in models[1].items())  # has trained
    for split in ("val", "test"):
        expected, figures = (evaluated(folder, split, monkeypatch) for folder in (one, two))
        own = json.loads((two / "metrics.json").read_text())[split]
        assert expected.keys() == figures.keys() == own.keys() == {"digit", "parity"}
        for task, values in expected.items():
            assert figures[task] == pytest.approx(values, rel=1e-5)
            assert figures[task] == pytest.approx(own[task], rel=1e-5)
    assert not dist.is_initialized()
