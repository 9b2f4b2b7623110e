"""All kinds of passes lead from the same state to the same state; and the tensors that each keeps alive."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from conftest import Trunk, batches, problem
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtl
from mtl.choices import PASSES

KINDS = list(PASSES)


def after_steps(kind: str, count: int = 5, *, measure: bool = False, **options):
    model, tasks = problem(weights=[1.0, 0.5, 2.0], **options)
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), passes=kind)
    torch.manual_seed(5)
    for batch in batches(count):
        result = step(batch, measure=measure)
    return model.state_dict(), torch.get_rng_state(), result


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["sequential", "shared"])
def test_same_parameters_buffers_and_random_state_as_joint(kind: str, momentum: float | None) -> None:
    expected, draws, _ = after_steps("joint", momentum=momentum)
    state, kind_draws, _ = after_steps(kind, momentum=momentum)
    assert torch.equal(draws, kind_draws)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert int(state["trunk.norm.num_batches_tracked"]) == 5


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rule about random states sequential passes do end elsewhere."""
    monkeypatch.setattr("mtl.snapshots.set_states", lambda *_: None)
    expected, draws, _ = after_steps("joint")
    state, kind_draws, _ = after_steps("sequential")
    assert not torch.equal(draws, kind_draws)
    assert not torch.allclose(state["trunk.conv.weight"], expected["trunk.conv.weight"], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_changes_no_bit(kind: str) -> None:
    plain, draws, _ = after_steps(kind)
    measured, measured_draws, _ = after_steps(kind, measure=True)
    assert torch.equal(draws, measured_draws)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_weighted_sum(kind: str) -> None:
    """Against torch.autograd.grad of each task's loss, taken from a forward pass written out by hand."""
    model, tasks = problem(weights=[1.0, 0.5, 2.0])
    (batch,) = batches(1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    features = model.trunk(batch["x"])
    losses = [nn.functional.cross_entropy(model.heads[t.name](features), batch[t.target]) for t in tasks]
    named = dict(model.named_parameters())
    expected = dict.fromkeys(named, 0.0)
    for loss, weight in zip(losses, [1.0, 0.5, 2.0], strict=True):
        for name, gradient in zip(
            named, torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True), strict=True
        ):
            expected[name] = expected[name] + (0.0 if gradient is None else weight * gradient)

    model.load_state_dict(start)
    torch.manual_seed(3)
    result = mtl.Step(model, tasks, passes=kind).backward(batch)
    for task, loss in zip(tasks, losses, strict=True):
        torch.testing.assert_close(result.losses[task.name], loss.detach(), rtol=1e-13, atol=0)
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-11, atol=1e-14, msg=name)


class Alive:
    """Counts the tensors that autograd has saved for backward and that are still there.

    Every saved tensor is packed as an object of its own, which goes when autograd lets go of it.
    """

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def __init__(self) -> None:
        self.saved: weakref.WeakSet[Alive.Saved] = weakref.WeakSet()

    def pack(self, tensor: torch.Tensor) -> "Alive.Saved":
        saved = self.Saved(tensor)
        self.saved.add(saved)
        return saved

    @staticmethod
    def unpack(saved: "Alive.Saved") -> torch.Tensor:
        return saved.tensor

    def __len__(self) -> int:
        return len(self.saved)


def alive_before_each_backward(kind: str, num_tasks: int) -> tuple[list[int], int]:
    model, tasks = problem(num_tasks)
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), passes=kind)
    (batch,) = batches(1, num_tasks)
    alive, counts = Alive(), []
    backward = step.passes.backward

    def counted(losses: list[torch.Tensor], weights: list[float], **options: bool) -> None:
        counts.append(len(alive))
        backward(losses, weights, **options)

    step.passes.backward = counted  # type: ignore[method-assign]
    gc.disable()  # graphs must go by themselves, not by a garbage collection that happens to come by
    try:
        with torch.autograd.graph.saved_tensors_hooks(alive.pack, alive.unpack):
            result = step(batch)
        left = len(alive)
    finally:
        gc.enable()
    assert result.losses["t0"].grad_fn is None
    return counts, left


