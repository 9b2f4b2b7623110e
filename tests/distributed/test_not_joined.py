"""Processes that were started together and don't train together are errors."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import command
from processes import processes
from test_refused import batch, model_of
from torch import nn

import mtl
from mtl.cli.processes import check_same_arguments


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
