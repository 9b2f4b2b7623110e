"""The time between a backward pass and the next step: order, clipping, precision, schedule, groups."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import batches, problem
from torch import nn

import mtl
from mtl.choices import PASSES, PRECISIONS


def test_step_is_the_loop_written_by_hand() -> None:
    """Five AdamW steps of the classic loop, on a trunk without anything random, to the last bit."""
    ends = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
        tasks = [mtl.Task(f"t{i}", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target=f"y{i}") for i in range(3)]
        model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = mtl.Step(model, tasks, optimizer, passes="sequential")
        for batch in batches(5, dtype=torch.float32):
            if by_hand:
                optimizer.zero_grad()
                for task in tasks:
                    task.loss(task.head(trunk(batch["x"])), batch[task.target]).backward()
                optimizer.step()
            else:
                step(batch)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Seen(mtl.balancers.MGDA):
    """Records the calls."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def weights(self, losses: torch.Tensor, gramian: torch.Tensor | None) -> torch.Tensor:
        self.calls.append("balance")
        return super().weights(losses, gramian)


def spied(monkeypatch: pytest.MonkeyPatch, precision: str) -> list[str]:
    calls: list[str] = []
    model, tasks = problem(2, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = mtl.Step(
        model,
        tasks,
        optimizer,
        update=mtl.Update(scheduler=scheduler, clip_norm=0.1),
        precision=precision,
        passes="sequential",
        balancer=Seen(calls),
    )

    def spy(owner: object, name: str, label: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(label), original(*a, **k))[1])

    spy(torch.autograd, "backward", "backward")
    spy(optimizer, "step", "optimizer")
    spy(scheduler, "step", "scheduler")
    monkeypatch.setattr("mtl.step.descent.clip", lambda *a, **k: calls.append("clip"))
    if step.scaler:
        spy(step.scaler, "unscale_", "unscale")
        spy(step.scaler, "update", "update")
    step(batches(1, 2, dtype=torch.float32)[0])
    return calls


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # that is the spy
def test_order_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spied(monkeypatch, "fp32") == ["backward", "backward", "balance", "clip", "optimizer", "scheduler"]
    half = ["backward", "backward", "balance", "unscale", "clip", "optimizer", "update", "scheduler"]
    assert spied(monkeypatch, "fp16") == half


@pytest.mark.parametrize("kind", list(PASSES))
def test_clipping_by_global_norm_once(kind: str) -> None:
    model, tasks = problem()
    before = [p.detach().clone() for p in model.parameters()]
    step = mtl.Step(
        model, tasks, torch.optim.SGD(model.parameters(), lr=1.0), passes=kind, update=mtl.Update(clip_norm=0.01)
    )
    result = step(batches(1)[0])
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm()
    torch.testing.assert_close(moved, torch.tensor(0.01, dtype=torch.float64), rtol=1e-4, atol=0)
    assert result.total_norm > 0.1  # before clipping


def test_gradients_left_by_others_are_cleared_and_absent_ones_stay_none() -> None:
    model, tasks = problem(2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    step = mtl.Step(model, tasks[:1])
    step.backward(batches(1, 2)[0])
    assert max(p.grad.abs().max() for p in model.trunk.parameters()) < 1e3
    assert all(p.grad is None for p in model.heads["t1"].parameters())


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_gives_nearly_the_gradient_of_fp32(precision: str, kind: str) -> None:
    gradients, norms = {}, {}
    for p in ("fp32", precision):
        model, tasks = problem(dtype=torch.float32, dropout=0.0)
        step = mtl.Step(
            model,
            tasks,
            torch.optim.SGD(model.parameters(), lr=0.0),
            passes=kind,
            precision=p,
            update=mtl.Update(clip_norm=1e9),
        )
        torch.manual_seed(2)
        result = step(batches(1, size=64, dtype=torch.float32)[0], measure=True)
        gradients[p] = torch.cat([q.grad.flatten() for q in model.parameters()])
        norms[p] = torch.stack(list(result.grad_norms.values()))
        torch.testing.assert_close(result.total_norm.double(), gradients[p].double().norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(norms[precision], norms["fp32"], rtol=0.05, atol=0)
    assert nn.functional.cosine_similarity(gradients["fp32"], gradients[precision], dim=0) > 0.99
    assert not torch.equal(gradients["fp32"], gradients[precision])  # autocast was really on


def test_fp16_norms_are_those_of_unscaled_gradients() -> None:
    norms = {}
    for precision in ("fp32", "fp16"):
        model, tasks = problem(2, dtype=torch.float32, dropout=0.0)
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), precision=precision)
        torch.manual_seed(2)
        result = step(batches(1, 2, size=64, dtype=torch.float32)[0], measure=True)
        norms[precision] = torch.stack([result.grad_norms["t0"], result.total_norm.double()])
    torch.testing.assert_close(norms["fp16"], norms["fp32"], rtol=0.02, atol=0)


def test_half_precision_losses_have_room_for_the_scale() -> None:
    model, tasks = problem(dtype=torch.float32, weights=[0.5, 0.01])
    for task in tasks:
        task.loss = lambda prediction, target: prediction.half().square().mean()
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), precision="fp16")
    result = step(batches(1, 2, dtype=torch.float32)[0], measure=True)
    assert result.taken
    assert result.grad_norms["t0"].isfinite()


def test_fp16_with_nothing_to_train() -> None:
    model, tasks = problem(2, dtype=torch.float32)
    model.freeze(["*"])
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), precision="fp16")
    assert step(batches(1, 2, dtype=torch.float32)[0]).losses["t0"].isfinite()