def test_what_is_alive_at_once() -> None:
    one, _ = alive_before_each_backward("sequential", 1)
    joint, joint_left = alive_before_each_backward("joint", 4)
    sequential, sequential_left = alive_before_each_backward("sequential", 4)
    shared, shared_left = alive_before_each_backward("shared", 4)
    assert one[0] > 5
    assert sequential == one * 4  # one task's graph, each time
    head = (joint[0] - one[0]) // 3
    assert head >= 2
    assert joint == [one[0] + 3 * head]  # the trunk's and all heads'
    assert shared == one * 4  # the trunk's graph and one head's
    assert (joint_left, sequential_left, shared_left) == (0, 0, 0)  # after the step no graph is


def test_frozen_subgraph_gets_no_gradient_and_a_frozen_prefix_no_graph() -> None:
    for kind in KINDS:
        model, tasks = problem(2)
        model.freeze(["trunk.conv", "trunk.norm.*"])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), passes=kind)
        seen: list[bool] = []
        hook = model.trunk.norm.register_forward_hook(lambda *a, seen=seen: seen.append(a[2].requires_grad))
        step(batches(1, 2)[0])
        hook.remove()
        assert seen
        assert not any(seen)  # the prefix built no graph, so it has no backward to spend time on
        assert model.trunk.conv.weight.grad is None
        assert model.trunk.linear.parametrizations.weight.original.grad is not None
        for name in before:
            if name.startswith(("trunk.conv", "trunk.norm")):
                assert torch.equal(before[name], model.state_dict()[name]), (kind, name)  # statistics included


def test_frozen_layer_above_a_trainable_one_passes_gradients_on() -> None:
    for kind in KINDS:
        model, tasks = problem(2)
        model.freeze(["trunk.linear"])
        mtl.Step(model, tasks, passes=kind).backward(batches(1, 2)[0])
        assert model.trunk.linear.parametrizations.weight.original.grad is None
        assert model.trunk.conv.weight.grad.abs().sum() > 0


def test_wholly_frozen_trunk_has_no_backward() -> None:
    for kind in KINDS:
        model, tasks = problem(2)
        model.freeze(["trunk"])
        step = mtl.Step(model, tasks, passes=kind)
        step.backward(batches(1, 2)[0])
        assert all(p.grad is None for p in model.trunk.parameters())
        assert all(p.grad is not None for p in model.heads.parameters())
    model.freeze(["*"])
    assert step.backward(batches(1, 2)[0]).losses["t0"].isfinite()  # nothing to train is no crash


