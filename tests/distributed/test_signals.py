"""Signals that reach several processes, or torchrun, while the processes are at different places of a step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_resume import assert_same as assert_identical
from test_torchrun import PROBLEM, only_run, run, state

WAITING = """
import os
import time
import mtl


class Waits:
    def __call__(self, trainer, result):
        rank = mtl.distributed.rank()
        if trainer.global_step == 1:
            with open(f"new-{rank}", "w") as file:
                file.write(str(os.getpid()))
            os.rename(f"new-{rank}", f"pid-{rank}")
        if trainer.global_step == 5 and rank == 1:  # the others wait for this process
            open("waits", "w").close()
            while not os.path.exists("sent"):
                time.sleep(0.05)
            time.sleep(1)
"""
SETTINGS = (*PROBLEM, "model.trunk.dropout=0.2", "output_root=out")


def send(number: int, receivers: str, agent: int, folder: Path) -> None:
    """Sends a signal to torchrun, to all processes that it started, or, as a terminal does, to all of these."""
    workers = [int(path.read_text()) for path in sorted(folder.glob("pid-*"))]
    assert len(workers) == 2
    for process in {"torchrun": [agent], "workers": workers, "all": [*workers, agent]}[receivers]:
        os.kill(process, number)


def stopped(folder: Path, number: int, receivers: str, how: str) -> tuple[int, str, str]:
    """Trains in two processes that get a signal, and returns the exit code and what torchrun printed."""
    (folder / "parts.py").write_text(WAITING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=localhost:0", "-m", "mtl.train"]
    waiting = "callbacks={a: {_target_: parts.Waits}}"
    command = [sys.executable, *launcher, *SETTINGS, waiting, f"distributed={how}"]
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        agent = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err, start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while not (folder / "waits").exists():
                assert agent.poll() is None, (folder / "err.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            send(number, receivers, agent.pid, folder)
            (folder / "sent").touch()
            code = agent.wait(120)
        finally:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    return code, (folder / "out.txt").read_text(), (folder / "err.txt").read_text()


@pytest.mark.parametrize(
    ("number", "receivers", "how"),
    [
        (signal.SIGTERM, "torchrun", "ddp"),
        (signal.SIGINT, "torchrun", "ddp"),
        (signal.SIGTERM, "workers", "ddp"),
        (signal.SIGINT, "all", "ddp"),
        (signal.SIGTERM, "all", "fsdp"),
        (signal.SIGINT, "torchrun", "fsdp"),
    ],
    ids=str,
)
def test_all_processes_stop_after_the_same_step(tmp_path: Path, number: int, receivers: str, how: str) -> None:
    code, out, err = stopped(tmp_path, number, receivers, how)
    assert code != 0
    assert state(only_run(tmp_path, "out"))["global_step"] == 5, err
    assert out.count("Stopped at step 5, in epoch 1. Saved: ") == 1, out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_what_was_stopped_ends_as_if_it_had_not_been(tmp_path: Path, number: int, how: str) -> None:
    settings = (*SETTINGS, f"distributed={how}")
    calm = run(tmp_path, 2, *settings, "output_root=calm")
    assert calm.returncode == 0, calm.stderr
    stopped(tmp_path, number, "torchrun", how)
    done = run(tmp_path, 2, *settings, "resume=auto")
    assert done.returncode == 0, done.stderr
    assert "resume   from step 5" in done.stdout
    ours, theirs = (state(only_run(tmp_path, root)) for root in ("out", "calm"))
    for part in ("model", "step"):
        assert_identical(ours[part], theirs[part])
