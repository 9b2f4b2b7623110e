"""Errors in the middle of a run, with a message of one sentence each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command
from test_nonfinite import Infinite
from test_resume import assert_same
from test_trainer import make

import mtl
from mtl.training import checkpoint

FAST = ["task=mnist_two_head", "trainer.max_epochs=2", "data.batch_size=500"]


@pytest.fixture
def own(here: Path) -> list[str]:
    """Trunks that fail in the second epoch."""
    (here / "mine").mkdir()
    (here / "mine/trunks.py").write_text(
        "import torch\n"
        "from mtl.trunks import LeNet\n"
        "class Full(LeNet):\n"
        "    steps = 0\n"
        "    def forward(self, x):\n"
        "        Full.steps += self.training\n"
        "        if Full.steps > 11:\n"
        "            Full.steps = 0\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')\n"
        "        return super().forward(x)\n"
        "class Wild(LeNet):\n"
        "    def forward(self, x):\n"
        "        features = super().forward(x)\n"
        "        return features.put(torch.arange(3), features.new_ones(3))\n"
    )
    return ["--config-dir", "mine", *FAST]


def test_out_of_memory_says_where_and_what_to_do(own: list[str], here: Path) -> None:
    ended = command("train", *own, "model.trunk._target_=trunks.Full")
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert "out of memory at step 12, in epoch 2: CUDA out of memory" in ended.err
    assert "Split the batch with trainer.micro_batch_size" in ended.err
    assert "saved    step 11; once the problem is solved, resume with resume=outputs/mnist_two_head/" in ended.out
    again = command("train", *own, "model.trunk._target_=trunks.Full", "resume=auto")
    assert again.code == 0, again.err
    assert "resume   from step 11" in again.out


def test_deterministic_names_the_operation_that_is_not(own: list[str], here: Path) -> None:
    try:
        plain = command("train", *own, "deterministic=true")
        assert plain.code == 0, plain.err
        assert torch.are_deterministic_algorithms_enabled()
        ended = command("train", *own, "model.trunk._target_=trunks.Wild", "deterministic=true")
        assert ended.code == 1
        assert "put_" in ended.err
        assert "deterministic" in ended.err
        assert "Traceback" not in ended.err
        assert command("train", *own, "model.trunk._target_=trunks.Wild").code == 0
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def points(here: Path) -> list[str]:
    """Data that pass through worker processes, and that can fail at a sample."""
    (here / "mine/task").mkdir(parents=True)
    (here / "mine/points.py").write_text(
        "import os, random, signal, torch\n"
        "class Points(torch.utils.data.Dataset):\n"
        "    def __init__(self, count, fails=None):\n"
        "        self.count, self.fails = count, fails\n"
        "        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))\n"
        "    def __len__(self): return self.count\n"
        "    def __getitem__(self, index):\n"
        "        if self.fails is not None and index == 77:\n"
        "            if self.fails == 'dies': os.kill(os.getpid(), signal.SIGKILL)\n"
        "            raise OSError('picture 77.png is cut short')\n"
        "        x = self.x[index] + 0.1 * torch.randn(4) + 0.1 * random.random()\n"
        "        return {'x': x, 'sign': (self.x[index, 0] > 0).long()}\n"
        "class Trunk(torch.nn.Sequential):\n"
        "    def __init__(self, num_features):\n"
        "        super().__init__(torch.nn.Linear(4, num_features), torch.nn.ReLU(), torch.nn.Dropout(0.1))\n"
    )
    (here / "mine/task/points.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - /objective@tasks.sign: classification\n"
        "  - /objective@tasks.again: classification\n"
        "  - _self_\n"
        "  - override /data: datasets\n"
        "  - override /model: hard_sharing\n"
        "  - override /model/trunk: custom\n"
        "model: {inputs: [x], trunk: {_target_: points.Trunk, num_features: 8}}\n"
        "tasks: {sign: {target: sign, num_outputs: 2}, again: {target: sign, num_outputs: 2}}\n"
        "data:\n"
        "  train: {_target_: points.Points, count: 200}\n"
        "  val: {_target_: points.Points, count: 50}\n"
        "  batch_size: 20\n"
        "trainer: {max_epochs: 2}\n"
    )
    return ["--config-dir", "mine", "task=points"]


# PyTorch's handler of the worker's death raises wherever the main thread is, also while the DataLoader opens a file.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("fails", "workers"), [("dies", 1), ("raises", 1), ("raises", 0)])
def test_samples_that_cannot_be_had(points: list[str], fails: str, workers: int) -> None:
    ended = command("train", *points, f"+data.train.fails={fails}", f"data.num_workers={workers}")
    assert ended.code == 1
    assert "Traceback" not in ended.err
    (error, _) = ended.err.splitlines()
    if fails == "dies":
        assert "data: a process that loads samples died at step" in error
        assert "DataLoader worker (pid" in error
        assert "data.num_workers=0" in error
    else:
        told = "data: a batch of Points (train) can't be loaded: sample 77: OSError: picture 77.png is cut short (points.py, line"
        assert told in error
    # What had been trained by then is saved, and goes on when it is mended. A worker that dies takes with it what it
    # had loaded ahead, so it may be the first batch that can't be had.
    assert "saved    step" in ended.out or fails == "dies"
    if "saved    step" in ended.out:
        assert ended.metrics["status"] == "failed"
        run = f"resume={ended.run}"
        more = command("train", *points, f"data.num_workers={workers}", run, "resume_allow=[data.train.fails]")
        assert more.code == 0, more.err
        whole = command("train", *points)
        assert_same_parameters(ended.run, whole.run)


def assert_same_parameters(mine: Path, its: Path) -> None:
    states = [checkpoint.load(run / "checkpoints/last.pt") for run in (mine, its)]
    for key in ("model", "step", "random"):
        assert_same(states[0][key], states[1][key], key)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores
def test_workers_logs_and_validation_do_not_change_a_bit(points: list[str]) -> None:
    plain = command("train", *points)
    assert plain.code == 0, plain.err
    for other in (["data.num_workers=1"], ["data.num_workers=4"], ["log.every=1"], ["log.every=7"], ["data.val=null"]):
        ended = command("train", *points, *other)
        assert ended.code == 0, ended.err
        assert_same_parameters(ended.run, plain.run)
    seeded = command("train", *points, "seed=1")
    with pytest.raises(AssertionError):
        assert_same_parameters(seeded.run, plain.run)


GONE = """
import os, pathlib, shutil
import mtl.loggers

