"""Kills one of several processes at a random moment, and compares the end of the run with that of an undisturbed one.

    python scripts/soak_processes.py [--kills 20] [--seed 0] [--processes 2 3] [--distributed ddp fsdp]

Each run is started by `torchrun --max-restarts`, with `resume=auto`. A random process is killed by SIGKILL a random
time after a random step; torchrun starts all processes again, and they go on from the last checkpoint. Parameters,
optimizer, balancer, random states, figures and logs at the end are compared bit by bit.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mtl.training import checkpoint

SETTINGS = (
    *("task=mnist_two_head", "model.trunk.dropout=0.2", "optimizer=adamw", "balancer=moco", "data.batch_size=500"),
    *("data.eval_batch_size=200", "log.every=2", "trainer.max_epochs=2", "checkpoint.every_steps=3", "resume=auto"),
)
STEPS = 16
PARTS = """
import os
import signal
from threading import Timer

import mtl


class Kill:
    def __init__(self, rank, at, after):
        self.rank, self.at, self.after = rank, at, after

    def __call__(self, trainer, result):
        if mtl.distributed.rank() == self.rank and trainer.global_step == self.at and not os.path.exists("begun"):
            open("begun", "w").close()
            Timer(self.after, self.kill).start()

    def kill(self):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def main() -> None:
    """Compares killed runs with undisturbed ones, and prints how many ended with the same bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--distributed", nargs="+", default=["ddp", "fsdp"])
    options = parser.parse_args()
    draw = random.Random(options.seed)
    cases = [(count, how) for how in options.distributed for count in options.processes]
    calm: dict[tuple[int, str], Any] = {}
    same = 0
    for number in range(options.kills):
        count, how = case = cases[number % len(cases)]
        calm[case] = calm.get(case) or ended(*case)
        kill = {"rank": draw.randrange(count), "at": draw.randint(1, STEPS), "after": draw.uniform(0, 0.4)}
        about = f"kill {number + 1}: {count} processes, {how}, " + ", ".join(f"{k} {v:.3g}" for k, v in kill.items())
        try:
            problem = first_difference(ended(*case, kill), calm[case])
        except RuntimeError as error:
            problem = str(error)
        same += not problem
        print(about, problem or "same bits", sep=": ", flush=True)
    print(f"{same} of {options.kills} killed runs ended with the same bits")
    sys.exit(same != options.kills)


def ended(count: int, how: str, kill: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trains, and returns what the run has left behind.

    Raises:
        RuntimeError: If the run failed, or if it ended before the process could be killed.
    """
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--max-restarts=3"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "mtl.train"]
    values = "" if kill is None else "".join(f", {key}: {value}" for key, value in kill.items())
    callback = [f"callbacks={{kill: {{_target_: parts.Kill{values}}}}}"] if kill else []
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "parts.py").write_text(PARTS)
        done = subprocess.run(
            [sys.executable, *torchrun, *SETTINGS, f"distributed={how}", *callback],
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        if kill and not Path(folder, "killed").exists():
            raise RuntimeError("ended before it could be killed")
        (run,) = Path(folder).glob("outputs/*/*")
        state, best = (checkpoint.load(run / f"checkpoints/{name}.pt") for name in ("last", "best"))
        metrics = json.loads((run / "metrics.json").read_text())
        lines = (run / "metrics.csv").read_text().splitlines()
    compared = ("model", "step", "random", "data", "readings", "global_step", "best", "figures")
    return {
        **{key: state[key] for key in compared},
        "best.pt": best["model"],
        "metrics.json": {key: metrics[key] for key in ("status", "steps", "epochs", "val", "test")},
        "metrics.csv": [line for line in lines if "speed/" not in line],
    }


def first_difference(ours: Any, theirs: Any, where: str = "") -> str:
    """Returns where two nested values differ first; an empty string if they are the same bit by bit."""
    if type(ours) is not type(theirs):
        return f"{where} is {ours!r}, not {theirs!r}"
    if isinstance(theirs, torch.Tensor):
        return "" if torch.equal(ours, theirs) else f"{where} differs"
    if isinstance(theirs, dict):
        if list(ours) != list(theirs):
            return f"{where} has other keys"
        lines = (first_difference(ours[key], theirs[key], f"{where}.{key}") for key in theirs)
        return next(filter(None, lines), "")
    if isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return f"{where} has {len(ours)} entries, not {len(theirs)}"
        lines = (first_difference(a, b, f"{where}[{n}]") for n, (a, b) in enumerate(zip(ours, theirs, strict=True)))
        return next(filter(None, lines), "")
    return "" if repr(ours) == repr(theirs) else f"{where} is {ours!r}, not {theirs!r}"


if __name__ == "__main__":
    main()
