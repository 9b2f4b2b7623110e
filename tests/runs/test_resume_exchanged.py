"""Runs that are resumed with another class: allowed only if the saved state fits it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, batches, command, problem, stopping
from test_resume import assert_same
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import mtl
from mtl import balancers
from mtl.runs import exchanged
from mtl.runs.resume import Refused, check, reset_options
from mtl.step import Step, Update
from mtl.training import checkpoint

FAST = ["task=mnist_two_head", "trainer.max_epochs=2", "data.batch_size=1000", "scheduler=none", "logger=[]"]
HEAD = "tasks.digit.head._target_"


class Moved(torch.optim.AdamW):
    """The same class with another name."""


class Newer(torch.optim.AdamW):
    """A class with the same options and another state."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["velocity"] = torch.zeros_like(parameter)


class Fails(torch.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        raise ValueError("not yet")


class Cosine(CosineAnnealingLR):
    pass


class MoCo(balancers.MoCo):
    pass


def made(optimizer: type = torch.optim.AdamW, scheduler: type | None = None, balancer: type = balancers.MoCo) -> Step:
    model, tasks = problem(2)
    first = optimizer(model.parameters(), lr=0.1, weight_decay=0.5) if optimizer is not Step else None
    made = scheduler(first, 10) if scheduler else None
    return Step(model, tasks, first, update=Update(scheduler=made), balancer=balancer())


def config_of(step: Step) -> dict[str, Any]:
    parts = {"optimizer": step.descent.first, "scheduler": step.descent.scheduler, "balancer": step.balancing.balancer}
    return {
        k: None if v is None else {"_target_": f"{type(v).__module__}.{type(v).__name__}"} for k, v in parts.items()
    }


def saved(step: Step) -> dict[str, Any]:
    """Returns the state after two steps."""
    for batch in batches(2, 2):
        step(batch)
    state = {"model": step.model.state_dict(), "step": step.state_dict(), "composed": config_of(step)}
    return copy.deepcopy(state)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({}, {"optimizer": Moved}),
        ({"optimizer": Moved}, {"optimizer": torch.optim.AdamW}),
        ({"optimizer": torch.optim.SGD}, {"optimizer": torch.optim.SGD}),
        ({"scheduler": CosineAnnealingLR}, {"scheduler": Cosine}),
        ({}, {"balancer": MoCo}),
        ({"balancer": balancers.Equal}, {"balancer": balancers.UPGrad}),  # neither keeps anything
    ],
)
def test_a_state_that_fits_is_taken_and_nothing_is_moved_by_looking(before: dict, after: dict) -> None:
    old, new = made(**before), made(**after)
    state = saved(old)
    moved = [parameter.detach().clone() for parameter in new.model.parameters()]
    exchanged.check(new, state, config_of(new))
    assert all(torch.equal(a, b) for a, b in zip(moved, new.model.parameters(), strict=True))
    assert not new.descent.first.state
    assert all(parameter.grad is None for parameter in new.model.parameters())
    new.model.load_state_dict(state["model"])
    new.load_state_dict(state["step"])
    if "balancer" not in before:
        torch.manual_seed(1)
        old(batches(3, 2)[2])
        torch.manual_seed(1)
        new(batches(3, 2)[2])
        assert_same(new.model.state_dict(), old.model.state_dict(), "model")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"optimizer": torch.optim.SGD}, "optimizer: torch.optim.sgd.SGD can't continue from the state of torch.optim.adamw.AdamW: group 0 has other options: amsgrad, betas"),
        ({"optimizer": torch.optim.SGD}, {}, "group 0 has other options: amsgrad, betas"),
        ({}, {"optimizer": Newer}, "'state.0.step' was saved, and isn't part of the current state"),
        ({}, {"optimizer": Fails}, "Fails can't continue from the state of torch.optim.adamw.AdamW: a step fails: ValueError: not yet"),
        ({"scheduler": CosineAnnealingLR}, {"scheduler": StepLR}, "scheduler: torch.optim.lr_scheduler.StepLR can't continue from the state of torch.optim.lr_scheduler.CosineAnnealingLR: 'T_max' was saved, and"),
        ({}, {"scheduler": StepLR}, "scheduler: torch.optim.lr_scheduler.StepLR can't continue from the state of None: nothing was saved"),
        ({"balancer": MoCo}, {"balancer": balancers.FAMO}, "balancer: mtl.balancers.famo.FAMO can't continue from the state of test_resume_exchanged.MoCo: '"),
        ({"balancer": balancers.UW}, {"balancer": balancers.FAMO}, "mtl.balancers.uw.UW: learned has another meaning in the saved state"),
        ({"balancer": balancers.UW}, {"balancer": balancers.UPGrad}, "was saved, and isn't part of the current state"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(before: dict, after: dict, message: str) -> None:
    new = made(**after)
    with pytest.raises(mtl.UserError) as error:
        exchanged.check(new, saved(made(**before)), config_of(new))
    assert message in str(error.value)


def test_the_options_of_another_class_are_its_own() -> None:
    """Adam keeps what AdamW does; it decays weights in its own way."""
    for scheduler, kept in ((None, []), (CosineAnnealingLR, ["lr", "betas"])):
        old, new = made(scheduler=scheduler), made(torch.optim.Adam, scheduler)
        state, fresh = saved(old), [dict(group) for group in new.descent.param_groups()]
        exchanged.check(new, state, config_of(new))
        names = exchanged.options(new, state, config_of(new))
        assert not {f"optimizer.{name}" for name in kept} & set(names)
        new.load_state_dict(state["step"])
        assert new.descent.param_groups()[0]["decoupled_weight_decay"] is True
        reset_options(new.descent.param_groups(), fresh, names)
        assert new.descent.param_groups()[0]["decoupled_weight_decay"] is False
        assert new.descent.param_groups()[0]["lr"] == state["step"]["optimizer"]["param_groups"][0]["lr"]
        assert exchanged.options(old, state, config_of(old)) == []


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5))
        self.weight = nn.Parameter(torch.zeros(5, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            lambda: nn.Linear(16, 6),
            r"'heads\.t0\.1\.weight' was saved with shape \(5, 16\), and has shape \(6, 16\) now",
        ),
        (lambda: nn.Linear(16, 5, bias=False), r"'heads\.t0\.1\.bias' was saved, and isn't part of the current state"),
        (
            lambda: nn.Sequential(nn.Linear(16, 5)),
            r"'heads\.t0\.1\.weight' was saved, and isn't part of the current state",
        ),
        (
            lambda: nn.Bilinear(16, 16, 5),
            r"'heads\.t0\.1\.weight' was saved with shape \(5, 16\), and has shape \(5, 16, 16\) now",
        ),
        (Turned, "the model's parameters have another order than in the saved state"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(head: Callable[[], nn.Module], message: str) -> None:
    new = made()
    state = saved(made())
    new.model.heads["t0"][1] = head()
    with pytest.raises(mtl.UserError, match=message):
        exchanged.check(new, state, config_of(new))


THERE = {
    "vars": {},
    "tasks": {"a": {"head": {"_target_": "old.Head", "width": 3}}},
    "balancer": {"_target_": "mtl.balancers.UW"},
}
HERE = {
    "vars": {},
    "tasks": {"a": {"head": {"_target_": "new.Head", "width": 3}}},
    "balancer": {"_target_": "mtl.balancers.UW"},
}


@pytest.mark.parametrize("allowed", [[], ["tasks"], ["tasks.a.head"], ["tasks.a"], ["tasks.a.head.width"]])
def test_a_class_is_allowed_by_its_very_key_alone(allowed: list[str]) -> None:
    with pytest.raises(Refused) as error:
        check(THERE, HERE | {"resume_allow": allowed}, "run")
    assert "tasks.a.head._target_: was 'old.Head', is 'new.Head'" in str(error.value)
    assert "or allow it: 'resume_allow=[tasks.a.head._target_]'" in str(error.value)
    check(THERE, HERE | {"resume_allow": ["tasks.a.head._target_"]}, "run")


def test_keys_with_other_characters_are_quoted_where_they_are_proposed() -> None:
    groups = [{"optimizer": {"groups": {"trunk, [0]": {"lr": lr}}}, "vars": {}} for lr in (1, 2)]
    with pytest.raises(Refused, match=r"'resume_allow=\[\"optimizer.groups.trunk, \[0\].lr\"\]'"):
        check(groups[0], groups[1], "run")


@pytest.mark.parametrize("key", ["optimizer.then._target_", "balancer.optimizer"])
def test_what_no_state_fits_is_never_allowed(key: str) -> None:
    first, *rest = key.split(".")
    there, here = ({first: {rest[0]: {rest[1]: x}} if len(rest) > 1 else {rest[0]: x}, "vars": {}} for x in ("a", "b"))
    with pytest.raises(Refused) as error:
        check(there, here | {"resume_allow": [key]}, "run")
    assert "or allow it" not in str(error.value)


@pytest.fixture
def began(here: Path) -> Ended:
    """Provides a stopped run, whose head was then moved into another module."""
    stop = stopping(3)
    for name in ("old_heads", "new_heads"):
        (here / f"code/{name}.py").write_text("import torch\nclass Head(torch.nn.Linear): pass\n")
    ended = command("train", *stop, *FAST, f"{HEAD}=old_heads.Head")
    assert ended.code == 143, ended.err
    return ended


def test_a_run_whose_class_was_moved_goes_on_to_the_same_end(began: Ended) -> None:
    there = ["--config-dir", "code", *FAST]
    resume = [f"{HEAD}=new_heads.Head", f"resume={began.run}"]
    (began.run.parents[2] / "code/old_heads.py").unlink()
    refused = command("train", *there, *resume)
    assert refused.code == 1
    assert f"or allow it: 'resume_allow=[{HEAD}]'" in refused.err
    narrow = command(
        "train", *there, *resume, "resume_allow=[tasks.digit.head._target_,optimizer._target_]", "optimizer=sgd"
    )
    assert narrow.code == 1  # momentum isn't allowed to change
    ended = command("train", *there, *resume, f"resume_allow=[{HEAD}]")
    assert ended.code == 0, ended.err
    assert "resume   from step 3, epoch 1" in ended.out
    (began.run.parents[2] / "code/old_heads.py").write_text("import torch\nclass Head(torch.nn.Linear): pass\n")
    whole = command("train", *there, f"{HEAD}=old_heads.Head")
    states = [checkpoint.load(run / "checkpoints/last.pt") for run in (began.run, whole.run)]
    for key in ("model", "step", "random"):
        assert_same(states[0][key], states[1][key], key)


def test_a_class_that_does_not_take_the_state_leaves_the_run_as_it_is(began: Ended) -> None:
    (began.run.parents[2] / "code/new_heads.py").write_text(
        "import torch\nclass Head(torch.nn.Sequential):\n"
        "    def __init__(self, in_features, out_features): super().__init__(torch.nn.Linear(in_features, out_features))\n"
    )
    before = {path: path.read_bytes() for path in began.run.rglob("*") if path.is_file() and path.suffix != ".log"}
    options = [f"{HEAD}=new_heads.Head", f"resume={began.run}", f"resume_allow=[{HEAD}]"]
    ended = command("train", "--config-dir", "code", *FAST, *options)
    assert ended.code == 1
    assert "resume: the saved state doesn't fit this model: only in the checkpoint: heads.digit.weight" in ended.err
    assert before == {path: path.read_bytes() for path in before}
