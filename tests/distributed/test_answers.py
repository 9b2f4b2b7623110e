"""All processes that continue tell the same: which process hangs, fails or was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SILENT = "the process of rank {} does not answer"
KILLED = "the process of rank {} ended at step 3 without a message; it may have been killed"
BUSY = "the process of rank {} does not answer at step 3; it is at hanging.py, line {}"
LINES = Path(__file__).with_name("hanging.py").read_text().splitlines()
SLEEP = 1 + next(number for number, line in enumerate(LINES) if "time.sleep" in line)
FAIL = 1 + next(number for number, line in enumerate(LINES) if "raise ValueError" in line)
RAISE = 1 + next(number for number, line in enumerate(LINES) if "raise TimeoutError" in line)
EXPECTED = {
    "1:stop": SILENT.format(1) + " at step 3",
    "0:stop": SILENT.format(0) + " at step 3",
    "2:sleep": BUSY.format(2, SLEEP),
    "0:sleep": BUSY.format(0, SLEEP),
    "1:kill": KILLED.format(1),
    "0:kill": KILLED.format(0),
    "0:start": "the process of rank 0 has not started to train",
    "1:receive": "the processes wait for each other at step 3. Do callbacks, losses or metrics call torch.distributed in "
    "some of the processes only?",
    "1:raise": f"rank 1: TimeoutError: Timed out: the cat sat on it (hanging.py, line {RAISE})",
    "1:interrupt": f"rank 1: ValueError: the cat sat on it (hanging.py, line {FAIL})",
}


@pytest.fixture(scope="module")
def messages() -> dict[str, dict[int, tuple[str, str]]]:
    """By scenario and rank, the kind of the error and its message."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, str(Path(__file__).with_name("hanging.py")), *EXPECTED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[int, tuple[str, str]]] = {name: {} for name in EXPECTED}
    for line in done.stdout.splitlines():
        name, rank, kind, message = json.loads(line)
        found[name][rank] = kind, message
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_all_processes_tell_the_same(messages: dict[str, dict[int, tuple[str, str]]], name: str) -> None:
    told, gone = messages[name], int(name[0])
    others = {rank: message for rank, (_, message) in told.items() if rank != gone}
    assert others == {rank: EXPECTED[name] for rank in range(3) if rank != gone}
    if name in ("1:raise", "1:interrupt"):
        assert told[1][0] == "Lost"  # it has learnt in time that rank 0 reports its error
    if gone:
        assert told[0][0] == "Lost"  # rank 0 reports it
    else:
        assert sorted(kind for rank, (kind, _) in told.items() if rank) == ["Lost", "UserError"]  # one reports it
