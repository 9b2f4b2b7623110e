"""Tasks with separate batches, tasks that are functions of model and batch, and weights that depend on the step."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from conftest import batches, most_saved, problem
from test_accumulation import Plain
from test_nonfinite import everything
from test_resume import assert_same
from torch import nn
from torch.nn import functional as F

import mtl
from mtl.choices import PASSES


def plain(num_tasks: int = 3, **weights: Any):
    torch.manual_seed(0)
    tasks = [
        mtl.Task(
            f"t{i}", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target=f"y{i}", weight=weights.get(f"t{i}", 1.0)
        )
        for i in range(num_tasks)
    ]
    return mtl.MultiTaskModel(Plain(), tasks, inputs=["x"]).double(), tasks


def rows_by_hand(model: mtl.MultiTaskModel, given: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the tasks' gradients over trunk and heads together, one row each."""
    losses, rows = [], []
    for name, batch in given.items():
        loss = F.cross_entropy(model(batch)[name], batch[f"y{name[1:]}"])
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        pairs = zip(found, model.parameters(), strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
        losses.append(loss.detach())
    return torch.stack(losses), rows


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 3}])
@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("balancer", ["Equal", "UPGrad", "GLS"])
def test_two_tasks_on_one_set_and_one_on_another(balancer: str, kind: str, how: dict[str, int]) -> None:
    model, tasks = plain()
    other, _ = plain()
    step = mtl.Step(
        model,
        tasks,
        torch.optim.SGD(model.parameters(), lr=0.1),
        balancer=getattr(mtl.balancers, balancer)(),
        passes=kind,
        **how,
    )
    trunk = sum(p.numel() for p in other.trunk.parameters())
    for first, second in zip(batches(4), batches(8, size=5)[4:], strict=True):
        given = {"t0": first, "t1": second, "t2": first}
        result = step(given)
        losses, rows = rows_by_hand(other, given)
        shared = torch.stack([row[:trunk] for row in rows])
        if balancer == "Equal":
            weights = alone = torch.ones(3, dtype=torch.float64)
        elif balancer == "GLS":  # the slope of the geometric mean
            weights = alone = losses.prod() ** (1 / 3) / 3 / losses
        else:
            weights, alone = (
                mtl.balancers.UPGrad().weights(losses, shared @ shared.T),
                torch.ones(3, dtype=torch.float64),
            )
        direction = torch.stack(
            [torch.cat([w * r[:trunk], a * r[trunk:]]) for w, a, r in zip(weights, alone, rows, strict=True)]
        ).sum(0)
        with torch.no_grad():
            start = 0
            for p in other.parameters():
                p -= 0.1 * direction[start : start + p.numel()].view_as(p)
                start += p.numel()
        for name, loss in zip(given, losses, strict=True):
            torch.testing.assert_close(result.losses[name].double(), loss, rtol=1e-10, atol=0)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", list(PASSES))
def test_one_tasks_graph_is_alive_at_a_time(kind: str) -> None:
    """Three batches need no more than one."""
    peaks = {}
    for count in (1, 3):
        model, tasks = plain()
        step = mtl.Step(model, tasks, balancer=mtl.balancers.MGDA(), passes=kind)
        given = {f"t{i}": batch for i, batch in enumerate(batches(count, size=64))}
        peaks[count] = most_saved(partial(step.backward, given))
    assert peaks[3] <= 1.05 * peaks[1]


@pytest.mark.parametrize("kind", list(PASSES))
def test_who_has_no_batch_takes_no_part(kind: str) -> None:
    model, tasks = problem(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    step = mtl.Step(model, tasks, optimizer, balancer=mtl.balancers.GradNorm(), passes=kind)
    given = batches(6)
    step(given[0])
    head = copy.deepcopy(model.heads["t1"].state_dict())
    state = {p: copy.deepcopy(optimizer.state[p]) for p in model.heads["t1"].parameters()}
    balancer = copy.deepcopy(step.balancing.balancer.state_dict())
    for batch in given[1:]:
        assert list(step({"t0": batch, "t2": batch}).losses) == ["t0", "t2"]
    assert_same(model.heads["t1"].state_dict(), head)
    for p, kept in state.items():
        assert_same(dict(optimizer.state[p]), kept)
    after = step.balancing.balancer.state_dict()
    assert after["initial"][1] == balancer["initial"][1]
    (learned,), (before,) = after["learned"].values(), balancer["learned"].values()
    assert torch.equal(learned[:, 1], before[:, 1])
    assert not torch.equal(learned[:, 0], before[:, 0])
    assert list(step({"t1": given[0]}).losses) == ["t1"]  # and one by itself is trained as it is
    assert not torch.equal(model.heads["t1"][1].weight, head["1.weight"])


def objectives(kinds: set[int]):
    """Returns three tasks, some of which are functions that compute the same loss."""
    torch.manual_seed(0)

    def function(i: int):
        return lambda model, batch: F.cross_entropy(model(batch)[f"t{i}"], batch[f"y{i}"])

    tasks = [
        mtl.Task(f"t{i}", head=nn.Linear(16, 5), objective=function(i))
        if i in kinds
        else mtl.Task(f"t{i}", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target=f"y{i}")
        for i in range(3)
    ]
    return mtl.MultiTaskModel(Plain(), tasks, inputs=["x"]).double(), tasks


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 3}])
@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("balancer", ["Equal", "UPGrad", "FAMO", "MoCo"])
def test_a_function_is_as_the_loss_that_it_computes(balancer: str, kind: str, how: dict[str, int]) -> None:
    ends = []
    for kinds in (set(), {1}, {0, 1, 2}):
        model, tasks = objectives(kinds)
        step = mtl.Step(
            model,
            tasks,
            torch.optim.SGD(model.parameters(), lr=0.1),
            balancer=getattr(mtl.balancers, balancer)(),
            passes=kind,
            **how,
        )
        results = [step(batch, measure=True) for batch in batches(3)]
        ends.append((torch.cat([p.detach().flatten() for p in model.parameters()]), results[-1]))
    for end, result in ends[1:]:
        torch.testing.assert_close(end, ends[0][0], rtol=0, atol=1e-11)
        for name, norm in ends[0][1].grad_norms.items():
            torch.testing.assert_close(result.grad_norms[name], norm, rtol=1e-10, atol=0)
        assert result.reach == ends[0][1].reach