@pytest.mark.parametrize("kind", KINDS)
def test_head_that_changes_the_features_in_place_is_an_error(kind: str) -> None:
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(16, 5))
    tasks = [
        mtl.Task(n, head=h, loss=nn.CrossEntropyLoss(), target=n) for n, h in (("a", head), ("b", nn.Linear(16, 5)))
    ]
    model = mtl.MultiTaskModel(Trunk(), tasks, inputs=["x"])
    batch = {"x": torch.randn(4, 1, 8, 8), "a": torch.zeros(4, dtype=torch.long), "b": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(mtl.UserError, match=r"task 'a': its head changes the features in place"):
        mtl.Step(model, tasks, passes=kind).backward(batch)
    model.freeze(["trunk"])
    with pytest.raises(mtl.UserError, match=r"task 'a': its head changes the features in place"):
        mtl.Step(model, tasks, passes=kind).backward(batch)


class Checkpointed(nn.Module):
    """A trunk with batch norm within activation checkpointing, whose backward pass runs the forward pass again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: torch.tanh(self.norm(self.linear(y))), x, use_reentrant=False)


@pytest.mark.parametrize("balancer", [mtl.balancers.Equal, mtl.balancers.MGDA])
@pytest.mark.parametrize("kind", KINDS)
def test_measuring_leaves_checkpointed_statistics_alone(kind: str, balancer: type) -> None:
    ends = []
    for measure in (False, True):
        torch.manual_seed(0)
        tasks = [mtl.Task(n, head=nn.Linear(4, 1), loss=nn.MSELoss(), target="y") for n in "ab"]
        model = mtl.MultiTaskModel(Checkpointed(), tasks, inputs=["x"])
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), passes=kind, balancer=balancer())
        for _ in range(3):
            step({"x": torch.randn(6, 3), "y": torch.randn(6, 1)}, measure=measure)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@dataclass
class Opaque:
    features: torch.Tensor


class GivesOpaque(nn.Linear):
    def forward(self, x: torch.Tensor) -> Opaque:
        return Opaque(super().forward(x))


class ReadsOpaque(nn.Linear):
    def forward(self, features: Opaque) -> torch.Tensor:
        return super().forward(features.features)


def test_features_that_cannot_be_looked_into() -> None:
    tasks = [mtl.Task(n, head=ReadsOpaque(4, 1), loss=nn.MSELoss(), target="y") for n in "ab"]
    model = mtl.MultiTaskModel(GivesOpaque(3, 4), tasks, inputs=["x"])
    batch = {"x": torch.randn(6, 3), "y": torch.randn(6, 1)}
    with pytest.raises(mtl.UserError, match="does not support features of type Opaque; .* passes=sequential"):
        mtl.Step(model, tasks).backward(batch)
    mtl.Step(model, tasks, passes="sequential").backward(batch)
    assert model.trunk.weight.grad is not None


class TwoMaps(nn.Module):
    """A trunk whose features are nested tensors, one of which takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        low = torch.tanh(self.first(x))
        return {"low": low, "high": [torch.tanh(self.second(low)), x]}


class Reads(nn.Module):
    def __init__(self, low: bool) -> None:
        super().__init__()
        self.low, self.linear = low, nn.Linear(4, 1)

    def forward(self, features: dict[str, object]) -> torch.Tensor:
        return self.linear(features["low"] if self.low else features["high"][0])


def test_features_may_be_several_tensors() -> None:
    gradients = {}
    for kind in KINDS:
        torch.manual_seed(0)
        tasks = [mtl.Task(n, head=Reads(n == "a"), loss=nn.MSELoss(), target="y") for n in "ab"]
        model = mtl.MultiTaskModel(TwoMaps(), tasks, inputs=["x"]).double()
        generator = torch.Generator().manual_seed(2)
        batch = {k: torch.randn(6, n, generator=generator, dtype=torch.float64) for k, n in (("x", 3), ("y", 1))}
        result = mtl.Step(model, tasks, passes=kind).backward(batch, measure=True)
        gradients[kind] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert result.reach["trunk.first.weight"] == ("a", "b")
        assert result.reach["trunk.second.weight"] == ("b",)
    torch.testing.assert_close(gradients["shared"], gradients["joint"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients["sequential"], gradients["joint"], rtol=1e-12, atol=1e-14)


def test_separate_models_share_nothing() -> None:
    torch.manual_seed(0)
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target=f"y{i}") for i in range(2)]
    model = mtl.architectures.SeparateModels(Trunk, tasks, inputs=["x"])
    assert not torch.equal(model.trunk["t0"].conv.weight, model.trunk["t1"].conv.weight)
    step = mtl.Step(model, tasks, passes="auto")
    assert step.passes.kind == "sequential"
    result = step.backward(batches(1, 2, dtype=torch.float32)[0], measure=True)
    assert result.cosines == {}
    assert result.reach["trunk.t0.conv.weight"] == ("t0",)
    with pytest.raises(mtl.UserError, match="'shared' needs one trunk"):
        mtl.Step(model, tasks, passes="shared")


def test_unknown_kind_of_passes() -> None:
    model, tasks = problem(2)
    with pytest.raises(mtl.UserError, match="'both' is not one of joint, sequential, shared, auto"):
        mtl.Step(model, tasks, passes="both")
