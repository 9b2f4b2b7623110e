"""Jobs of several processes, which submitit starts on this machine or by a small imitation of SLURM."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from test_readme import HANGS
from test_sweep import SMALL

from mtl import cli
from mtl.cli import processes, submitted, sweep
from mtl.cli.launch import register_resolvers

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

TWO = ["hydra.launcher.tasks_per_node=2"]
EXACT = ["balancer=mgda", "optimizer=sgd", "optimizer.lr=0.05", "model.trunk.dropout=0"]
NOTING = """
import os
import mtl


def note(trainer, result):
    open(f"{trainer.writer.folder.parent.name}-{mtl.distributed.rank()}-of-{mtl.distributed.world_size()}", "w").close()
"""
SBATCH = """#!{python}
import os, re, subprocess, sys
text = open(sys.argv[1]).read()
first, last = re.search(r"--array=(\\d+)-(\\d+)", text).groups()
count = re.search(r"--ntasks-per-node=(\\d+)", text)[1]
print("Submitted batch job 77", flush=True)
for index in range(int(first), int(last) + 1):
    about = {{"SLURM_JOB_ID": str(78 + index), "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(index)}}
    about |= {{"SLURM_NTASKS": count, "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"}}
    with open(f"slurm-{{index}}.txt", "w") as log:
        subprocess.Popen(["bash", sys.argv[1]], env={{**os.environ, **about}}, stdout=log, stderr=log)
"""
SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[sys.argv.index({python!r}) :]
each = [{{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}} for rank in range(int(os.environ["SLURM_NTASKS"]))]
tasks = [subprocess.Popen(command, env={{**os.environ, **about}}) for about in each]
sys.exit(max(task.wait() for task in tasks))
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
echo "77_0|RUNNING|localhost"
echo "77_1|RUNNING|localhost"
"""


def launch(folder: Path, *arguments: str) -> Any:
    """Starts a multirun in another process, beside which a scheduler may be found."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    line = [sys.executable, "-m", "mtl.train", "-m", *SMALL, *EXACT, *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS)


def imitate_slurm(folder: Path) -> None:
    (folder / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (folder / "bin" / name).write_text(text.format(python=sys.executable) if "python" in text else text)
        (folder / "bin" / name).chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm"])
def test_jobs_of_two_processes_have_the_numbers_of_one(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "noting.py").write_text(NOTING)
    imitate_slurm(tmp_path)
    noted = "callbacks={a: {_target_: noting.note, _partial_: true}}"
    alone = launch(tmp_path, "seed=0,1", "output_root=alone")
    assert alone.returncode == 0, alone.stderr
    done = launch(tmp_path, "seed=0,1", "output_root=out", f"hydra/launcher={launcher}", *TWO, noted)
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in tmp_path.glob("out/multirun/*/*/metrics.json"))
    others = sorted(path.parent for path in tmp_path.glob("alone/multirun/*/*/metrics.json"))
    assert [run.name for run in runs] == [run.name for run in others] == ["0_seed-0", "1_seed-1"]
    folders = {run.name for run in runs[0].parent.iterdir() if run.is_dir()}
    assert folders == {"0_seed-0", "1_seed-1", ".submitit"}
    assert sorted(path.name for path in tmp_path.glob("*-of-*")) == [
        f"{job}-{rank}-of-2" for job in ("0_seed-0", "1_seed-1") for rank in (0, 1)
    ]
    for run, other in zip(runs, others, strict=True):
        ours, theirs = (torch.load(each / "checkpoints/last.pt", weights_only=True)["model"] for each in (run, other))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
        assert json.loads((run / "metrics.json").read_text())["launcher"] == launcher
        assert (run / "train.log").read_text().count("Written to") <= 1


@pytest.mark.slow
def test_the_others_leave_if_rank_0_fails_before_the_training(tmp_path: Path) -> None:
    done = launch(tmp_path, "seed=0", "hydra/launcher=submitit_local", *TWO, "only=nobody")
    assert done.returncode == 1
    jobs = [json.loads(line) for path in tmp_path.glob("**/jobs.jsonl") for line in path.read_text().splitlines()]
    assert [job["outcome"] for job in jobs] == ["began", "failed"]
    assert len(list(tmp_path.glob("**/*_result.pkl"))) == 2  # both processes have ended by themselves
    assert "nobody" in "".join(path.read_text() for path in tmp_path.glob("**/*_0_log.err"))


def test_a_job_of_two_nodes_composes_and_finds_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(cli.CONFIG_DIR, version_base=None):
        register_resolvers(sweep.Sweep([], "new"))
        overrides = ["task=mnist_two_head", "hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", *TWO]
        composed = compose("train", overrides, return_hydra_config=True)
    assert (composed.hydra.launcher.nodes, composed.hydra.launcher.tasks_per_node) == (2, 2)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", composed)
    about = {"JOB_ID": "5", "NTASKS": "4", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node[07-08]", "PROCID": "3"}
    for name, value in {**about, "LOCALID": "1", "NODEID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for name in processes.NEEDED:
        monkeypatch.setenv(name, "")  # so that the test's end restores it
        monkeypatch.delenv(name)
    assert processes.count() == 1
    submitted.join()
    assert {name: os.environ[name] for name in processes.NEEDED[:4]} == {
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node07"},
    }
    port = os.environ["MASTER_PORT"]
    assert 20000 <= int(port) < 32768
    monkeypatch.setenv("SLURM_PROCID", "0")
    submitted.join()
    assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("0", port)
    assert not processes.is_follower()


def test_the_signal_before_the_time_limit_stops_a_job_as_sigterm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(cli.CONFIG_DIR, version_base=None):
        register_resolvers(sweep.Sweep([], "new"))
        overrides = ["task=mnist_two_head", "hydra/launcher=submitit_slurm"]
        composed = compose("train", overrides, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", composed)
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1", "SUBMITIT_EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(name, value)
    got: list[int] = []
    before = {
        signal.SIGUSR2: signal.signal(signal.SIGUSR2, lambda number, _: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: got.append(number)),
    }
    try:
        submitted.join()
        signal.raise_signal(signal.SIGUSR2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert got == [signal.SIGTERM]


@pytest.mark.parametrize("name", ["joblib", "ray"])
def test_launchers_whose_jobs_are_one_process_refuse_more(here: Path, name: str) -> None:
    ended = command("train", "-m", *SMALL, "seed=0,1", f"hydra/launcher={name}", f"+{TWO[0]}")
    assert ended.code == 1
    assert f"a job of hydra/launcher={name} is one process; hydra/launcher=submitit_slurm" in ended.err
    assert not list(here.glob("outputs/**/metrics.json"))