def test_second_derivatives_within_an_objective() -> None:
    """u'' + u = 0 for a small network: the gradient of the mean squared residual against finite differences."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def residual(model: mtl.MultiTaskModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"].detach().requires_grad_()
        u = model.trunk(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return (bend + u).square().mean()

    tasks = [
        mtl.Task("equation", objective=residual),
        mtl.Task("start", objective=lambda m, b: (m.trunk(b["x"]) - 1).square().mean()),
    ]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    given = {
        "equation": {"x": torch.rand(7, 1, dtype=torch.float64)},
        "start": {"x": torch.zeros(1, 1, dtype=torch.float64)},
    }
    for options in ({}, {"micro_batch_size": 2}, {"balancer": mtl.balancers.FAMO()}):
        step = mtl.Step(model, tasks, **options)
        step.backward(given)
        weights = {n: float(w) for n, w in step.backward(given).weights.items()}
        for p in model.parameters():
            flat, gradient = p.data.view(-1), p.grad.view(-1)
            for i in range(len(flat)):
                values = []
                for shift in (1e-6, -1e-6):
                    flat[i] += shift
                    values.append(sum(weights[t.name] * t.objective(model, given[t.name]).item() for t in tasks))
                    flat[i] -= shift
                assert gradient[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_what_a_task_needs() -> None:
    with pytest.raises(mtl.UserError, match="task 't': give head, loss and target, or an objective; loss is missing"):
        mtl.Task("t", head=nn.Linear(1, 1), target="y")
    with pytest.raises(mtl.UserError, match="with an objective, leave out loss, mask, missing and mean_over"):
        mtl.Task("t", objective=lambda m, b: 0, mask="m")
    model, _ = plain()
    tasks = [mtl.Task("t0", objective=lambda model, batch: batch["nowhere"])]
    with pytest.raises(mtl.UserError, match="task 't0': its objective failed on a batch with x, y0, y1, y2: KeyError"):
        mtl.Step(model, tasks).backward(batches(1)[0])
    tasks = [mtl.Task("t0", objective=lambda model, batch: batch["x"])]
    with pytest.raises(mtl.UserError, match="task 't0': its loss must be a 0-dim tensor"):
        mtl.Step(model, tasks).backward(batches(1)[0])


def test_a_schedule_by_hand() -> None:
    linear = mtl.Schedule(start=1.0, end=0.5, steps=4)
    assert [linear(n) for n in range(6)] == [1, 0.875, 0.75, 0.625, 0.5, 0.5]
    cosine = mtl.Schedule(start=0, end=2, steps=4, shape="cosine")
    assert [cosine(n) for n in range(6)] == pytest.approx([0, 1 - math.sqrt(0.5), 1, 1 + math.sqrt(0.5), 2, 2])
    for wrong, message in (
        ({"start": -1, "end": 0, "steps": 1}, "start is -1"),
        ({"start": 0, "end": 0, "steps": 0}, "steps is 0"),
        ({"start": 0, "end": 0, "steps": 1, "shape": "square"}, "'square' is not one of linear, cosine"),
    ):
        with pytest.raises(mtl.UserError, match=message):
            mtl.Schedule(**wrong)


@pytest.mark.parametrize("balancer", ["Equal", "UW", "UPGrad", "NashMTL"])
def test_a_weight_that_follows_the_step_is_that_weight_in_each(balancer: str) -> None:
    fading = mtl.Schedule(start=1.0, end=0.0, steps=3)
    model, tasks = plain(t1=fading)
    step = mtl.Step(
        model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=getattr(mtl.balancers, balancer)()
    )
    for number, batch in enumerate(batches(5)):
        before = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(step.balancing.state_dict())
        result = step(batch)
        if number >= 3:  # it has faded: as if it had no labels
            assert list(result.losses) == ["t0", "t2"]
        other, others = plain(t1=fading(number))
        other.load_state_dict(before)
        again = mtl.Step(
            other, others, torch.optim.SGD(other.parameters(), lr=0.1), balancer=getattr(mtl.balancers, balancer)()
        )
        again.balancing.load_state_dict(state)
        expected = again(batch if number < 3 else {"t0": batch, "t2": batch})
        assert_same(result.weights, expected.weights)
        assert_same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_staged_unfreezing_goes_on_after_a_reload(stop: int) -> None:
    def built():
        model, tasks = problem(2)
        model.freeze(["trunk.conv", "trunk.norm"], until=2)
        model.freeze(["trunk.linear"], until=3)
        return mtl.Step(model, tasks, torch.optim.AdamW(model.parameters(), lr=1e-2))

    whole = built()
    given = batches(6, 2)
    moved = []
    statistics = []
    torch.manual_seed(1)
    for batch in given:
        before = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
        mean = whole.model.trunk.norm.running_mean.clone()
        whole(batch)
        moved.append(
            {
                n.split(".")[1]
                for n, p in whole.model.named_parameters()
                if n.startswith("trunk") and not torch.equal(p, before[n])
            }
        )
        statistics.append(not torch.equal(mean, whole.model.trunk.norm.running_mean))
    assert moved == [set(), set(), {"conv", "norm"}, *[{"conv", "norm", "linear"}] * 3]
    assert statistics == [False, False, True, True, True, True]
    first = built()
    torch.manual_seed(1)
    for batch in given[:stop]:
        first(batch)
    state = everything(first)
    second = built()
    second.model.load_state_dict(state["model"])
    second.load_state_dict(state["step"])
    torch.set_rng_state(state["draws"])
    for batch in given[stop:]:
        second(batch)
    assert_same(everything(second), everything(whole))


def test_patterns_that_overlap_thaw_at_the_last_of_them() -> None:
    model, _ = problem(2)
    model.heads["t1"][1].bias.requires_grad_(False)  # somebody's own wish
    model.freeze(["trunk", "heads.t1"], until=2)
    model.freeze(["trunk.conv"], until=4)
    model.freeze(["trunk.norm.bias"])

    def frozen() -> set[str]:
        return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    model.thaw(2)
    assert frozen() == {"trunk.conv.weight", "trunk.conv.bias", "trunk.norm.bias", "heads.t1.1.bias"}
    assert model.frozen_until
    model.thaw(4)
    assert frozen() == {"trunk.norm.bias", "heads.t1.1.bias"}
    assert not model.frozen_until


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("name", ["MGDA", "GradNorm", "UPGrad", "MoCo", "GradDrop", "Equal"])
def test_heads_alone_while_the_trunk_is_frozen(name: str, kind: str) -> None:
    """Each is trained by itself, and a balancer's state stays as it is; then it begins."""
    model, tasks = problem(2)
    model.freeze(["trunk"], until=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, name)(), passes=kind)
    other, others = problem(2)
    other.freeze(["trunk"])
    plain_step = mtl.Step(other, others, torch.optim.SGD(other.parameters(), lr=0.1), passes=kind)
    state = copy.deepcopy(step.balancing.balancer.state_dict())
    given = batches(3, 2)
    torch.manual_seed(0)
    for batch in given[:2]:
        step(batch, measure=True)
    assert_same(step.balancing.balancer.state_dict(), state)
    torch.manual_seed(0)
    for batch in given[:2]:
        plain_step(batch)
    assert_same(model.state_dict(), other.state_dict())
    before = model.trunk.conv.weight.detach().clone()
    step(given[2])
    assert not torch.equal(model.trunk.conv.weight, before)


def test_an_objective_that_is_no_mean_is_refused_in_micro_batches() -> None:
    model, _ = plain(1)
    for loss, right in (
        (lambda m, b: m(b)["t0"].square().sum(), False),
        (lambda m, b: m(b)["t0"].square().mean(), True),
    ):
        step = mtl.Step(model, [mtl.Task("t0", objective=loss)], micro_batch_size=3)
        if right:
            step.backward(batches(1)[0])
        else:
            with pytest.raises(mtl.UserError, match="task 't0': its objective can't be taken in micro-batches"):
                step.backward(batches(1)[0])
    counted = mtl.Task(
        "t0", objective=lambda m, b: m(b)["t0"].sum() / (b["y0"] > 1).sum(), count=lambda b: (b["y0"] > 1).sum()
    )
    whole, parts = plain(1), plain(1)
    ends = []
    for (built, _), how in ((whole, {}), (parts, {"micro_batch_size": 3})):
        mtl.Step(built, [counted], **how).backward(batches(1)[0])
        ends.append(torch.cat([p.grad.flatten() for p in built.trunk.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-12)
