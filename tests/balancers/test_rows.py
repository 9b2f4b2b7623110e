"""Balancers that use the gradients themselves, against their formulas and against TorchJD."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd import aggregation

from mtl import balancers as b

SCALES = st.sampled_from([1e-10, 1.0, 1e10])


def random_rows(num_tasks: int, count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(num_tasks, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pieces(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the matrix as two parameters, the first of them (T, 2, 2)."""
    return {"a": rows[:, :4].reshape(-1, 2, 2).clone(), "b": rows[:, 4:].clone()}


def combined(balancer: b.Balancer, rows: torch.Tensor, losses: torch.Tensor | None = None):
    losses = torch.ones(len(rows), dtype=torch.float64) if losses is None else losses
    weights, direction = balancer.combine(losses, pieces(rows))
    return weights, torch.cat([direction["a"].flatten(), direction["b"]])


def projected(point: torch.Tensor) -> torch.Tensor:
    """Returns the nearest point of the simplex, by bisection on the shift."""
    point = point - point.max()  # which leaves the answer, and the digits, where they are
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (point - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (point - high).clamp(min=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**16), SCALES)
def test_graddrop_by_hand(num_tasks: int, seed: int, scale: float) -> None:
    rows = random_rows(num_tasks, 9, seed, scale)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.cat(
        [
            torch.rand(2, 2, generator=generator, dtype=torch.float64).flatten(),
            torch.rand(5, generator=generator, dtype=torch.float64),
        ]
    )
    expected = torch.zeros(9, dtype=torch.float64)
    kept = torch.zeros(num_tasks, dtype=torch.float64)
    for column in range(9):
        values = rows[:, column].tolist()
        share = 0.5 * (1 + sum(values) / sum(abs(v) for v in values))
        for task, value in enumerate(values):
            if (value > 0 and share > drawn[column]) or (value < 0 and share < drawn[column]):
                expected[column] += value
                kept[task] += value * value
    weights, direction = combined(b.GradDrop(seed=seed), rows)
    torch.testing.assert_close(direction, expected, rtol=1e-10, atol=1e-12 * scale)
    torch.testing.assert_close(weights, kept / rows.square().sum(1), rtol=1e-9, atol=1e-12)


def test_graddrop_is_right_on_average_and_keeps_what_all_agree_on() -> None:
    """Each sign is kept by its share of the absolute values, so the mean is that of a coin with this probability."""
    rows = random_rows(3, 9, 1)
    rows[:, 0] = rows[:, 0].abs()
    balancer = b.GradDrop(seed=0)
    draws = torch.stack([combined(balancer, rows)[1] for _ in range(6000)])
    up, down = rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)
    share = up / (up - down)
    torch.testing.assert_close(draws[:, 0], rows[:, 0].sum().expand(6000))
    expected = share * up + (1 - share) * down
    spread = (share * (1 - share)).sqrt() * (up - down) / 6000**0.5
    assert ((draws.mean(0) - expected).abs() <= 5 * spread + 1e-12).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**16), SCALES, st.sampled_from([0.0, 0.1]))
def test_moco_by_hand(num_tasks: int, seed: int, scale: float, rho: float) -> None:
    balancer = b.MoCo(beta=0.5, gamma=0.1, rho=rho)
    averages = torch.zeros(num_tasks, 9, dtype=torch.float64)
    simplex = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
    for step in range(1, 6):
        rows = random_rows(num_tasks, 9, seed + step, scale)
        averages = averages - 0.5 / step**0.5 * (averages - rows)
        moved = simplex - 0.1 / step**0.5 * (averages @ averages.T + rho * torch.eye(num_tasks)) @ simplex
        simplex = projected(moved)
        weights, direction = combined(balancer, rows)
        near = 1e-6 if scale < 1e9 else 1e-3  # steps of 1e19 leave the simplex far behind
        torch.testing.assert_close(weights, simplex, rtol=near, atol=near)
        torch.testing.assert_close(direction, weights @ averages, rtol=1e-9, atol=1e-12 * scale)
        assert float(weights.sum()) == pytest.approx(1.0)
        assert (weights >= 0).all()
        simplex = weights


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**16), SCALES, st.sampled_from([0.0, 0.5]))
def test_db_mtl_by_hand(num_tasks: int, seed: int, scale: float, sigma: float) -> None:
    balancer = b.DBMTL(beta=0.9, sigma=sigma)
    balancer.own = torch.arange(1.0, num_tasks + 1).double()
    averages = torch.zeros(num_tasks, 9, dtype=torch.float64)
    for step in range(1, 6):
        rows = random_rows(num_tasks, 9, seed + step, scale)
        losses = random_rows(1, num_tasks, seed + step)[0].abs() + 0.1
        g = rows / losses[:, None]
        averages = g + 0.9 / step**sigma * (averages - g)
        lengths = averages.norm(dim=1)
        expected = (balancer.own * lengths.max() / lengths) @ averages
        weights, direction = combined(balancer, rows, losses)
        torch.testing.assert_close(direction, expected, rtol=1e-9, atol=1e-12 * scale)
        torch.testing.assert_close(weights, balancer.own * lengths.max() / lengths / losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(balancer.alone(losses), 1 / losses)
    with pytest.raises(ArithmeticError, match="logarithm needs losses"):
        combined(balancer, rows, -losses)


def test_db_mtl_leaves_out_a_zero_gradient() -> None:
    rows = random_rows(3, 9, 0)
    rows[1] = 0
    _, direction = combined(b.DBMTL(beta=0.0), rows)
    lengths = rows.norm(dim=1)
    torch.testing.assert_close(direction, rows[0] * lengths.max() / lengths[0] + rows[2] * lengths.max() / lengths[2])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**16), SCALES)