def lose(how, run):
    if how == "deleted": shutil.rmtree(run)
    elif how == "moved": run.rename(run.parent / "elsewhere")
    elif how == "replaced":
        run.rename(run.parent / "elsewhere")
        (run / "checkpoints").mkdir(parents=True)
        (run / "metrics.json").write_text("another's")
    elif how == "a file": shutil.rmtree(run); run.write_text("a file in its place")
    elif how == "checkpoints": shutil.rmtree(run / "checkpoints")
    elif how == "last.pt": (run / "checkpoints/last.pt").unlink()

class AtStep:
    def __init__(self, how): self.how = how
    def __call__(self, trainer, result):
        if trainer.global_step == 9:
            trainer.writer.wait()
            lose(self.how, trainer.writer.folder.parent)

class AtEnd(mtl.loggers.Logger):
    def __init__(self, folder, tasks, how): self.folder, self.how = folder, how
    def log(self, step, epoch, scalars):
        if "monitor/best" in scalars: lose(self.how, self.folder)
    def close(self): pass
"""


@pytest.mark.parametrize("when", ["callbacks.lost._target_=gone.AtStep", "logger.lost._target_=gone.AtEnd"])
@pytest.mark.parametrize("how", ["deleted", "moved", "replaced", "a file", "checkpoints", "last.pt"])
def test_a_run_whose_folder_is_lost_says_so_and_fails(own: list[str], here: Path, how: str, when: str) -> None:
    (here / "mine/gone.py").write_text(GONE)
    key = when.split("=")[0].replace("_target_", "how")
    ended = command("train", *own, "checkpoint.every_steps=3", f"+{when}", f"+{key}={how}")
    assert ended.code == 1
    what = {"checkpoints": r"checkpoints/\w+\.pt no longer exists", "last.pt": r"checkpoints/last\.pt no longer exists"}
    lost = "is no longer the run's folder, which" if how in ("replaced", "a file") else "no longer exists: it"
    pattern = what.get(how, rf"error: /\S+/mnist_two_head/\S+ {lost} was deleted or moved while the run trained")
    assert re.search(pattern, ended.err), ended.err
    assert "Traceback" not in ended.err
    assert "Written to" not in ended.out
    # It ends at the next save, before the epoch is over.
    assert "best.pt is from" not in ended.out
    assert ("epoch 2/2" in ended.out) == ("AtEnd" in when)
    (folder,) = {*here.glob("outputs/mnist_two_head/20*")} or {None}
    if how == "replaced":  # nothing of the other run is touched
        assert {path.name for path in folder.rglob("*")} == {"checkpoints", "metrics.json"}
        assert (folder / "metrics.json").read_text() == "another's"
    elif how in ("checkpoints", "last.pt"):
        assert json.loads((folder / "metrics.json").read_text())["status"] == "failed"
    else:
        assert folder is None or folder.is_file()
    if how in ("moved", "replaced"):  # what had been saved is there
        assert checkpoint.load(here / "outputs/mnist_two_head/elsewhere/checkpoints/last.pt")["global_step"] in (8, 16)


def test_a_full_disk_under_the_logs_stops_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mtl.loggers.CsvLogger.log", full)
    ended = command("train", *FAST, "log.every=2")
    assert ended.code == 0, ended.err
    assert ended.out.count("error    CsvLogger can't write: [Errno 28] No space left on device. Training goes on") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_file_on_a_disk_that_is_really_full(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_full_disk(path: Path, mode: str, *, opener: Any, **options: Any):
        if Path(path).name == "metrics.csv":
            return open("/dev/full", mode, **options)
        return open(path, mode, opener=opener, **options)

    monkeypatch.setattr("mtl.files.open", on_full_disk, raising=False)
    ended = command("train", *FAST, "log.every=2", "checkpoint.every_steps=3")
    assert ended.code == 0, ended.err
    assert "error    CsvLogger can't write: [Errno 28] No space left on device. Training goes on" in ended.out
    assert ended.metrics["status"] == "finished"


def test_fp16_whose_gradients_are_never_finite(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, precision="fp16", max_epochs=100, val=False)
    trainer.step.model.trunk.register_forward_hook(lambda module, inputs, output: Infinite.apply(output))
    with pytest.raises(mtl.UserError, match="60 steps in a row gave no finite gradient in fp16"):
        trainer.fit()


def test_loggers_are_closed_when_a_job_of_a_sweep_fails(own: list[str], here: Path) -> None:
    (here / "mine/noted.py").write_text(
        "import pathlib, mtl.loggers\n"
        "class Noted(mtl.loggers.Logger):\n"
        "    def __init__(self, folder, tasks): self.name = folder.name\n"
        "    def log(self, step, epoch, scalars): pass\n"
        "    def close(self):\n"
        "        with pathlib.Path('closed').open('a') as file: file.write(self.name + '\\n')\n"
    )
    trunks = "model.trunk._target_=trunks.Full,mtl.trunks.LeNet"
    ended = command("train", "-m", *own, trunks, "+logger.noted._target_=noted.Noted", "log.every=3")
    assert ended.code == 1
    assert "2 jobs in" in ended.out
    assert [name[0] for name in Path("closed").read_text().split()] == ["0", "1"]


def test_jobs_that_start_in_one_second_have_folders_of_their_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.cli.folders.time.strftime", lambda form: "2026-01-01_00-00-00-")
    runs = {command("train", *FAST, "trainer.max_epochs=1").run for _ in range(3)}
    assert len(runs) == 3
