"""Processes that differ in parameters or settings, or of which only some measure, are errors in all of them."""

import os
from typing import Any

import pytest
import torch
from processes import processes
from test_refused import batch, model_of
from torch import nn

import mtl
from mtl.distributed.sharding import local
from mtl.training.saved import check_parameters


def parts_of_replicas() -> list[str]:
    """Changes one process's part of sharded parameters that another process has as well; returns the messages."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.manual_seed(0)
    messages = []
    for rank in (None, 3):
        model, tasks = model_of(nn.Linear(3, 4))
        mtl.distributed.prepare(model, "hsdp")
        if mtl.distributed.rank() == rank:
            local(model.trunk.weight.detach()).add_(1.0)
        for check in (mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1)), None):
            try:
                check(batch()) if check else check_parameters(model, 1)
                messages.append("nothing")
            except mtl.UserError as error:
                messages.append(str(error))
    return messages


def test_replicas_of_sharded_parameters_are_compared() -> None:
    for first, second, *others in processes(4)(parts_of_replicas):
        assert [first, second] == ["nothing", "nothing"]
        for message in others:  # in the first step, and before a save
            assert message.startswith("the parameters in the processes of rank 1 and 3 have different values")


DIFFERENT: dict[str, Any] = {  # what differs in the process of rank 1
    "gradients": {"gradients": mtl.Gradients(every=2)},
    "clip_norm": {"update": mtl.Update(clip_norm=1.0)},
    "passes": {"passes": "joint"},
    "precision": {"precision": "bf16"},
    "num_micro_batches": {"num_micro_batches": 2},
    "on_nonfinite": {"on_nonfinite": "skip_step"},
    "balancer": {"balancer": mtl.balancers.CAGrad(c=0.1)},
    "task 'b'": {"weight": 2.0},
    "optimizer": {"lr": 0.2},
    "number of steps taken": {"taken": 3},
    "state of the balancer": {"state": True},
}


def with_other_settings(name: str) -> str:
    torch.manual_seed(0)
    model, tasks = model_of(nn.Linear(3, 4))
    other = DIFFERENT[name] if mtl.distributed.rank() == 1 else {}
    own = {key: value for key, value in other.items() if key not in ("weight", "lr", "taken", "state")}
    tasks[1].weight = other.get("weight", 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=other.get("lr", 0.1))
    balancer = mtl.balancers.GradVac() if name == "state of the balancer" else mtl.balancers.CAGrad()
    step = mtl.Step(model, tasks, optimizer, **{"balancer": balancer, **own})
    step.descent.num_taken = other.get("taken", 0)
    if "state" in other:
        balancer.generator.manual_seed(5)
    try:
        step(batch())
    except mtl.UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_settings_in_one_process_are_refused(name: str) -> None:
    for message in processes(3)(with_other_settings, name):
        assert message.startswith(f"{name}: the processes of rank 0 and 1 have different settings")
        if name == "optimizer":  # from the value on in which they differ
            assert "settings, ...lr=0.1, momentum=0" in message
            assert " and ...lr=0.2, momentum=0" in message


def measured_in_one(how: str, balancer: str, lonely: int) -> list[str]:
    """Measures in one process only; each process returns its message, and trains on with all of them."""
    torch.manual_seed(0)
    model, tasks = model_of(nn.Linear(3, 4))
    mtl.distributed.prepare(model, how)
    made = getattr(mtl.balancers, balancer)()
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=made)
    answers = []
    for measure in (True, mtl.distributed.rank() == lonely, False, True):
        data = batch() if how == "fsdp" or mtl.distributed.rank() != 1 else {}
        try:
            answers.append(str(len(step(data, measure=measure).grad_norms or {})))
        except mtl.UserError as error:
            answers.append(str(error))
    return answers


@pytest.mark.parametrize("lonely", [0, 1])
@pytest.mark.parametrize("balancer", ["Equal", "UW", "UPGrad"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_measuring_in_one_process_is_refused_in_all(how: str, balancer: str, lonely: int) -> None:
    for first, message, *others in processes(2)(measured_in_one, how, balancer, lonely):
        assert (first, others) == ("2", ["0", "2"])
        assert message.startswith("step: measure is True in 1 of 2 processes")


def continued(how: str) -> list[str]:
    """Trains with an optimizer whose state is sharded with the parameters, continues with a new step, and once more."""
    torch.manual_seed(0)
    model, tasks = model_of(nn.Linear(3, 4))
    mtl.distributed.prepare(model, how)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    answers = []
    for shift in (0, 0, mtl.distributed.rank()):
        schedule.T_max += shift
        step = mtl.Step(model, tasks, optimizer, update=mtl.Update(scheduler=schedule))
        try:
            step(batch())
            answers.append("trained")
        except mtl.UserError as error:
            answers.append(str(error))
    return answers


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_new_step_continues_with_the_optimizer_and_scheduler_of_another(how: str) -> None:
    for first, second, third in processes(2)(continued, how):
        assert (first, second) == ("trained", "trained")
        assert third.startswith("scheduler: the processes of rank 0 and 1 have different settings")
        assert "tensor" not in third.casefold()  # the optimizer's state isn't a setting
