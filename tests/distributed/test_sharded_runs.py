"""Runs whose parameters are sharded, started by torchrun: stopped, resumed in another layout, and evaluated."""

import json
from pathlib import Path

import pytest
import torch
from conftest import command
from test_torchrun import FAILING, PROBLEM, assert_same, only_run, run

import mtl
from mtl.training import checkpoint

TERMINATING = FAILING.replace("rank() == 1", "rank() == 0").replace("SIGKILL", "SIGTERM")
STOPS = "callbacks={a: {_target_: parts.Fails, at: 5, how: terminate}}"


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_any_layout_and_is_evaluated_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*PROBLEM, "output_root=out", "optimizer=adamw", "optimizer.lr=0.001")
    calm = run(tmp_path, 1, *settings, "output_root=calm")
    assert calm.returncode == 0, calm.stderr
    (tmp_path / "parts.py").write_text(TERMINATING)
    stopped = run(tmp_path, 2, *settings, STOPS, "distributed=fsdp")
    assert stopped.returncode != 0
    folder = only_run(tmp_path, "out")
    assert list(folder.glob("checkpoints/step-5.shards/*.distcp")), stopped.stderr
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["global_step"] == 5
    going_on = run(tmp_path, 3, *settings, "resume=auto", "distributed=fsdp")
    assert going_on.returncode == 0, going_on.stderr
    ours, theirs = (checkpoint.load(each / "checkpoints" / "last.pt") for each in (folder, only_run(tmp_path, "calm")))
    assert ours["global_step"] == theirs["global_step"]
    assert_same(ours["model"], theirs["model"], 1e-4)
    monkeypatch.chdir(tmp_path)
    model = mtl.load(folder)
    best = checkpoint.load(folder / "checkpoints" / "best.pt")["model"]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    done = command("evaluate", f"run={folder}")
    assert done.code == 0, done.err
    accuracy = json.loads((folder / "metrics.json").read_text())["test"]["digit"]["accuracy"]
    assert f"{accuracy:.4g}" in done.out
    report = run(tmp_path, 1, str(folder.parent), module="report")
    assert report.returncode == 0, report.stderr
    assert "1 finished of 1 runs" in report.stdout


@pytest.mark.slow
def test_hsdp_and_synchronised_batch_norm_have_the_numbers_of_one_process(tmp_path: Path) -> None:
    norm = ("model/trunk=cnn", "model.trunk.in_channels=1", "model.trunk.batch_norm=true", "trainer.max_epochs=1")
    plain = [setting for setting in PROBLEM if "dropout" not in setting]
    for count in (1, 2):
        settings = (*plain, *norm, "model.sync_batchnorm=true", f"output_root={count}")
        done = run(tmp_path, count, *settings, *(["distributed=hsdp"] if count > 1 else []))
        assert done.returncode == 0, done.stderr
    one, two = (only_run(tmp_path, root) for root in ("1", "2"))
    assert list(two.glob("checkpoints/*.shards/*.distcp"))
    ours, theirs = (checkpoint.load(each / "checkpoints" / "last.pt")["model"] for each in (two, one))
    assert any("running_var" in name for name in theirs)
    assert_same(ours, theirs, 1e-4)