def test_results_do_not_share_their_weights() -> None:
    model, tasks = problem(2)
    step = mtl.Step(model, tasks)
    first, second = (step.backward(batch) for batch in batches(2, 2))
    first.weights.clear()
    assert list(second.weights) == list(step.backward(batches(1, 2)[0]).weights) == ["t0", "t1"]


def test_step_that_overflows_moves_nothing() -> None:
    model, tasks = problem(2, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = mtl.Step(model, tasks, optimizer, update=mtl.Update(scheduler=scheduler), precision="fp16")
    good, bad = batches(2, 2, dtype=torch.float32)
    assert step(good).taken
    bad["x"][0] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    rate, scale = scheduler.get_last_lr(), step.scaler.get_scale()
    assert not step(bad).taken
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scheduler.get_last_lr() == rate
    assert step.scaler.get_scale() < scale
    assert optimizer.state[next(iter(model.parameters()))]["step"] == 1


@pytest.mark.parametrize(
    "kind",
    [
        lambda p, **how: torch.optim.AdamW(p, lr=0.1, **how),
        lambda p, **how: torch.optim.Adam(p, lr=0.1, **how),
        lambda p, **how: torch.optim.Adagrad(p, lr=0.1, **how),
        lambda p, **how: torch.optim.SGD(p, lr=0.1, momentum=0.9, **how),
    ],
)
def test_a_fused_optimizer_skips_what_overflows_as_any_other(kind) -> None:
    """GradScaler calls a fused step all the same, and its kernel moves nothing: no counter may see that."""
    data = batches(8, 2, dtype=torch.float32)
    for index in (0, 1, 4, 6):
        data[index]["x"][0] = float("inf")
    ends = []
    for how in ({"fused": True}, {}):
        model, tasks = problem(2, dtype=torch.float32, dropout=0.0)
        optimizer = kind(model.parameters(), **how)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step = mtl.Step(model, tasks, optimizer, update=mtl.Update(scheduler=scheduler), precision="fp16")
        torch.manual_seed(0)
        taken = [step(batch).taken for batch in data]
        assert taken == [False, False, True, True, False, True, False, True]
        assert step.num_taken == 4
        assert scheduler.get_last_lr() == [0.1 * 0.5**4]
        assert not how or optimizer._step_supports_amp_scaling  # for whoever has another scaler
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_state_round_trips_bit_for_bit() -> None:
    """20 steps are 10, saved into fresh objects, and 10 more."""

    def fresh() -> tuple[mtl.MultiTaskModel, mtl.Step]:
        model, tasks = problem(dtype=torch.float32, dropout=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return model, mtl.Step(model, tasks, optimizer, update=mtl.Update(scheduler=scheduler), precision="fp16")

    data = batches(20, dtype=torch.float32)
    model, step = fresh()
    for index, batch in enumerate(data):
        if index == 10:
            saved = deepcopy((model.state_dict(), step.state_dict(), torch.get_rng_state()))
        step(batch)
    again, resumed = fresh()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    for batch in data[10:]:
        resumed(batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_a_step_refuses() -> None:
    model, tasks = problem(2)
    with pytest.raises(mtl.UserError, match="'fp8' is not one of " + ", ".join(PRECISIONS)):
        mtl.Step(model, tasks, precision="fp8")
    with pytest.raises(mtl.UserError, match="at least one task"):
        mtl.Step(model, [])
    other = mtl.Task("t9", head=nn.Identity(), loss=nn.MSELoss(), target="y")
    with pytest.raises(mtl.UserError, match="the model has no task 't9'; it has: t0, t1"):
        mtl.Step(model, [other])
    with pytest.raises(mtl.UserError, match=r"the trunk can't take its inputs x, of shape \(8, 2\)"):
        mtl.Step(model, tasks).backward({"x": torch.zeros(8, 2), "y0": None, "y1": None})
    (batch,) = batches(1, 2)
    with pytest.raises(mtl.UserError, match=r"task 't1': target 'y1' not in batch; the dataset gives: x, y0"):
        mtl.Step(model, tasks).backward({k: v for k, v in batch.items() if k != "y1"})
    with pytest.raises(mtl.UserError, match=r"model\.inputs: 'x' not in batch; the dataset gives: y0, y1"):
        mtl.Step(model, tasks).backward({k: v for k, v in batch.items() if k != "x"})
    tasks[0].loss = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(mtl.UserError, match=r"task 't0': its loss must be a 0-dim tensor.*of shape \(8,\)"):
        mtl.Step(model, tasks).backward(batch)
    tasks[0].loss = nn.CrossEntropyLoss()
    with pytest.raises(
        mtl.UserError,
        match=r"task 't0': its loss failed on a prediction of shape \(8, 5\) and the target 'y0' of shape \(3,\)",
    ):
        mtl.Step(model, tasks).backward({**batch, "y0": batch["y0"][:3]})


def test_what_failed_while_the_parameters_moved_is_not_undone() -> None:
    """Buffers and random state of before the step would belong to other parameters."""

    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            raise MemoryError

    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    tasks = [mtl.Task("a", head=nn.Linear(4, 1), loss=nn.MSELoss(), target="y")]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    step = mtl.Step(model, tasks, Fails(model.parameters(), lr=0.1))
    before = trunk[1].running_mean.clone()
    with pytest.raises(MemoryError):
        step({"x": torch.randn(8, 3), "y": torch.randn(8, 1)})
    moved, draws = trunk[1].running_mean.clone(), torch.get_rng_state()
    assert not torch.equal(moved, before)
    assert step.undo() is False
    assert torch.equal(trunk[1].running_mean, moved)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(parameter.grad is None for parameter in model.parameters())