def test_excess_mtl_by_hand(num_tasks: int, seed: int, scale: float) -> None:
    balancer = b.ExcessMTL(eta=0.2)
    squares = torch.zeros(num_tasks, 9, dtype=torch.float64)
    w, first = torch.full((num_tasks,), 1.0, dtype=torch.float64), None
    for step in range(5):
        rows = random_rows(num_tasks, 9, seed + step, scale)
        squares = squares + rows**2
        excess = (rows * squares**-0.5 * rows).sum(1)
        if first is None:
            first = excess
        else:
            w = w * (0.2 * excess / first).exp()
            w = w * num_tasks / w.sum()
        weights, direction = combined(balancer, rows)
        torch.testing.assert_close(weights, w, rtol=1e-9, atol=0)
        torch.testing.assert_close(direction, w @ rows, rtol=1e-9, atol=1e-12 * scale)


def test_excess_mtl_against_torchjd() -> None:
    """The same rule, but TorchJD has the sum at 1 and lets the first step's raw risks move the weights already."""
    mine, theirs = b.ExcessMTL(eta=0.5), aggregation.ExcessMTLWeighting(robust_step_size=0.5)
    start = theirs(random_rows(3, 9, 0))
    combined(mine, random_rows(3, 9, 0))
    for step in range(1, 8):
        rows = random_rows(3, 9, step)
        corrected = theirs(rows) / start
        weights, _ = combined(mine, rows)
        torch.testing.assert_close(weights / weights.sum(), corrected / corrected.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [b.GradDrop, b.MoCo, b.DBMTL, b.ExcessMTL])
def test_hard_cases(kind) -> None:
    base = random_rows(3, 9, 7)
    zero_row = base.clone()
    zero_row[2] = 0
    for rows in (
        base,
        base[:1].repeat(3, 1),
        zero_row,
        torch.zeros(3, 9).double(),
        base * torch.tensor([[1e-6], [1], [1e6]]),
    ):
        for scale in (1e-10, 1.0, 1e10):
            balancer = kind()
            for _ in range(3):
                weights, direction = combined(balancer, rows * scale)
                assert weights.isfinite().all()
                assert direction.isfinite().all()
                assert direction.norm() <= 3.001 * len(rows) * (rows * scale).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [b.GradDrop, b.MoCo, b.DBMTL, b.ExcessMTL])
def test_direction_is_in_the_parameters_type(kind, dtype: torch.dtype) -> None:
    rows = {name: row.to(dtype) for name, row in pieces(random_rows(3, 9, 0)).items()}
    shapes = {name: row.shape[1:] for name, row in rows.items()}
    _, direction = kind().combine(torch.ones(3, dtype=torch.float64), rows)
    assert {name: (d.shape, d.dtype) for name, d in direction.items()} == {n: (s, dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("name", ["UPGrad", "MGDA", "PCGrad", "AlignedMTL", "GradDrop", "Sum"])
def test_torchjd_adapter_is_the_aggregator_on_the_matrix(name: str) -> None:
    rows = random_rows(3, 9, 3)
    torch.manual_seed(0)
    expected = getattr(aggregation, name)()(rows)
    torch.manual_seed(0)
    weights, direction = combined(b.TorchJD(aggregator=name), rows)
    assert torch.equal(direction, expected)
    if name == "GradDrop":
        assert weights.isnan().all()  # it has none
    else:
        torch.testing.assert_close(weights @ rows, expected)


def test_torchjd_aggregators_state_survives_a_reload() -> None:
    def fresh() -> b.Balancer:
        return b.TorchJD(aggregator="GradVac", beta=0.3)

    rows = [random_rows(4, 9, seed) for seed in range(20)]
    first, second, third = fresh(), fresh(), fresh()
    torch.manual_seed(0)
    expected = [combined(first, r)[1] for r in rows]
    torch.manual_seed(0)
    found = [combined(second, r)[1] for r in rows[:10]]
    saved = io.BytesIO()
    torch.save(second.state_dict(), saved)
    saved.seek(0)
    third.load_state_dict(torch.load(saved, weights_only=True))
    found += [combined(third, r)[1] for r in rows[10:]]
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def test_torchjd_missing_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchjd", None)
    with pytest.raises(ImportError, match=r'pip install "mtl-train\[torchjd\]"'):
        b.TorchJD(aggregator="UPGrad")
