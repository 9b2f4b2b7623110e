"""Descriptions of a graph, against what is known by construction and what training measures."""

from typing import Any

import pytest
import torch
from conftest import Trunk, batches, problem
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtl
from mtl.gradients.leaves import leaves
from mtl.graphs import Walk, backward
from mtl.step.forward import loss_from


def walked(
    model: mtl.MultiTaskModel, tasks: list[mtl.Task], batch: Any, **options: Any
) -> tuple[Walk, dict[str, tuple[str, ...]]]:
    walk = Walk(model, [task.name for task in tasks], batch)
    with walk.recording():
        result = backward(mtl.Step(model, tasks, passes="joint", **options), batch, walk, measure=True)
    return walk, result.reach


def small(trunk: nn.Module, heads: dict[str, nn.Module], width: int = 4) -> tuple[Any, Any, Any]:
    tasks = [mtl.Task(name, head=head, loss=nn.MSELoss(), target="y") for name, head in heads.items()]
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(6, 3, generator=generator), "y": torch.randn(6, width, generator=generator)}
    return mtl.MultiTaskModel(trunk, tasks, inputs=["x"]), tasks, batch


class SeveralFeatures(nn.Module):
    """A trunk with layers that one task uses, that another task uses, and that no task uses."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.idle = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        low = torch.tanh(self.low(x))
        return {"low": low, "high": torch.tanh(self.high(low))}


class Takes(nn.Linear):
    def __init__(self, name: str) -> None:
        super().__init__(4, 4)
        self.name = name

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().forward(features[self.name])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.rest, self.first(x), use_reentrant=False)


def tied() -> tuple[Any, Any, Any]:
    model, tasks, batch = small(nn.Linear(3, 4), {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.heads["b"].weight = model.heads["a"].weight
    return model, tasks, batch


def separate() -> tuple[Any, Any, Any]:
    _, tasks, batch = small(nn.Linear(3, 4), {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    return mtl.architectures.SeparateModels(lambda: nn.Linear(3, 4), tasks, inputs=["x"]), tasks, batch


MODELS = {
    "all that keeps state": lambda: (*problem(3), batches(1)[0]),
    "several features": lambda: small(SeveralFeatures(), {"a": Takes("low"), "b": Takes("high")}),
    "checkpointed": lambda: small(Checkpointed(), {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}),
    "tied heads": tied,
    "separate": separate,
}


@pytest.mark.parametrize("name", MODELS)
def test_reach_is_what_training_measures_and_what_each_loss_leads_to(name: str) -> None:
    model, tasks, batch = MODELS[name]()
    walk, reach = walked(model, tasks, batch)
    assert {leaf.name: tuple(leaf.tasks) for leaf in walk.leaves.values()} == reach
    assert {leaf.name for leaf in walk.leaves.values() if leaf.shared} == {n for n, t in reach.items() if len(t) > 1}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for task in tasks:
        loss = loss_from(model, task, batch, model.features(batch))
        assert {names[leaf] for leaf in leaves([loss])} == {n for n, found in reach.items() if task.name in found}
    assert [(leaf.name, leaf.shape) for leaf in walk.leaves.values()] == [
        (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()
    ]


def test_parameters_nobody_reaches() -> None:
    walk, _ = walked(*MODELS["several features"]())
    assert walk.unreached() == ["trunk.idle.weight", "trunk.idle.bias"]
    assert walk.leaves["trunk.low.weight"].tasks == ["a", "b"]
    assert walk.leaves["trunk.high.weight"].tasks == ["b"]
    assert not walk.modules["trunk.idle"].called


def test_tied_parameters_have_one_leaf() -> None:
    walk, _ = walked(*tied())
    assert walk.leaves["heads.a.weight"].also == ["heads.b.weight"]
    assert walk.leaves["heads.a.weight"].shared
    assert "heads.b.weight" not in walk.leaves
    users = [n for n, operation in walk.operations.items() if "heads.a.weight" in operation.inputs]
    assert {walk.operations[n].name for n in users} == {"TBackward0"}
    assert len(users) == 2


def test_operations_of_one_graph_by_who_gets_there() -> None:
    model, tasks, batch = small(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    walk, _ = walked(model, tasks, batch)
    found = sorted((operation.name, tuple(operation.tasks)) for operation in walk.operations.values())
    ends = [(name, (task,)) for task in "ab" for name in ("AddmmBackward0", "TBackward0", "MseLossBackward0")]
    assert found == sorted([(name, ("a", "b")) for name in ("TanhBackward0", "AddmmBackward0", "TBackward0")] + ends)
    (tanh,) = [n for n, operation in walk.operations.items() if operation.name == "TanhBackward0"]
    assert [walk.operations[n].name for n in walk.operations[tanh].inputs] == ["AddmmBackward0"]
    assert [operation.ends for operation in walk.operations.values() if operation.ends] == [["a"], ["b"]]


def test_micro_batches_are_one_graph() -> None:
    model, tasks = problem(2)
    whole, _ = walked(model, tasks, batches(1, 2)[0])
    parts, _ = walked(model, tasks, batches(1, 2)[0], num_micro_batches=4)
    assert [o.name for o in whole.operations.values()] == [o.name for o in parts.operations.values()]
    assert whole.leaves == parts.leaves


def test_frozen_prefix_is_not_walked_and_a_frozen_layer_above_a_trained_one_is() -> None:
    trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
    model, tasks, batch = small(trunk, {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.freeze(["trunk.0", "trunk.4", "heads.a.bias"])
    walk, reach = walked(model, tasks, batch)
    frozen = {
        name: ([leaf.name for leaf in inside], visit.called, visit.walked)
        for name, (inside, visit) in walk.frozen().items()
    }
    assert frozen == {
        "trunk.0": (["trunk.0.weight", "trunk.0.bias"], True, False),
        "trunk.4": (["trunk.4.weight", "trunk.4.bias"], True, True),
        "heads.a.bias": (["heads.a.bias"], True, True),
    }
    assert {leaf.name: tuple(leaf.tasks) for leaf in walk.leaves.values()} == reach
    # The third layer keeps its input, whoever made it, and the frozen fifth only the weights.
    assert walk.saved_nothing() == ["trunk.0", "trunk.1", "trunk.4"]
    assert [walk.modules[f"trunk.{number}"].saved for number in range(6)] == [0, 0, 4 * 6 * 5, 4 * 6 * 5, 0, 4 * 6 * 4]


def test_wholly_frozen_trunk_and_a_task_without_a_graph() -> None:
    model, tasks = problem(2)
    model.freeze(["trunk", "heads.t0"])
    walk, _ = walked(model, tasks, batches(1, 2)[0])
    assert list(walk.frozen()) == ["trunk", "heads.t0"]
    assert not any(visit.walked for _, visit in walk.frozen().values())
    assert walk.without_graph == ["t0"]
    assert walk.seen == ["t0", "t1"]


def test_checkpointed_modules_keep_nothing_and_are_walked() -> None:
    walk, _ = walked(*MODELS["checkpointed"]())
    assert walk.modules["trunk.rest"].walked
    assert walk.modules["trunk.rest"].called
    assert walk.modules["trunk.rest"].saved == 0
    assert walk.saved_nothing() == ["trunk.first", "trunk.rest"]


def test_what_is_saved_twice_is_counted_once() -> None:
    """A product with itself keeps (6, 4) float32 numbers twice, in one piece of memory."""

    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    walk, _ = walked(*small(nn.Sequential(nn.Linear(3, 4), Square()), {"a": nn.Linear(4, 4)}))
    assert walk.modules["trunk.1"].saved == 6 * 4 * 4


def test_absent_tasks() -> None:
    model, tasks = problem(2)
    for task in tasks:
        task.missing = True
    (batch,) = batches(1, 2)
    batch["y1"][:] = -100
    walk, _ = walked(model, tasks, batch)
    assert walk.seen == ["t0"]
    assert walk.leaves["trunk.conv.weight"].tasks == ["t0"]
    assert walk.unreached() == ["heads.t1.1.weight", "heads.t1.1.bias"]


def test_leaves_that_are_no_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.register_buffer("scale", torch.ones(4, requires_grad=True))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.detach().requires_grad_()) * self.scale + torch.zeros(2, 1, 1, requires_grad=True)[0]

    walk, _ = walked(*small(Odd(), {"a": nn.Linear(4, 4)}))
    others = {leaf.name: (leaf.kind, leaf.shape, leaf.tasks) for leaf in walk.leaves.values()}
    assert others["x"] == ("input", (6, 3), ["a"])
    assert others["trunk.scale"] == ("buffer", (4,), ["a"])
    assert others["leaf 1"] == ("other", (2, 1, 1), ["a"])


def test_objectives_and_batches_of_their_own() -> None:
    def slope(model: mtl.MultiTaskModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model.trunk(x).sum(), x, create_graph=True)
        return gradient.square().mean()

    model, tasks, batch = small(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), {"a": nn.Linear(4, 4)})
    tasks.append(mtl.Task("slope", objective=slope))
    model = mtl.MultiTaskModel(model.trunk, tasks, inputs=["x"])
    walk, reach = walked(model, tasks, {"a": batch, "slope": {"x": torch.randn(5, 3)}})
    found = {leaf.name: leaf.tasks for leaf in walk.leaves.values()}
    assert found["trunk.0.weight"] == ["a", "slope"] == list(reach["trunk.0.weight"])
    assert walk.leaves["slope.x"].kind == "input"
    assert found["slope.x"] == ["slope"]
    # Each task's graph is one of its own, though they end at the same leaves.
    assert all(len(operation.tasks) == 1 for operation in walk.operations.values())


def test_hidden_parameters_are_an_error() -> None:
    class Hides(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)

    with pytest.raises(mtl.UserError, match="re-entrant activation checkpointing hides"):
        walked(*small(Hides(3, 4), {"a": nn.Linear(4, 4)}))


def test_nothing_is_left_in_the_model() -> None:
    model, tasks = problem(2)
    walked(model, tasks, batches(1, 2)[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if not isinstance(m, Trunk))
    assert all(parameter.grad is None for parameter in model.parameters())
