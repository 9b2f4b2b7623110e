"""Trainings that torchrun starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_resume import assert_same as assert_identical

from mtl.training import checkpoint

PROBLEM = (
    *("task=mnist_two_head", "model.trunk.dropout=0", "optimizer=sgd", "optimizer.lr=0.05", "data.batch_size=500"),
    *("data.eval_batch_size=200", "log.every=2", "balancer=mgda", "trainer.max_epochs=2"),
)
FAILING = """
import os
import signal
import mtl


class Fails:
    def __init__(self, at, how):
        self.at, self.how = at, how
        if at == 0 and mtl.distributed.rank() == 1:
            raise ValueError("the cat sat on it")

    def __call__(self, trainer, result):
        if mtl.distributed.rank() == 1 and trainer.global_step == self.at and not os.path.exists("failed"):
            open("failed", "w").close()
            if self.how == "raise":
                raise ValueError("the cat sat on it")
            os.kill(os.getpid(), signal.SIGKILL)
"""


def run(folder: Path, count: int, *arguments: str, options: tuple[str, ...] = (), module: str = "train") -> Any:
    """Runs a command in so many processes, and returns how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=0", *options]
    launches = count > 1 or bool(options)
    if count > 1:
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *(launcher if launches else []), "-m", f"mtl.{module}", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def only_run(folder: Path, root: str) -> Path:
    (path,) = (folder / root).glob("*/*/metrics.json")
    return path.parent


def state(run: Path) -> dict[str, Any]:
    return checkpoint.load(run / "checkpoints/last.pt")


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)


def test_three_processes_train_like_one(tmp_path: Path) -> None:
    for count in (1, 3):
        done = run(tmp_path, count, *PROBLEM, f"output_root={count}")
        assert done.returncode == 0, done.stderr
    one, three = only_run(tmp_path, "1"), only_run(tmp_path, "3")
    assert sorted(path.name for path in one.iterdir() if "tfevents" not in path.name) == sorted(
        path.name for path in three.iterdir() if "tfevents" not in path.name
    )
    assert_same(state(three)["model"], state(one)["model"], 1e-5)
    figures = [json.loads((run / "metrics.json").read_text()) for run in (one, three)]
    for split in ("train", "val", "test"):
        for task in ("digit", "parity"):
            for name, value in figures[0][split][task].items():
                assert figures[1][split][task][name] == pytest.approx(value, rel=1e-4), (split, task, name)
    lines = [(run / "metrics.csv").read_text().splitlines() for run in (one, three)]
    tags = [[line.rsplit(",", 1)[0] for line in each if "speed/" not in line] for each in lines]
    assert tags[0] == tags[1]  # each figure once


@pytest.mark.parametrize("how", ["auto", "ddp"])
def test_torchrun_with_one_process_changes_nothing(tmp_path: Path, how: str) -> None:
    short = (*PROBLEM, "model.trunk.dropout=0.2", "data.batch_size=1000", "trainer.max_epochs=1")
    for name, options in (("plain", ()), ("torchrun", ("--max-restarts=0",))):
        done = run(tmp_path, 1, *short, f"distributed={how}", f"output_root={name}", options=options)
        assert done.returncode == 0, done.stderr
    plain, ours = (state(only_run(tmp_path, name)) for name in ("plain", "torchrun"))
    assert ours["global_step"] == plain["global_step"] > 3
    for part in ("model", "step", "random", "data", "readings"):
        assert_identical(ours[part], plain[part])


@pytest.mark.parametrize(
    ("at", "how", "rank", "beginning"),
    [
        (3, "ddp", 1, "error: rank 1: callback Fails failed at step 3"),
        (3, "ddp", 0, "error: callback Fails failed at step 3"),
        (3, "fsdp", 1, "error: rank 1: callback Fails failed at step 3"),
        (0, "ddp", 1, "error: rank 1: callbacks.a"),
    ],
)
def test_the_message_of_a_failing_process_is_the_first_and_appears_once(
    tmp_path: Path, at: int, how: str, rank: int, beginning: str
) -> None:
    (tmp_path / "parts.py").write_text(FAILING.replace("rank() == 1", f"rank() == {rank}"))
    failing = f"callbacks={{a: {{_target_: parts.Fails, at: {at}, how: raise}}}}"
    done = run(tmp_path, 2, *PROBLEM, "output_root=out", failing, f"distributed={how}")
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert lines[0].startswith(beginning), done.stderr
    assert "the cat sat on it" in lines[0]
    assert done.stderr.count("the cat sat on it") == 1, done.stderr
    about = json.loads((only_run(tmp_path, "out") / "metrics.json").read_text())
    assert about["status"] == "failed"
    assert "the cat sat on it" in about["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("at", "how"), [(2, "ddp"), (9, "ddp"), (13, "ddp"), (2, "fsdp"), (9, "fsdp")])
def test_a_run_whose_process_was_killed_ends_as_if_nothing_had_happened(tmp_path: Path, at: int, how: str) -> None:
    (tmp_path / "parts.py").write_text(FAILING)
    settings = (*PROBLEM, "model.trunk.dropout=0.2", "checkpoint.every_steps=3", "resume=auto", f"distributed={how}")
    killing = f"callbacks={{a: {{_target_: parts.Fails, at: {at}, how: kill}}}}"
    calm = run(tmp_path, 2, *settings, "output_root=calm")
    assert calm.returncode == 0, calm.stderr
    killed = run(tmp_path, 2, *settings, "output_root=killed", killing, options=("--max-restarts=2",))
    assert killed.returncode == 0, killed.stderr
    assert (tmp_path / "failed").exists()
    assert_same(state(only_run(tmp_path, "killed"))["model"], state(only_run(tmp_path, "calm"))["model"], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3)])
def test_a_terminated_run_goes_on_with_another_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    calm = run(tmp_path, 1, *PROBLEM, "output_root=calm")
    assert calm.returncode == 0, calm.stderr
    (tmp_path / "parts.py").write_text(FAILING.replace("rank() == 1", "rank() == 0").replace("SIGKILL", "SIGTERM"))
    stopping = "callbacks={a: {_target_: parts.Fails, at: 5, how: terminate}}"
    stopped = run(tmp_path, before, *PROBLEM, "output_root=out", stopping)
    assert stopped.returncode != 0
    run_folder = only_run(tmp_path, "out")
    assert state(run_folder)["global_step"] == 5
    going_on = run(tmp_path, after, *PROBLEM, "output_root=out", "resume=auto")
    assert going_on.returncode == 0, going_on.stderr
    assert_same(state(run_folder)["model"], state(only_run(tmp_path, "calm"))["model"], 1e-5)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("evaluate", ["run=x"], "mtl.evaluate runs in one process"),
        ("train", [*PROBLEM, "-m", "seed=1,2"], "torchrun's processes train one run together"),
    ],
)
def test_refused_under_torchrun(tmp_path: Path, module: str, arguments: list[str], message: str) -> None:
    done = run(tmp_path, 2, *arguments, module=module)
    assert done.returncode != 0
    assert sum(message in line for line in done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_named_with_its_step(tmp_path: Path, rank: int) -> None:
    hanging = FAILING.replace("rank() == 1", f"rank() == {rank}").replace("SIGKILL", "SIGSTOP")
    (tmp_path / "parts.py").write_text(hanging)
    callback = "callbacks={a: {_target_: parts.Fails, at: 4, how: hang}}"
    done = run(tmp_path, 3, *PROBLEM, "output_root=out", callback, "trainer.timeout=8")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if "does not answer" in line]
    assert ours == [f"error: the process of rank {rank} does not answer at step 5, in epoch 1"], done.stderr
