"""Clipping of the gradient over the shared parameters, with every balancer, kind of passes and precision."""

import copy

import pytest
import torch
from conftest import batches, command, problem
from test_balancing import NAMES, made
from test_over_all import small
from torch import Tensor, nn

import mtl
from mtl.choices import PASSES

LR = 0.5


def moved(step: mtl.Step, batch: object) -> dict[str, Tensor]:
    """Returns the gradient of each parameter that the optimizer, plain SGD, got."""
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step(batch)
    return {name: (before[name] - p.detach()) / LR for name, p in step.model.named_parameters()}


def norm(gradients: list[Tensor]) -> float:
    return float(torch.cat([g.flatten().double() for g in gradients]).norm())


def by_hand(gradients: dict[str, Tensor], shared: float | None, whole: float | None) -> dict[str, Tensor]:
    """Returns the clipped gradients: those of the trunk first, then all."""
    found = dict(gradients)
    for limit, prefix in ((shared, "trunk."), (whole, "")):
        if limit is not None:
            names = [name for name in found if name.startswith(prefix)]
            factor = min(1.0, limit / (norm([found[name] for name in names]) + 1e-6))
            found |= {name: found[name] * factor for name in names}
    return found


def stepping(shared: float | None, whole: float | None, name: str = "equal", **options) -> mtl.Step:
    model, tasks = problem(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    balancer = made(name)
    return mtl.Step(
        model,
        tasks,
        optimizer,
        balancer=balancer,
        update=mtl.Update(clip_norm=whole, clip_shared_norm=shared),
        **options,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", list(PASSES))
def test_the_trunk_is_clipped_and_heads_are_not(name: str, kind: str) -> None:
    found = []
    for shared in (None, 0.01):
        torch.manual_seed(5)
        found.append(moved(stepping(shared, None, name, passes=kind), batches(1)[0]))
    assert norm([g for n, g in found[0].items() if n.startswith("trunk.")]) > 0.02
    for n, gradient in by_hand(found[0], 0.01, None).items():
        torch.testing.assert_close(found[1][n], gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("shared", [0.1, 100.0])
@pytest.mark.parametrize("cut", [{}, {"micro_batch_size": 3}])
def test_before_all_of_it_is_clipped(kind: str, shared: float, cut: dict) -> None:
    found = []
    for limits in ((None, None), (shared, 0.3)):
        model, tasks, batch = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        step = mtl.Step(
            model,
            tasks,
            optimizer,
            passes=kind,
            update=mtl.Update(clip_shared_norm=limits[0], clip_norm=limits[1]),
            **cut,
        )
        found.append(moved(step, batch))
    for n, gradient in by_hand(found[0], shared, 0.3).items():
        torch.testing.assert_close(found[1][n], gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", list(PASSES))
def test_the_norm_that_is_told_is_that_before_clipping(kind: str) -> None:
    (batch,) = batches(1)
    found = []
    for shared, whole in ((None, None), (0.01, None), (0.01, 0.02)):
        torch.manual_seed(5)
        found.append(stepping(shared, whole, passes=kind)(batch, measure=True).total_norm.item())
    assert found == pytest.approx([found[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("name", ["equal", "famo", "upgrad", "moco"])
def test_in_half_precision(kind: str, name: str) -> None:
    """The limit is on the gradient, not on the scaled one."""
    model, tasks, batch = small(torch.float32)
    if name == "moco":
        tasks = tasks[:2]  # whose heads have no sparse gradients, which is nothing to it: it has shared rows alone
    step = mtl.Step(
        model, tasks, torch.optim.SGD(model.parameters(), lr=LR), balancer=made(name), passes=kind, precision="fp16",
        update=mtl.Update(clip_shared_norm=0.01),
    )  # fmt: skip
    found = moved(step, batch)
    assert norm([g for n, g in found.items() if n.startswith("trunk.")]) == pytest.approx(0.01, rel=1e-3)
    assert norm([found["heads.t0.weight"]]) > 0.05


def sharing(sparse: bool) -> mtl.Step:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.EmbeddingBag(10, 16, mode="sum", sparse=sparse), nn.Tanh())
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(16, 3), loss=nn.CrossEntropyLoss(), target=f"y{i}") for i in range(2)]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    return mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=LR), update=mtl.Update(clip_shared_norm=0.01))


def test_sparse_gradients() -> None:
    batch = {"x": torch.tensor([[1, 2], [2, 2]]), "y0": torch.tensor([0, 1]), "y1": torch.tensor([2, 1])}
    found = [moved(sharing(sparse), batch) for sparse in (True, False)]
    assert norm([found[0]["trunk.0.weight"]]) == pytest.approx(0.01, rel=1e-3)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


def test_what_one_task_alone_reaches_is_no_shared_parameter() -> None:
    """A trunk whose second output one task uses, and a frozen layer."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.own, self.frozen = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(6, 6)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            common = torch.tanh(self.first(self.frozen(x)))
            return common, self.own(common)

    class Of(nn.Module):
        def __init__(self, which: int) -> None:
            super().__init__()
            self.which, self.linear = which, nn.Linear(8, 3)

        def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
            return self.linear(features[self.which])

    for kind in PASSES:
        found = []
        for shared in (None, 0.01):
            torch.manual_seed(0)
            tasks = [mtl.Task(f"t{i}", head=Of(i), loss=nn.MSELoss(), target=f"y{i}") for i in range(2)]
            model = mtl.MultiTaskModel(Trunk(), tasks, inputs=["x"]).double()
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            step = mtl.Step(model, tasks, optimizer, passes=kind, update=mtl.Update(clip_shared_norm=shared))
            found.append(moved(step, small()[2]))
        names = [name for name in found[0] if name.startswith("trunk.first")]
        factor = 0.01 / (norm([found[0][name] for name in names]) + 1e-6)
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient * (factor if name in names else 1.0))


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("kind", list(PASSES))
def test_the_trunk_is_shared_in_a_step_of_one_task_too(kind: str, reload: bool) -> None:
    """What several tasks have reached stays shared, also over a checkpoint."""
    model, tasks, batch = small()
    for task in tasks:
        task.missing = True
    alone = {**batch, "y1": batch["y1"] * torch.nan, "y2": batch["y2"] * torch.nan}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    step = mtl.Step(model, tasks, optimizer, passes=kind, update=mtl.Update(clip_shared_norm=0.01))
    assert norm([g for n, g in moved(step, alone).items() if n.startswith("trunk.")]) > 0.02  # nothing is known yet
    step(batch)
    if reload:
        state = copy.deepcopy(step.state_dict())
        step = mtl.Step(model, tasks, optimizer, passes=kind, update=mtl.Update(clip_shared_norm=0.01))
        step.load_state_dict(state)
    found = moved(step, alone)
    assert norm([g for n, g in found.items() if n.startswith("trunk.")]) == pytest.approx(0.01, rel=1e-3)
    assert norm([found["heads.t0.weight"]]) > 0.02


def test_a_step_that_was_not_taken_does_not_count() -> None:
    model, tasks, batch = small()
    tasks[1].loss = lambda prediction, target: prediction.sum() * torch.nan
    tasks[2].loss = lambda prediction, target: prediction.sum() * torch.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    step = mtl.Step(model, tasks, optimizer, update=mtl.Update(clip_shared_norm=0.01), on_nonfinite="skip_task")
    step(batch)
    assert step.state_dict()["reach"]["trunk.0.weight"] == ["t0"]


def test_what_is_refused() -> None:
    model, tasks, _ = small()
    with pytest.raises(
        mtl.UserError, match=r"trainer.clip_shared_norm: LBFGS uses the unclipped gradient .* leave it at null"
    ):
        mtl.Step(model, tasks, torch.optim.LBFGS(model.parameters()), update=mtl.Update(clip_shared_norm=1.0))
    for name in ("clip_norm", "clip_shared_norm"):
        with pytest.raises(mtl.UserError, match=rf"trainer.{name} is 0; it must be above 0"):
            mtl.Update(**{name: 0})


def test_from_the_config(here) -> None:
    refused = command("train", "task=mnist_two_head", "trainer.clip_shared_norm=-1")
    assert refused.code == 1
    assert "trainer.clip_shared_norm is -1; it must be a finite number above 0, or null" in refused.err
    ends = []
    for limit in ("null", "0.001"):
        ended = command(
            "train", "task=mnist_two_head", "optimizer=sgd", f"trainer.clip_shared_norm={limit}",
            "trainer.max_epochs=1", "data.batch_size=512",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        state = torch.load(ended.run / "checkpoints/last.pt", weights_only=True)
        ends.append(state["model"])
        assert ("reach" in state["step"]) == (limit != "null")
    trunk = [(ends[0][n] - v).norm().item() for n, v in ends[1].items() if n.startswith("trunk.")]
    assert max(trunk) > 0.01


def test_one_task_has_no_shared_parameters(here) -> None:
    ended = command(
        "train", "task=mnist_two_head", "only=digit", "trainer.clip_shared_norm=1", "trainer.max_epochs=1",
        "data.batch_size=512",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "trainer.clip_shared_norm has no effect with one task" in ended.out + ended.err
