"""The two-task toy problem: gradients, front, a driver against a real step, and which methods reach the front."""

import importlib.util

import numpy as np
import pytest
import torch
from conftest import ROOT, slow_but
from torch import nn

import mtl

specification = importlib.util.spec_from_file_location("toy", ROOT / "scripts" / "toy.py")
assert specification is not None
assert specification.loader is not None
toy = importlib.util.module_from_spec(specification)
specification.loader.exec_module(toy)

METHODS = toy.methods()


def difference(x1: float, x2: float, step1: float, step2: float) -> np.ndarray:
    return np.subtract(toy.losses(x1 + step1, x2 + step2), toy.losses(x1, x2))


def test_gradients_are_the_losses_slopes() -> None:
    h = 1e-6
    points = [*toy.STARTS, *np.random.default_rng(0).uniform(-10, 10, (200, 2)).tolist()]
    for x1, x2 in points:
        if x2 == 0:
            continue
        slopes = [(difference(x1, x2, *step) - difference(x1, x2, *(-step))) / (2 * h) for step in h * np.eye(2)]
        np.testing.assert_allclose(np.transpose(toy.gradients(x1, x2)), slopes, rtol=1e-5, atol=1e-5)


def test_on_the_line_between_the_branches_both_slopes_count() -> None:
    h = 1e-7
    expected = (difference(0.0, 0.0, 0.0, h) - difference(0.0, 0.0, 0.0, -h)) / h
    np.testing.assert_allclose(np.array(toy.gradients(0.0, 0.0))[:, 1], expected, rtol=1e-5)
    np.testing.assert_allclose(np.array(toy.gradients(0.0, 0.0))[:, 0], 0, atol=1e-12)


def test_on_the_front_the_gradients_are_opposite() -> None:
    for x1 in np.linspace(-6.9, 6.9, 30):
        g1, g2 = np.array(toy.gradients(x1, toy.front(x1)))
        assert g1 @ g2 / np.linalg.norm(g1) / np.linalg.norm(g2) == pytest.approx(-1, abs=1e-9)
    assert toy.front(0.0) == pytest.approx(-8.3551, abs=1e-4)
    assert toy.front(7.0) == toy.front(-7.0) == pytest.approx(-8.4345, abs=1e-4)
    assert toy.losses(-7, toy.front(-7)) == pytest.approx((-0.0398, -19.9894), abs=1e-4)
    assert toy.losses(7, toy.front(7)) == pytest.approx((-1.9989, -0.3979), abs=1e-4)
    assert toy.reached(0.0, -8.36)
    assert not any(toy.reached(*point) for point in ((0.0, -8.2), (7.2, -8.43), (0.0, -8.6)))


def test_losses_are_above_their_lowest_values() -> None:
    grid = np.linspace(-12, 12, 200)
    least = np.min([toy.losses(x1, x2) for x1 in grid for x2 in grid], axis=0)
    assert (least > toy.LOWEST).all()
    assert (least < np.add(toy.LOWEST, (0.2, 2))).all()


class Point(nn.Module):
    """A trunk that consists of the two coordinates."""

    def __init__(self, start: tuple[float, float]) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * self.x


class Loss:
    """One of the two losses, minus its lowest value, as tensors."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x1, x2 = features[0]
        upper, lower = (x2 / 2).tanh().clamp(min=0), (-x2 / 2).tanh().clamp(min=0)
        inner = ((-x1 - 7) / 2 - (-x2).tanh(), (-x1 + 3) / 2 + (-x2).tanh() + 2)[self.number]
        bowl = ((x1 - (7, -7)[self.number]) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
        loss = upper * (inner.abs().clamp(min=5e-6).log() + 6) + lower * bowl
        return (0.1, 1.0)[self.number] * loss - toy.LOWEST[self.number]


@pytest.mark.parametrize("name", list(METHODS))
def test_the_driver_is_a_real_step_with_adam(name: str) -> None:
    for start in ((9.0, 9.0), (-7.5, -0.5)):
        tasks = [mtl.Task(f"t{i}", head=nn.Identity(), loss=Loss(i), target="y") for i in range(2)]
        trunk = Point(start)
        model = mtl.MultiTaskModel(trunk, tasks, inputs=["sample"])
        optimizer = torch.optim.Adam(trunk.parameters(), lr=0.05)
        step = mtl.Step(model, tasks, optimizer, balancer=METHODS[name](), gradients=mtl.Gradients(source="rows"))
        batch = {"sample": torch.ones(1, 2, dtype=torch.float64), "y": torch.zeros(1)}
        for _ in range(40):
            step(batch)
        path = toy.run(METHODS[name](), start, steps=40, lr=0.05)
        assert np.linalg.norm(path[-1] - start) > 0.5
        np.testing.assert_allclose(path[-1], trunk.x.detach().numpy(), rtol=0, atol=1e-5)


def test_the_plain_sum_stays_in_the_valley() -> None:
    end = toy.run(METHODS["equal"](), (9.0, 9.0))[-1]
    np.testing.assert_allclose(end, (4.99, 3.89), atol=0.06)
    assert toy.reached(*toy.run(METHODS["equal"](), (-7.5, -0.5), steps=17_000)[-1])


@pytest.mark.parametrize(
    ("name", "steps"),
    slow_but(
        [("mgda", 24_000), ("famo", 25_000)],
        [("mgda", 24_000), ("nash_mtl", 17_000), ("famo", 25_000), ("imtl_g", 25_000)],
    ),
)
def test_who_leaves_the_valley_for_the_front(name: str, steps: int) -> None:
    assert toy.reached(*toy.run(METHODS[name](), (9.0, 9.0), steps=steps)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cagrad", "upgrad"])
def test_who_reaches_the_front_from_below(name: str) -> None:
    assert toy.reached(*toy.run(METHODS[name](), (-7.5, -0.5), steps=17_000)[-1])


def test_pcgrad_reaches_the_front_late() -> None:
    path = toy.run(METHODS["pcgrad"](), (9.0, 9.0), steps=70_000, every=50_000)
    assert [toy.reached(*point) for point in path] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"),
    [("conflict_free", 62_000), ("upgrad", 70_000), ("dualproj", 80_000), ("cagrad", 78_000), ("gradvac", 103_000)],
)
def test_who_else_does(name: str, steps: int) -> None:
    path = toy.run(METHODS[name](), (9.0, 9.0), steps=steps, every=50_000)
    assert not toy.reached(*path[1])
    assert toy.reached(*path[-1])


@pytest.mark.slow
def test_the_plain_sum_stays_for_good() -> None:
    assert toy.run(METHODS["equal"](), (9.0, 9.0), steps=130_000)[-1][1] > 3.5
