"""Processes that were started together and don't train together are errors."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import command
from processes import processes
from test_refused import batch, model_of
from torch import nn

import mtl
from mtl.cli.processes import NEEDED, check_environment, check_same_arguments


def test_a_loop_under_torchrun_without_a_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = model_of(nn.Linear(3, 4))
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))
    step(batch())
    monkeypatch.setenv("WORLD_SIZE", "2")
    step(batch())  # not started by torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    message = "torchrun started 2 processes, and there is no process group"
    with pytest.raises(mtl.UserError, match=message):
        step(batch())
    with pytest.raises(mtl.UserError, match=message):
        mtl.distributed.prepare(model)
    monkeypatch.setenv("WORLD_SIZE", "1")
    step(batch())
    mtl.distributed.prepare(model)


def started_with(*arguments: str) -> str:
    sys.orig_argv[1:] = ["-m", "mtl.train", arguments[mtl.distributed.rank()], "seed=1"]
    try:
        check_same_arguments()
    except mtl.UserError as error:
        return str(error)
    return "nothing"


def test_processes_with_different_arguments_are_refused() -> None:
    assert processes(3)(started_with, "lr=1", "lr=1", "lr=1") == ["nothing"] * 3
    for message in processes(3)(started_with, "lr=1", "lr=1", "lr=2"):
        assert message.startswith(
            "the processes of rank 0 and 2 were started with different arguments: rank 0 has lr=1, rank 2 has lr=2."
        )


@pytest.mark.parametrize("given", [["WORLD_SIZE"], ["WORLD_SIZE", "RANK"]])
def test_half_of_the_variables_of_torchrun_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    for name in given:
        monkeypatch.setenv(name, "2")
    ended = command("train", "task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=2000", "logger=[]")
    assert ended.code == 1
    assert ended.err.startswith("error: the environment has WORLD_SIZE=2, as for several processes that train together")
    monkeypatch.setenv("WORLD_SIZE", "1")
    ended = command(
        "train", "task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=2000", "logger=[]", "distributed=fsdp"
    )
    assert ended.code == 0
    assert "warning  distributed=fsdp has no effect in one process" in ended.out


SALLOC = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0"}  # and batch scripts
STEP = {**SALLOC, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        (STEP, "srun started 4 processes (SLURM_STEP_NUM_TASKS=4)"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "mpirun started 2 processes"),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, "mpirun started 3 processes (PMI_SIZE=3)"),
        (SALLOC, None),
        ({**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, None),  # the interactive step of salloc
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, None),
        ({**STEP, **dict.fromkeys(NEEDED, "1"), "WORLD_SIZE": "4"}, None),  # srun starts torchrun
        ({**STEP, **dict.fromkeys(NEEDED, "1")}, "srun started 4 processes"),  # torchrun without --nnodes, on each node
    ],
    ids=str,
)
def test_processes_that_srun_or_mpirun_started_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], launcher: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if launcher is None:
        check_environment()
        return
    with pytest.raises(mtl.UserError, match=rf"^{re.escape(launcher)}.* torchrun --nproc-per-node="):
        check_environment()


def test_a_command_that_srun_started_several_times_trains_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    ended = command("train", "task=mnist_two_head")
    assert ended.code == 1
    assert ended.err.startswith("error: srun started 4 processes")
    assert not list(here.glob("outputs/**/metrics.json"))
