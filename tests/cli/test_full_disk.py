"""A whole run on a disk that is really full, which needs the permission to mount one."""

import csv
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Ended, command
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from mtl.training import checkpoint

BALLAST = """
class Removed:
    def __init__(self, path, step): self.path, self.step = path, step
    def __call__(self, trainer, result):
        if trainer.global_step == self.step: __import__("os").unlink(self.path)

class Filled:
    def __init__(self, folder, step): self.folder, self.step = folder, step
    def __call__(self, trainer, result):
        if trainer.global_step == self.step:
            trainer.writer.wait()
            try:
                with open(self.folder + "/ballast", "wb", buffering=0) as file:
                    while True: file.write(b"x" * 4096)
            except OSError: pass
"""
RUN = ["task=mnist_two_head", "data.batch_size=1000", "log.every=1", "log.pictures=null", "trainer.max_epochs=3"]


@pytest.fixture
def small(here: Path) -> Iterator[Path]:
    """Provides a separate disk of 3 MB."""
    folder = here / "outputs"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.name != "posix" or mount is None:
        pytest.skip("nothing can be mounted here")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        (here / "mine").mkdir()
        (here / "mine/ballast.py").write_text(BALLAST)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Provides the errors with which threads ended."""
    ended: list[object] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    return ended


def filled(step: int, *more: str) -> Ended:
    """Runs four steps per epoch, with a disk that is full from a given step on."""
    fill = ["+callbacks.fill._target_=ballast.Filled", "+callbacks.fill.folder=outputs", f"+callbacks.fill.step={step}"]
    return command("train", "--config-dir", "mine", *RUN, *fill, *more)


def is_clean(ended: Ended, folder: Path, threads: list[object]) -> None:
    for text in (ended.err, ended.out):
        assert "Traceback" not in text
        assert "Logging error" not in text
    assert not threads
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    assert len(ended.err.splitlines()) <= 4, ended.err


@pytest.mark.parametrize("step", [2, 6])
def test_full_until_the_end(small: Path, threads: list[object], step: int) -> None:
    """The figures are shown, what was saved before stays, and the run says that it failed."""
    ended = filled(step)
    is_clean(ended, small, threads)
    assert ended.code == 1
    assert "best.pt is from epoch 3 of 3" in ended.out  # measured by parameters that are in memory alone
    assert "Written to" not in ended.out
    assert ended.out.count("could not be written: [Errno 28] No space left on device. Training goes on") == 1
    assert "error: best.pt and last.pt could not be written to " in ended.err
    assert ended.metrics["status"] == "failed"
    assert ended.metrics["test"]["digit"]["accuracy"] > 0
    assert "[Errno 28] No space left on device" in ended.metrics["error"]
    there = {path.name for path in (ended.run / "checkpoints").glob("*.pt")}
    assert there == ({"best.pt", "last.pt"} if step == 6 else set())
    if step == 6:
        assert checkpoint.load(ended.run / "checkpoints/last.pt")["global_step"] == 4
        (small / "ballast").unlink()
        again = command("train", *RUN, "resume=auto")
        assert again.code == 0, again.err
        assert json.loads((ended.run / "metrics.json").read_text())["status"] == "finished"


def test_room_that_comes_back(small: Path, threads: list[object]) -> None:
    """Then nothing is missing: no checkpoint, no figure, no line of the log."""
    room = [
        "+callbacks.room._target_=ballast.Removed",
        "+callbacks.room.path=outputs/ballast",
        "+callbacks.room.step=10",
    ]
    ended = filled(6, *room)
    is_clean(ended, small, threads)
    assert ended.code == 0, ended.err
    assert ended.metrics["status"] == "finished"
    assert checkpoint.load(ended.run / "checkpoints/last.pt")["global_step"] == 12
    assert checkpoint.load(ended.run / "checkpoints/last-1.pt")["global_step"] == 4
    with (ended.run / "metrics.csv").open() as file:
        rows = [(int(row["step"]), row["tag"], float(row["value"])) for row in csv.DictReader(file)]
    assert [step for step, tag, _ in rows if tag == "loss/digit/train"] == list(range(1, 13))
    (events,) = ended.run.glob("events.out.tfevents.*")
    logged = [(e.step, v.tag, v.tensor.float_val) for e in EventFileLoader(str(events)).Load() for v in e.summary.value]
    there = [(step, values[0]) for step, tag, values in logged if tag == "loss/digit/train"]
    assert [step for step, _ in there] == list(range(1, 13))
    assert [value for _, value in there] == pytest.approx([v for _, tag, v in rows if tag == "loss/digit/train"])
    log = (ended.run / "train.log").read_text()
    assert log.count("could not be written: [Errno 28] No space left on device") == 1
    assert "best.pt is from epoch" in log


def test_mlflow_on_the_same_disk(small: Path, threads: list[object]) -> None:
    pytest.importorskip("mlflow", reason="the package mlflow isn't there")
    ended = filled(6, "logger=[csv,mlflow]")
    is_clean(ended, small, threads)
    assert ended.code == 1
    assert "error    MLflowLogger can't write: " in ended.out
    assert "error: best.pt and last.pt could not be written to " in ended.err


def test_a_stop_on_a_full_disk(small: Path, threads: list[object]) -> None:
    (Path("mine/stops.py")).write_text(
        "import os, signal\n"
        "class At:\n"
        "    def __call__(self, trainer, result):\n"
        "        if trainer.global_step == 9: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    ended = filled(6, "+callbacks.stop._target_=stops.At")
    is_clean(ended, small, threads)
    assert ended.code == 143
    assert ended.metrics["status"] == "stopped"
    assert "Stopped at step 9, in epoch 3. Saved: " in ended.out
    assert "(of step 4)" in ended.out
