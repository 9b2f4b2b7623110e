"""Trunk and heads, freezing, patterns."""

import pytest
import torch
from conftest import batches, problem
from torch import nn

import mtl
from mtl.model import match


def test_forward_gives_every_tasks_prediction() -> None:
    model, _ = problem(2)
    model.eval()
    (batch,) = batches(1, 2)
    predictions = model({"x": batch["x"]})
    assert list(predictions) == ["t0", "t1"]
    assert torch.equal(predictions["t1"], model.heads["t1"](model.trunk(batch["x"])))


def test_several_inputs_reach_the_trunk_in_order() -> None:
    trunk = nn.Bilinear(2, 3, 4)
    task = mtl.Task("a", head=nn.Identity(), loss=nn.MSELoss(), target="y")
    model = mtl.MultiTaskModel(trunk, [task], inputs=["left", "right"])
    left, right = torch.randn(5, 2), torch.randn(5, 3)
    assert torch.equal(model({"right": right, "left": left})["a"], trunk(left, right))


def test_losses_that_are_modules_belong_to_the_model() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    model = mtl.MultiTaskModel(
        nn.Linear(2, 2), [mtl.Task("a", head=nn.Identity(), loss=loss, target="y")], inputs=["x"]
    )
    assert model.double().losses["a"].weight.dtype == torch.float64
    assert "losses.a.weight" in model.state_dict()


def test_patterns() -> None:
    model, _ = problem(1)
    assert match(model, ["trunk.conv"], "here") == ["trunk.conv.weight", "trunk.conv.bias"]
    assert match(model, ["trunk.conv.*"], "here") == ["trunk.conv.weight", "trunk.conv.bias"]
    assert match(model, ["*.bias", "trunk.norm"], "here") == [
        "trunk.conv.bias",
        "trunk.norm.weight",
        "trunk.norm.bias",
        "trunk.linear.bias",
        "heads.t0.1.bias",
    ]
    with pytest.raises(
        mtl.UserError, match=r"here: no parameter matches 'conv'; the parameters are: trunk\.conv\.weight, "
    ):
        match(model, ["trunk", "conv"], "here")


def test_patterns_see_every_name_of_a_tied_parameter() -> None:
    trunk = nn.Linear(3, 3, bias=False)
    head = nn.Linear(3, 3, bias=False)
    head.weight = trunk.weight
    model = mtl.MultiTaskModel(trunk, [mtl.Task("a", head=head, loss=nn.MSELoss(), target="y")], inputs=["x"])
    assert model.freeze(["heads.a"]) == ["trunk.weight"]


def test_frozen_modules_stay_in_eval_mode() -> None:
    model, _ = problem(1)
    assert model.freeze(["trunk.norm", "trunk.conv.weight"]) == [
        "trunk.conv.weight",
        "trunk.norm.weight",
        "trunk.norm.bias",
    ]
    model.train()
    assert not model.trunk.norm.training
    assert model.trunk.conv.training  # its bias is trained
    assert model.trunk.training
    model.eval()
    model.freeze(["trunk"])
    model.train()
    assert not model.trunk.training
    assert not model.trunk.dropout.training
    assert model.heads["t0"].training


@pytest.mark.parametrize("name", ["", "a.b", "a b", "1st", "keys", "training", "pop"])
def test_names_that_cannot_name_a_task(name: str) -> None:
    with pytest.raises(mtl.UserError, match=f"task name '{name}'"):
        mtl.Task(name, head=nn.Identity(), loss=nn.MSELoss(), target="y")


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_that_no_task_can_have(weight: float) -> None:
    with pytest.raises(mtl.UserError, match=f"task 'a': weight is {weight}; it must be a finite number of at least 0"):
        mtl.Task("a", head=nn.Identity(), loss=nn.MSELoss(), target="y", weight=weight)


def test_what_a_model_refuses() -> None:
    task = mtl.Task("a", head=nn.Linear(3, 1), loss=nn.MSELoss(), target="y")
    with pytest.raises(mtl.UserError, match="at least one task"):
        mtl.MultiTaskModel(nn.Identity(), [], inputs=["x"])
    with pytest.raises(mtl.UserError, match="two tasks have the same name"):
        mtl.MultiTaskModel(nn.Identity(), [task, task], inputs=["x"])
    with pytest.raises(mtl.UserError, match=r"model\.inputs: give a list"):
        mtl.MultiTaskModel(nn.Identity(), [task], inputs="x")
    model = mtl.MultiTaskModel(nn.Identity(), [task], inputs=["x"])
    with pytest.raises(
        mtl.UserError,
        match=r"task 'a': its head can't take the trunk's features, of shape \(2, 4\): RuntimeError: .*mat1 and mat2",
    ):
        model({"x": torch.randn(2, 4)})
