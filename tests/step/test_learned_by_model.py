"""Parameters that a balancer learns: initial values, and updates by the model's optimizer."""

import csv
import math

import pytest
import torch
from conftest import command, stopping
from test_over_all import small

import mtl
from mtl.choices import PASSES

BY_MODEL = ["UW", "IMTLL", "IMTL", "GradNorm"]


def stepping(balancer: mtl.balancers.Balancer, *, dtype: torch.dtype = torch.float64, optimizer=None, **options):
    model, tasks, batch = small(dtype)
    model.heads["t2"].table.sparse = False
    for task in tasks:
        task.missing = True
    learned = balancer.parameters(3, dtype=dtype)
    optimizer = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    return mtl.Step(model, tasks, optimizer([*model.parameters(), *learned]), balancer=balancer, **options), batch


def numbers(step: mtl.Step) -> list[float]:
    return step.balancing.balancer.learned.values.tolist()


@pytest.mark.parametrize("init", [-0.5, [-0.5, 0.25, 1.0]])
@pytest.mark.parametrize("optimizer", ["own", "model"])
def test_where_they_start(init: object, optimizer: str) -> None:
    """w = ½e^(−s) for UW, e^s for IMTL-L, the number itself for GradNorm, a softmax over the losses for FAMO."""
    start = [init] * 3 if isinstance(init, float) else init
    step, batch = stepping(mtl.balancers.UW(init=init, optimizer=optimizer))
    weights = [w.item() for w in step.backward(batch).weights.values()]
    assert weights == pytest.approx([0.5 * math.exp(-s) for s in start])
    step, batch = stepping(mtl.balancers.IMTLL(init=init, optimizer=optimizer))
    weights = [w.item() for w in step.backward(batch).weights.values()]
    assert weights == pytest.approx([math.exp(s) for s in start])
    positive = [s + 1 for s in start]
    step, batch = stepping(mtl.balancers.GradNorm(init=positive, optimizer=optimizer))
    assert [w.item() for w in step.backward(batch).weights.values()] == pytest.approx(positive)
    if optimizer == "own":
        step, batch = stepping(mtl.balancers.FAMO(init=init))
        result = step.backward(batch)
        ratios = [math.exp(s) / result.losses[f"t{i}"].item() for i, s in enumerate(start)]
        weights = [w.item() for w in result.weights.values()]
        assert weights == pytest.approx([ratio / sum(ratios) for ratio in ratios])


@pytest.mark.parametrize("optimizer", ["own", "model"])
def test_gradnorms_weights_keep_the_sum_that_they_begin_with(optimizer: str) -> None:
    step, batch = stepping(mtl.balancers.GradNorm(init=[0.5, 1.0, 2.5], optimizer=optimizer))
    for _ in range(5):
        step(batch)
    assert sum(numbers(step)) == pytest.approx(4.0)
    assert numbers(step) != pytest.approx([0.5, 1.0, 2.5], abs=1e-3)


@pytest.mark.parametrize("name", BY_MODEL)
@pytest.mark.parametrize("kind", list(PASSES))
def test_a_task_that_is_absent(name: str, kind: str) -> None:
    """Its number and what the optimizer keeps of it stay as they are, momentum or not."""
    step, batch = stepping(getattr(mtl.balancers, name)(optimizer="model"), passes=kind)
    step(batch)
    before = numbers(step)
    first, second, third = step.balancing.balancer.parameters(3)
    step({**batch, "y1": batch["y1"] * torch.nan})
    assert second.grad is None
    assert int(step.optimizer.state[second]["step"]) == 1
    assert int(step.optimizer.state[first]["step"]) == int(step.optimizer.state[third]["step"]) == 2
    assert numbers(step)[1] == before[1]
    assert numbers(step)[0] != before[0]


@pytest.mark.parametrize("name", BY_MODEL)
def test_gradients_are_scaled_as_the_models_are(name: str) -> None:
    """So that SGD moves the numbers as far in half precision as in single."""
    ends = []
    for precision in ("fp32", "fp16"):
        balancer = getattr(mtl.balancers, name)(optimizer="model")
        step, batch = stepping(
            balancer, dtype=torch.float32, precision=precision, optimizer=lambda p: torch.optim.SGD(p, lr=0.05)
        )
        for _ in range(3):
            assert step(batch).taken
        ends.append(numbers(step))
    assert ends[1] == pytest.approx(ends[0], rel=0.02)
    assert max(abs(a - b) for a, b in zip(ends[0], balancer.learned.initial.expand(3).tolist(), strict=True)) > 0.02


