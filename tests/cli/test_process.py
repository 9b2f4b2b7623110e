"""Behaviour that only a separate process shows: signals, exit codes, no warnings on the screen."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_readme import HANGS, environment

import mtl


def test_ctrl_c_ends_with_what_was_saved_and_how_to_look_at_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtl.train", "task=mnist_two_head", "trainer.max_epochs=1000000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("outputs/*/*/checkpoints/best.pt")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130, err
    assert err == ""
    (run,) = tmp_path.glob("outputs/mnist_two_head/*")
    assert "Stopped at step" in out
    assert "checkpoints/last.pt" in out
    assert (
        f"resume    python -m mtl.train task=mnist_two_head trainer.max_epochs=1000000 resume=outputs/mnist_two_head/{run.name}"
        in out
    )
    assert f"tensorboard --logdir outputs/mnist_two_head/{run.name}" in out
    evaluated = subprocess.run(
        [sys.executable, "-m", "mtl.evaluate", f"run={run}", "checkpoint=last"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert mtl.load(run, checkpoint="last")


def test_a_run_warns_of_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-m",
        "mtl.train",
        "task=mnist_two_head",
        "trainer.max_epochs=1",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_screen_on_a_full_disk_ends_no_training(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtl.train", "task=mnist_two_head", "trainer.max_epochs=1"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: some output could not be printed: [Errno 28] No space left on device\n"
    (run,) = tmp_path.glob("outputs/mnist_two_head/*")
    assert '"status": "finished"' in (run / "metrics.json").read_text()
    assert "best.pt is from epoch 1 of 1" in (run / "train.log").read_text()


def test_a_slip_is_answered_without_torch(tmp_path: Path) -> None:
    """Imports are watched rather than seconds."""
    for slip in ("passes=both", "trainer.max_epoch=1", "task=nope", "--help"):
        code = (
            "import runpy, sys\n"
            f"sys.argv = ['mtl.train', *{['task=mnist_two_head'] if slip != 'task=nope' else []}, {slip!r}]\n"
            "try:\n    runpy.run_module('mtl.train', run_name='__main__')\n"
            "except SystemExit as ended:\n    print('code', ended.code, 'torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert done.stdout.strip().endswith(f"code {0 if slip == '--help' else 1} False"), done.stdout + done.stderr
