"""Burgers' equation: the exact solution by other ways, the objectives by hand, the points, and runs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, command, stopping
from test_resume import same_runs
from torch import Tensor, nn
from torchmetrics import RelativeSquaredError

import mtl
from mtl.config.data import build_loaders
from mtl.data import Loader
from mtl.problems import burgers

NU = 0.01 / math.pi
POINTS = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
    [1.0, 2.0]
) - torch.tensor([0.0, 1.0])


def cole_hopf(point: Tensor, count: int = 4001) -> Tensor:
    """u for t > 0 by a trapezoidal rule over y. As |u| ≤ 1, what counts has x − y below t, 13 of the spreads, or so."""
    t, x = point.unbind(1)
    spread = (2 * NU * t).sqrt()[:, None]
    z = torch.linspace(-22, 22, count, dtype=point.dtype)
    y = x[:, None] - spread * z
    exponent = -(math.pi * y).cos() / (2 * math.pi * NU) - z.square() / 2
    return -(exponent.softmax(1) * (math.pi * y).sin()).sum(1)


class Model(mtl.MultiTaskModel):
    """A model whose trunk is this function, or module, of the points."""

    def __init__(self, u: Any) -> None:
        super().__init__(nn.Module(), [mtl.Task("residual", objective=burgers.residual)], inputs=["point"])
        del self.trunk
        self.trunk = u


def test_exact_is_another_quadrature() -> None:
    near = torch.stack([torch.linspace(0.01, 1, 50), torch.linspace(-0.02, 0.02, 50)], 1).double()  # in the shock
    for point in (POINTS, near):
        torch.testing.assert_close(burgers.exact(point), cole_hopf(point), rtol=0, atol=1e-11)


def test_exact_has_the_slope_of_the_literature() -> None:
    """Basdevant et al., 1986: the steepest slope is 152.00516, at πt = 1.6037."""
    x = 1e-6
    point = torch.tensor([[1.6037 / math.pi, x], [1.6, x], [1.0, x], [0.3, x]], dtype=torch.float64)
    slope = -burgers.exact(point) / x
    assert float(slope[0]) == pytest.approx(152.00516, abs=1e-4)
    assert float(slope[0]) > float(slope[1:].max())


def test_exact_at_start_and_ends_and_its_symmetry() -> None:
    t, x = POINTS.unbind(1)
    start = torch.stack([torch.zeros_like(x), x], 1)
    torch.testing.assert_close(burgers.exact(start), -(math.pi * x).sin(), rtol=0, atol=1e-14)
    torch.testing.assert_close(burgers.exact(start + 1e-9), -(math.pi * x).sin(), rtol=0, atol=1e-7)  # continuous
    for side in (-1, 0, 1):
        assert burgers.exact(torch.stack([t, torch.full_like(t, side)], 1)).abs().max() < 1e-12
    mirrored = torch.stack([t, -x], 1)
    torch.testing.assert_close(burgers.exact(mirrored), -burgers.exact(POINTS), rtol=0, atol=1e-12)


def test_exact_solves_the_equation_by_finite_differences() -> None:
    """Away from the shock, where differences are good for something."""
    smooth = POINTS[(POINTS[:, 1].abs() > 0.2) & (POINTS[:, 1].abs() < 0.98) & (POINTS[:, 0] > 0.01)]
    h = 1e-4
    u, later, sooner, right, left = (
        burgers.exact(smooth + h * torch.tensor(step)) for step in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    )
    u_t, u_x, u_xx = (later - sooner) / (2 * h), (right - left) / (2 * h), (right - 2 * u + left) / h**2
    assert len(smooth) > 100
    assert (u_t + u * u_x - NU * u_xx).abs().max() < 1e-5
    assert (u_t + u * u_x).abs().max() > 1e-3  # the viscosity is seen


def test_objectives_of_a_polynomial() -> None:
    """u = t x²: u_t = x², u_x = 2 t x, u_xx = 2 t."""
    model, batch = Model(lambda point: point[:, 0] * point[:, 1] ** 2), {"point": POINTS}
    t, x = POINTS.unbind(1)
    expected = (x**2 + 2 * t**2 * x**3 - 2 * NU * t).square().mean()
    torch.testing.assert_close(burgers.residual(model, batch), expected)
    ends = torch.stack([t, x.sign()], 1)
    torch.testing.assert_close(burgers.boundary(model, {"point": ends}), t.square().mean())
    start = torch.stack([torch.zeros_like(x), x], 1)
    torch.testing.assert_close(burgers.initial(model, {"point": start}), (math.pi * x).sin().square().mean())


def test_objectives_of_solutions_are_zero() -> None:
    def wave(point: Tensor) -> Tensor:
        """Returns a front of height 0.1 that travels at speed 0.3."""
        return 0.3 - 0.05 * (0.05 * (point[:, 1] - 0.3 * point[:, 0]) / (2 * NU)).tanh()

    assert burgers.residual(Model(wave), {"point": POINTS}) < 1e-28
    assert burgers.residual(Model(lambda point: 1.1 * wave(point)), {"point": POINTS}) > 1e-6
    inside = POINTS[POINTS[:, 0] > 0.01]
    assert burgers.residual(Model(cole_hopf), {"point": inside}) < 1e-18
    t, x = inside.unbind(1)
    assert burgers.boundary(Model(cole_hopf), {"point": torch.stack([t, x.sign()], 1)}) < 1e-24
    assert burgers.initial(Model(burgers.exact), {"point": torch.stack([torch.zeros_like(x), x], 1)}) < 1e-28


@pytest.mark.parametrize("objective", [burgers.residual, burgers.boundary, burgers.initial])
def test_gradients_by_finite_differences(objective: Any) -> None:
    torch.manual_seed(0)
    model = Model(burgers.Network([4, 3])).double()
    batch = {"point": POINTS[:9]}
    objective(model, batch).backward()
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        for index in range(len(flat)):
            value, h = float(flat[index]), 1e-6
            flat[index] = value + h
            above = float(objective(model, batch).detach())
            flat[index] = value - h
            below = float(objective(model, batch).detach())
            flat[index] = value
            slope = 0.0 if parameter.grad is None else float(parameter.grad.view(-1)[index])
            assert slope == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-8)


def test_network() -> None:
    network = burgers.Network([7, 5])
    assert [tuple(p.shape) for p in network.parameters()] == [(7, 2), (7,), (5, 7), (5,), (1, 5), (1,)]
    point = POINTS.float()
    hidden = torch.stack([2 * point[:, 0] - 1, point[:, 1]], 1)
    for linear in (network.layers[0], network.layers[2]):
        hidden = torch.tanh(hidden @ linear.weight.T + linear.bias)
    torch.testing.assert_close(network(point), (hidden @ network.layers[4].weight.T + network.layers[4].bias)[:, 0])


@pytest.mark.parametrize("objective", [burgers.residual, burgers.boundary, burgers.initial])
def test_a_network_of_another_shape_is_refused(objective: Any) -> None:
    with pytest.raises(mtl.UserError, match=r"the trunk returns u of shape \(200, 1\) for 200 points"):
        objective(Model(nn.Linear(2, 1).double()), {"point": POINTS})


def test_points_are_where_they_belong_and_drawn_anew() -> None:
    drawn = {}
    for splits in (burgers.interior_points(), burgers.boundary_points(), burgers.initial_points()):
        batches = Loader(splits.train, batch_size=1000, seed=3).batches(1)
        one, two = next(batches)["point"], next(batches)["point"]
        again = next(Loader(splits.train, batch_size=1000, seed=3).batches(1))["point"]
        others = [
            next(Loader(splits.train, batch_size=1000, seed=seed).batches(epoch))["point"]
            for seed, epoch in ((3, 2), (4, 1))
        ]
        assert torch.equal(one, again)
        assert one.shape == (1000, 2)
        assert one.dtype == torch.float32
        assert not any(torch.equal(one, other) for other in (two, *others))
        drawn[splits.name] = one
    interior, boundary, initial = drawn.values()
    for values, low, high in (
        (interior[:, 0], 0, 1),
        (interior[:, 1], -1, 1),
        (boundary[:, 0], 0, 1),
        (initial[:, 1], -1, 1),
    ):
        assert values.min() >= low
        assert values.max() <= high
        counts = torch.histc(values, 10, low, high)
        assert counts.min() > 60  # of 100, spread evenly
        assert counts.max() < 140
    assert set(boundary[:, 1].tolist()) == {-1.0, 1.0}
    assert 400 < (boundary[:, 1] > 0).sum() < 600
    assert abs(torch.corrcoef(boundary.T)[0, 1]) < 0.15  # each end at all times
    assert not initial[:, 0].any()


def test_tasks_have_points_of_their_own() -> None:
    """The sources' draws in one step have nothing in common."""
    seen = []

    class Seen:
        def __call__(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            seen.append(batch["point"])
            return burgers.boundary(model, batch)

    tasks = [mtl.Task(name, objective=Seen()) for name in ("residual", "boundary", "initial")]
    model = mtl.MultiTaskModel(burgers.Network([3]), tasks, inputs=["point"])
    config = {
        "seed": 0,
        "tasks": {"residual": {"source": "a"}, "boundary": {"source": "b"}, "initial": {"source": "c"}},
        "data": {"batch_size": 50, "num_workers": 0, "eval_batch_size": 50, "collate": None},
        "trainer": {"tail": "keep"},
    }
    sources = mtl.data.Sources(
        {"a": burgers.interior_points(), "b": burgers.boundary_points(), "c": burgers.initial_points()}
    )
    loader = build_loaders(config, sources, torch.device("cpu"))["train"]
    mtl.Step(model, tasks, torch.optim.Adam(model.parameters()))(next(loader.batches(1)))
    interior, boundary, initial = seen
    numbers = [set(interior.flatten().tolist()), set(boundary[:, 0].tolist()), set(initial[:, 1].tolist())]
    assert not numbers[0] & numbers[1]
    assert not numbers[0] & numbers[2]
    assert not numbers[1] & {abs(x) for x in numbers[2]}


def test_grids_and_their_exact_solution() -> None:
    splits = burgers.interior_points(num_times=11, num_places=8)
    val, test = splits.val.fields, splits.test.fields
    assert len(val["u"]) == 88
    assert val["point"][0].tolist() == [0, -1]
    assert val["point"][-1].tolist() == [1, 1]
    assert len(test["u"]) == 70
    torch.testing.assert_close(test["point"][0], torch.tensor([0.05, -1 + 1 / 7]))
    for fields in (val, test):
        torch.testing.assert_close(fields["u"], burgers.exact(fields["point"]).float(), rtol=0, atol=1e-4)


def test_the_metric_is_the_relative_error() -> None:
    """It divides by the distance of u to its mean, which is zero."""
    splits = burgers.interior_points()
    for fields in (splits.val.fields, splits.test.fields):
        u = fields["u"]
        assert u.double().mean().abs() < 1e-7
        guess = u + 0.1 * torch.randn(u.shape, generator=torch.Generator().manual_seed(0))
        metric = RelativeSquaredError(squared=False)
        for part in torch.arange(len(u)).split(10_000):
            metric.update(guess[part], u[part])
        assert float(metric.compute()) == pytest.approx(float((guess - u).norm() / u.norm()), rel=1e-5)


SMALL = [
    "task=burgers",
    "data.epoch=40",
    "trainer.max_epochs=2",
    "data.batch_size={interior: 100, boundary: 20, initial: 20}",
    "+data.sources.interior.num_times=11",
    "+data.sources.interior.num_places=21",
    "model.trunk.widths=[20,20]",
    "log.every=10",
]
LBFGS = "optimizer.then={{_target_: mtl.optimizers.LBFGS, after: {}, max_iter: 5, line_search_fn: strong_wolfe}}"


def errors(run: Ended) -> list[float]:
    """Returns the relative errors on validation, by epoch."""
    lines = [line.split(",") for line in (run.run / "metrics.csv").read_text().splitlines()]
    return [float(value) for _, _, tag, value in lines if tag == "metric/residual/relative_error/val"]


@pytest.mark.parametrize("balancer", ["equal", "conflict_free"])
def test_the_error_falls(here: Path, balancer: str) -> None:
    start = command("train", *SMALL, "data.epoch=1", "trainer.max_epochs=1", "optimizer.lr=0.0")
    run = command("train", *SMALL, "data.epoch=300", "trainer.max_epochs=3", f"balancer={balancer}")
    assert run.code == 0, run.err
    assert errors(run)[-1] < 0.7 * errors(start)[0]
    assert set(run.metrics["test"]) == {"residual"}
    assert run.metrics["steps"] == 900
    assert "Passes: one for each objective and each source of data" in run.out


RESUMED = [*SMALL, "balancer=upgrad", "seed=2", LBFGS.format(50)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        run = command("train", *RESUMED)
        assert run.code == 0, run.err
        return run.run.resolve()


@pytest.mark.parametrize("at", [20, 50, 51, 73])
def test_a_stopped_run_goes_on(here: Path, undisturbed: Path, at: int) -> None:
    """With Adam and with L-BFGS, which takes over after 50 steps; points are those that would have been drawn."""
    stopped = command("train", *stopping(at), *RESUMED)
    assert f"Stopped at step {at}" in stopped.out, stopped.err
    again = command("train", *RESUMED, "resume=auto")
    assert f"resume   from step {at}" in again.out, again.err
    assert again.code == 0, again.err
    same_runs(stopped.run, undisturbed)


@pytest.mark.slow
def test_lbfgs_after_adam_ends_lower_than_adam(here: Path) -> None:
    """With as many steps, which take longer, and 2,000 points a step: with 500 some seeds end higher."""
    size = [
        "data.batch_size={interior: 2000, boundary: 200, initial: 200}",
        "data.epoch=200",
        "trainer.max_epochs=5",
        "model.trunk.widths=[32,32]",
    ]
    adam = command("train", *SMALL, *size)
    both = command("train", *SMALL, *size, LBFGS.format(800))
    assert adam.metrics["steps"] == both.metrics["steps"] == 1000
    assert errors(both)[-1] < 0.9 * errors(adam)[-1]