@pytest.mark.parametrize("name", BY_MODEL)
def test_a_step_that_is_skipped_moves_nothing(name: str) -> None:
    step, batch = stepping(getattr(mtl.balancers, name)(optimizer="model"), on_nonfinite="skip_step")
    step(batch)
    before = numbers(step)
    assert not step({**batch, "x": batch["x"] * torch.inf}).taken
    assert numbers(step) == before
    step({**batch, "y1": batch["y1"] * torch.nan, "y2": batch["y2"] * torch.nan})  # one task by itself, next
    assert numbers(step)[1:] == before[1:]


def test_clipping_is_of_the_models_gradient_alone() -> None:
    """The numbers move by their own gradient, ½(1 − L) at s = 0, as without clipping."""
    step, batch = stepping(
        mtl.balancers.UW(optimizer="model"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        update=mtl.Update(clip_norm=1e-3),
    )
    losses = [loss.item() for loss in step(batch).losses.values()]
    assert numbers(step) == pytest.approx([0.1 * 0.5 * (loss - 1) for loss in losses])


def test_what_is_refused() -> None:
    model, tasks, _ = small()
    for name in BY_MODEL:
        with pytest.raises(mtl.UserError, match=rf"the balancer {name} has optimizer='model'.* not in SGD; give it \["):
            mtl.Step(
                model,
                tasks,
                torch.optim.SGD(model.parameters()),
                balancer=getattr(mtl.balancers, name)(optimizer="model"),
            )
        with pytest.raises(ValueError, match="optimizer: 'theirs' is not one of own, model"):
            getattr(mtl.balancers, name)(optimizer="theirs")
        with pytest.raises(ValueError, match="init is .*; it must be a finite number, or a list"):
            getattr(mtl.balancers, name)(init=math.nan)
    with pytest.raises(mtl.UserError, match=r"balancer.optimizer: LBFGS's line search uses a loss .*; take own"):
        stepping(mtl.balancers.UW(optimizer="model"), optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match=r"init is .*; it must be above 0"):
        mtl.balancers.GradNorm(init=[1.0, 0.0])
    step, batch = stepping(mtl.balancers.UW(init=[0.0, 1.0]))
    with pytest.raises(mtl.UserError, match="balancer UW failed: .*init has 2 numbers, and there are 3 tasks"):
        step.backward(batch)


RUN = ["task=mnist_two_head", "balancer=uw", "balancer.optimizer=model", "balancer.init=-0.5", "data.batch_size=512"]


def test_from_the_config(here) -> None:
    """A group of the optimizer by the name of balancer, with its settings and schedule; resumed bit by bit."""
    more = ["scheduler=cosine", "trainer.max_epochs=2", "log.every=2"]
    whole = command("train", *RUN, *more)
    assert whole.code == 0, whole.err
    stopped = command("train", *RUN, *more, *stopping(5))
    resumed = command("train", *RUN, *more, f"resume={stopped.run}")
    assert resumed.code == 0, resumed.err
    states = [torch.load(run / "checkpoints/last.pt", weights_only=True) for run in (whole.run, stopped.run)]
    learned = [state["step"]["balancing"]["balancer"]["learned"]["numbers"] for state in states]
    assert torch.equal(*learned)
    assert (learned[0] + 0.5).abs().max() > 1e-3
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name])
    groups = states[0]["step"]["optimizer"]["param_groups"]
    assert [group["name"] for group in groups] == ["default", "balancer"]
    assert groups[1]["lr"] == groups[0]["lr"] != groups[0]["initial_lr"]
    with (whole.run / "metrics.csv").open() as file:
        tags = {row["tag"] for row in csv.DictReader(file)}
    assert {"lr/default", "lr/balancer"} <= tags


def test_from_the_config_what_is_refused(here) -> None:
    ended = command("train", *RUN, "balancer.init=[0.0,0.0,0.0]")
    assert ended.code == 1
    assert "balancer: init has 3 numbers, and there are 2 tasks" in ended.err
    ended = command("train", "task=mnist_two_head", "balancer=famo", "+balancer.optimizer=model")
    assert ended.code == 1
    assert "optimizer" in ended.err
    assert "Traceback" not in ended.err
    one = command("train", *RUN, "only=digit", "trainer.max_epochs=1")
    assert one.code == 0, one.err
    first = command("train", *RUN, "trainer.max_epochs=1")
    other = command("train", *RUN, "trainer.max_epochs=2", "balancer.optimizer=own", f"resume={first.run}")
    assert other.code == 1
    assert "balancer.optimizer: was 'model', is 'own'" in other.err


def test_a_model_that_is_frozen_and_scaled_gradients() -> None:
    """The numbers are then all that has gradients, which are unscaled as well."""
    step, batch = stepping(
        mtl.balancers.UW(optimizer="model"),
        dtype=torch.float32,
        precision="fp16",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    step.model.requires_grad_(False)
    losses = [loss.item() for loss in step(batch).losses.values()]
    assert numbers(step) == pytest.approx([0.1 * 0.5 * (loss - 1) for loss in losses], rel=1e-3)
