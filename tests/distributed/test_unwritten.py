"""Runs of several processes one of which can't write: the kernel refuses it, or the folder is gone."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_torchrun import PROBLEM, only_run, run

from mtl.training import checkpoint

pytest.importorskip("resource")  # there are no such limits on Windows

FAULTS = """
import os
import resource
import shutil
import mtl

class Fault:
    def __init__(self, what, rank, at):
        self.what, self.rank, self.at = what, rank, at

    def __call__(self, trainer, result):
        step, rank = trainer.global_step, mtl.distributed.rank()
        with open(f"last-{rank}", "w") as file:
            file.write(str(step))
        if step in (self.at, 7):
            trainer.writer.wait()
            mtl.distributed.collectives.any_process([False])  # all have written
        if (step, rank) == (self.at, self.rank) and self.what == "delete":
            shutil.rmtree(trainer.checkpoints.folder.parent)
        elif (step, rank) == (self.at, self.rank):  # no file may get longer, as checkpoints do
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

class FullLog:
    '''From the second step on, metrics.csv is /dev/full.'''
    def __init__(self, path="metrics.csv"):
        self.path = path

    def __call__(self, trainer, result):
        if mtl.distributed.rank() == 0 and trainer.global_step == 2:
            for name in os.listdir("/proc/self/fd"):
                if os.path.realpath(f"/proc/self/fd/{name}").endswith(self.path):
                    os.dup2(os.open("/dev/full", os.O_WRONLY), int(name))
"""


def train(folder: Path, fault: str, rank: int, *more: str) -> Any:
    """Trains in two processes, which save after steps 3, 6, and so on, with a fault in one of them after step 4."""
    (folder / "faults.py").write_text(FAULTS)
    faulty = f"{{_target_: faults.Fault, what: {fault}, rank: {rank}, at: 4}}"
    callbacks = f"callbacks={{a: {faulty}, b: {{_target_: faults.FullLog}}}}"
    settings = ("output_root=out", "checkpoint.every_steps=3", "trainer.max_epochs=6", "log.pictures=null")
    return run(folder, 2, *PROBLEM, *settings, callbacks, *more)


def last_steps(folder: Path) -> list[int]:
    """Returns the last steps of both processes."""
    return [int((folder / f"last-{rank}").read_text()) for rank in range(2)]


def errors(done: Any) -> list[str]:
    """Returns the lines about errors that mtl prints."""
    assert done.stderr.count("Traceback") == (1 if done.returncode else 0), done.stderr  # torchrun's own
    return [line for line in (done.stdout + done.stderr).splitlines() if re.match(r"error\b", line)]


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_process_that_cannot_write_its_part_of_a_checkpoint_ends_all(tmp_path: Path, how: str) -> None:
    """After the step in which it is known that the checkpoint of step 6 can't be written.

    Before, the log can't be written, which is reported and ends nothing.
    """
    rank = 0 if how == "ddp" else 1
    done = train(tmp_path, "limit", rank, f"distributed={how}")
    assert done.returncode == 1
    folder = only_run(tmp_path, "out")
    log, closed, ended = errors(done)
    assert log == (
        "error    CsvLogger can't write: [Errno 28] No space left on device. Training goes on; it will try again"
    )
    assert closed.endswith("No space left on device; some values are lost")
    place = ", in the process of rank 1" if rank else ""
    assert ended == (
        f"error: the checkpoint {folder / 'checkpoints/last.pt'} could not be written: [Errno 27] File too large{place}; "
        "earlier ones are unchanged"
    )
    assert "saved    step 3; once the problem is solved, resume with " in done.stdout
    assert last_steps(tmp_path) == [7, 7]  # the next checkpoint would be that of step 8
    assert checkpoint.load(folder / "checkpoints/last.pt")["global_step"] == 3
    about = json.loads((folder / "metrics.json").read_text())
    assert (about["status"], f"error: {about['error']}") == ("failed", ended)


@pytest.mark.slow
def test_a_process_that_writes_nothing_needs_no_room(tmp_path: Path) -> None:
    """So the limit is what ended the others; and a log that can't be written loses its last values."""
    done = train(tmp_path, "limit", 1, "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path, "out")
    assert len(errors(done)) == 2, done.stdout + done.stderr
    assert checkpoint.load(folder / "checkpoints/last.pt")["global_step"] == 16
    with (folder / "metrics.csv").open() as file:
        assert {row["step"] for row in csv.DictReader(file)} == {"1", "2"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_folder_that_another_process_deletes_ends_all(tmp_path: Path, how: str) -> None:
    done = train(tmp_path, "delete", 1, f"distributed={how}")
    assert done.returncode == 1
    (ended,) = [line for line in errors(done) if "CsvLogger" not in line]
    assert re.fullmatch(
        r"error: \S+/out/\S+ no longer exists: it was deleted or moved while the run trained, .*", ended
    )
    assert last_steps(tmp_path) == [6, 6]
    assert not list(tmp_path.glob("out/*/*"))
