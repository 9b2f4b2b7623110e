"""Balancers that are functions of the Gramian: optimality conditions, identities, invariances, TorchJD, hard cases."""

import io
import math
from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest
import torch
from conftest import slow_but
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.nn.functional import cosine_similarity
from torchjd import aggregation, linalg

from mtl import balancers as b

ALL = {
    "aligned_mtl": b.AlignedMTL,
    "cagrad": b.CAGrad,
    "conflict_free": b.ConflictFree,
    "dualproj": b.DualProj,
    "fairgrad": lambda: b.FairGrad(alpha=2.0),
    "gradnorm": b.GradNorm,
    "gradvac": b.GradVac,
    "imtl_g": b.IMTLG,
    "mgda": b.MGDA,
    "nash_mtl": b.NashMTL,
    "pcgrad": b.PCGrad,
    "sdmgrad": b.SDMGrad,
    "upgrad": b.UPGrad,
}
RANDOM = ("pcgrad", "gradvac")
LOSSES = torch.ones(40, dtype=torch.float64)


def weights(balancer: b.Balancer, rows: torch.Tensor) -> torch.Tensor:
    return balancer.weights(LOSSES[: len(rows)], rows @ rows.T)


def direction(balancer: b.Balancer, rows: torch.Tensor) -> torch.Tensor:
    return weights(balancer, rows) @ rows


def random_rows(num_tasks: int, num_parameters: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_tasks, num_parameters, generator=generator, dtype=torch.float64)


def preferring(balancer: b.Balancer, own: torch.Tensor) -> b.Balancer:
    balancer.own = own
    return balancer


def preferences(num_tasks: int, seed: int) -> torch.Tensor:
    return torch.rand(num_tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.1


def length(rows: torch.Tensor) -> torch.Tensor:
    return rows.norm(dim=1)


def well_conditioned(rows: torch.Tensor) -> bool:
    return len(rows) <= rows.shape[1] and np.linalg.cond((rows / length(rows)[:, None]).numpy()) < 1e3


SCALES = st.sampled_from([1e-10, 1e-4, 1.0, 1e4, 1e10])
matrices = st.builds(random_rows, st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**20), SCALES)
many_tasks = st.builds(random_rows, st.integers(9, 40), st.integers(2, 50), st.integers(0, 2**20), SCALES)


def degenerate(kind: str, num_tasks: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    rows = random_rows(num_tasks, 6, seed)
    factors = random_rows(num_tasks, 1, seed + 1)
    if kind == "rank one":
        rows = rows[:1] * factors
    elif kind == "duplicates":
        rows = rows[torch.arange(num_tasks) // 2]
    elif kind == "a zero row":
        rows[num_tasks // 2] = 0
    elif kind == "few dimensions":
        rows[:, 2:] = 0
    elif kind == "stationary":
        rows[-1] = -rows[:-1].sum(0)
    elif kind == "nearly stationary":
        rows[-1] = -rows[:-1].sum(0) * (1 + 1e-4) + 1e-4 * rows[-1]
    elif kind == "unlike sizes":
        rows = rows * 10 ** (3 * factors).clamp(-6, 6)
    return rows * scale


KINDS = [
    "rank one",
    "duplicates",
    "a zero row",
    "few dimensions",
    "stationary",
    "nearly stationary",
    "unlike sizes",
]
hard = st.builds(degenerate, st.sampled_from(KINDS), st.integers(2, 9), st.integers(0, 2**20), SCALES)


@settings(max_examples=150, deadline=None)
@given(matrices)
def test_upgrad_and_dualproj_conflict_with_no_task(rows: torch.Tensor) -> None:
    for balancer in (b.UPGrad(), b.DualProj()):
        w = weights(balancer, rows)
        d = w @ rows
        assert (rows @ d >= -1e-11 * length(rows) * length(rows).mean()).all()
        assert (w >= 1 / len(rows) - 1e-12).all()
    # KKT of the mean's projection: a gradient gains weight only where d is at right angles to it. Nearly dependent
    # rows have weights in the hundreds, and d the rounding error of such terms.
    added = weights(b.DualProj(), rows) - 1 / len(rows)
    error = (added * (rows @ direction(b.DualProj(), rows))).abs().max()
    assert error <= 1e-11 * (1 + added.max()) * length(rows).max() ** 2


@settings(max_examples=150, deadline=None)
@given(matrices)
def test_mgda_is_the_shortest_convex_combination(rows: torch.Tensor) -> None:
    w = weights(b.MGDA(), rows)
    d = w @ rows
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1.0, abs=1e-12)
    assert (rows @ d >= d @ d - 1e-11 * length(rows).max() ** 2).all()  # the condition for the minimum


def test_mgda_of_two_tasks_by_hand() -> None:
    """The minimum over λ of ‖λa + (1−λ)c‖ is at (c−a)·c / ‖a−c‖², clipped to [0, 1]."""
    for seed in range(20):
        rows = random_rows(2, 3, seed)
        a, c = rows
        share = ((c - a) @ c / (a - c).square().sum()).clamp(0, 1)
        torch.testing.assert_close(weights(b.MGDA(), rows), torch.stack([share, 1 - share]), rtol=1e-10, atol=1e-12)


def test_mgda_leaves_out_tasks_without_a_gradient() -> None:
    rows = random_rows(3, 5, 0)
    rows[1] = 0
    w = weights(b.MGDA(), rows)
    assert w[1] == 0
    torch.testing.assert_close(w[[0, 2]], weights(b.MGDA(), rows[[0, 2]]))
    assert torch.equal(weights(b.MGDA(), torch.zeros(2, 3).double()), torch.zeros(2).double())


@pytest.mark.parametrize("normalise", ["l2", "loss", "loss+"])
def test_mgda_normalised_is_mgda_of_normalised_rows(normalise: str) -> None:
    rows = random_rows(4, 6, 3)
    losses = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    divisor = {"l2": length(rows), "loss": losses, "loss+": losses * length(rows)}[normalise]
    scaled = rows / divisor[:, None]
    d = b.MGDA(normalise=normalise).weights(losses, rows @ rows.T) @ rows
    torch.testing.assert_close(d, direction(b.MGDA(), scaled), rtol=1e-9, atol=1e-12)


def test_settings_that_are_refused() -> None:
    with pytest.raises(ValueError, match="'l3' is not one of none, l2, loss, loss\\+"):
        b.MGDA(normalise="l3")
    with pytest.raises(ValueError, match="alpha is 0; it must be above 0"):
        b.FairGrad(alpha=0)
    with pytest.raises(ValueError, match="max_norm is 0; it must be above 0"):
        b.NashMTL(max_norm=0)
    with pytest.raises(ValueError, match="c is -0.1; it must be at least 0"):
        b.CAGrad(c=-0.1)
    with pytest.raises(ValueError, match="lam is -1; it must be at least 0"):
        b.SDMGrad(lam=-1)
    with pytest.raises(ValueError, match=r"beta is 1.5; it must be in \[0, 1\]"):
        b.GradVac(beta=1.5)
    with pytest.raises(ValueError, match="alpha is -1; it must be at least 0"):
        b.GradNorm(alpha=-1)
    with pytest.raises(ValueError, match="lr is 0; it must be above 0"):
        b.GradNorm(lr=0)


@pytest.mark.parametrize("kind", [b.MGDA, b.NashMTL, b.FairGrad, b.GradNorm])
def test_scope_is_shared_or_all(kind: type[b.Balancer]) -> None:
    assert [kind(scope=scope).scope for scope in ("shared", "all")] == ["shared", "all"]
    assert kind().scope == ("all" if kind is b.GradNorm else "shared")
    with pytest.raises(ValueError, match="scope: 'heads' is not one of shared, all"):
        kind(scope="heads")


@settings(max_examples=150, deadline=None)
@given(matrices, st.sampled_from([0.3, 0.5, 1.0, 2.0, 5.0]))
def test_fairgrad_solves_its_equation(rows: torch.Tensor, alpha: float) -> None:
    assume(well_conditioned(rows))
    w = weights(b.FairGrad(alpha=alpha), rows)
    assert (w > 0).all()
    torch.testing.assert_close(rows @ (w @ rows) * w ** (1 / alpha), torch.ones_like(w), rtol=1e-5, atol=0)


@settings(max_examples=150, deadline=None)
@given(matrices)
def test_nash_mtl_solves_its_equation(rows: torch.Tensor) -> None:
    assume(well_conditioned(rows))
    w = weights(b.NashMTL(max_norm=None), rows)
    torch.testing.assert_close(rows @ (w @ rows) * w, torch.ones_like(w), rtol=1e-5, atol=0)
    assert (w @ rows).norm() == pytest.approx(math.sqrt(len(rows)), rel=1e-5)
    assert direction(b.NashMTL(), rows).norm() <= 1 + 1e-9
    torch.testing.assert_close(w, weights(b.FairGrad(alpha=1.0), rows))


def test_nash_mtl_is_bounded_at_a_stationary_point() -> None:
    for rows in (torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])):
        for scale in (1e-10, 1.0, 1e10):
            d = direction(b.NashMTL(), rows.double() * scale)
            assert d.isfinite().all()
            assert d.norm() <= 1 + 1e-6


@settings(max_examples=150, deadline=None)
@given(matrices)
def test_imtl_g_projects_equally_on_all_gradients(rows: torch.Tensor) -> None:
    assume(well_conditioned(rows))
    d = direction(b.IMTLG(), rows)
    projections = rows @ d / length(rows)
    assert projections.min() > 0
    torch.testing.assert_close(projections, projections.mean().expand_as(projections), rtol=1e-6, atol=0)
    assert d.norm() <= length(rows).max() * (1 + 1e-9)


def test_imtl_g_turns_round_where_the_paper_would_go_uphill() -> None:
    found = 0
    for seed in range(2000):
        rows = random_rows(3, 3, seed)
        raw = torch.linalg.solve(rows @ rows.T, length(rows))
        found += bool(raw.sum() < 0)
        assert (rows @ direction(b.IMTLG(), rows) > 0).all()
    assert found > 20


@settings(max_examples=150, deadline=None)
@given(matrices)
def test_conflict_free_has_one_cosine_with_all_gradients(rows: torch.Tensor) -> None:
    assume(well_conditioned(rows))
    d = direction(b.ConflictFree(), rows)
    cosines = rows @ d / length(rows) / d.norm()
    assert cosines.min() > 0
    torch.testing.assert_close(cosines, cosines.mean().expand_as(cosines), rtol=1e-6, atol=0)
    assert d.norm() == pytest.approx(float((rows @ d).sum() / d.norm()), rel=1e-9)
    other = direction(b.IMTLG(), rows)
    assert d / d.norm() @ other / other.norm() == pytest.approx(1.0, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(matrices)
def test_aligned_mtl_is_the_nearest_orthogonal_system(rows: torch.Tensor) -> None:
    assume(well_conditioned(rows))
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    expected = (s.min() * u @ v).mean(0)
    torch.testing.assert_close(direction(b.AlignedMTL(), rows), expected, rtol=1e-6, atol=1e-6 * float(s.min()))


def test_pcgrad_of_three_tasks_by_hand() -> None:
    """The surgery written out on the gradients themselves, in every order; the sum is of one order for each task."""
    rows = random_rows(3, 4, 5)
    rows[2] = -rows[0] + 0.3 * rows[1]
    results = []
    for i in range(3):
        options = []
        for order in permutations([j for j in range(3) if j != i]):
            g = rows[i].clone()
            for j in order:
                if g @ rows[j] < 0:
                    g = g - (g @ rows[j]) / rows[j].square().sum() * rows[j]
            options.append(g)
        results.append(options)
    sums = [x + y + z for x in results[0] for y in results[1] for z in results[2]]
    assert max((x - sums[0]).norm() for x in sums) > 1e-3  # the order does matter
    for seed in range(10):
        d = direction(b.PCGrad(seed=seed), rows)
        assert min((d - s).norm() for s in sums) < 1e-12 * d.norm()


def test_fairgrad_of_unlike_sizes() -> None:
    """Newton's method from afar would cycle here; it is led to α from 1."""
    for alpha in (0.2, 5.0, 10.0):
        for seed in range(6):
            for num_tasks in (2, 5, 12):
                sizes = 10 ** random_rows(num_tasks, 1, seed + 50).clamp(-3, 3)
                rows = random_rows(num_tasks, 15, seed) * sizes
                w = weights(b.FairGrad(alpha=alpha), rows)
                matrix = rows @ rows.T
                terms = matrix.abs() @ w  # a gain may be what is left of terms that nearly cancel
                assert ((matrix @ w - w ** (-1 / alpha)).abs() <= 1e-9 * terms).all(), (alpha, seed, num_tasks)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**20), SCALES)
def test_two_tasks_upgrad_is_half_of_pcgrad(seed: int, scale: float) -> None:
    rows = random_rows(2, 5, seed, scale)
    half = direction(b.PCGrad(), rows) / 2
    torch.testing.assert_close(direction(b.UPGrad(), rows), half, rtol=1e-9, atol=1e-12 * scale)


def assert_solves_cagrad(rows: torch.Tensor, c: float) -> None:
    """Checks that the bounds of both problems meet: min d·g_t ≤ g_w·ḡ + c‖ḡ‖‖g_w‖ for any d in the ball and w."""
    mean = rows.mean(0)
    radius = c * mean.norm()
    moving = length(rows) > 0
    added = (weights(b.CAGrad(c=c), rows) - 1 / len(rows))[moving]
    rows = rows[moving]  # those that are zero count in the mean alone
    d = mean + added @ rows
    gains = rows @ d
    shared = added > 0
    assert (added >= 0).all()
    shortest = weights(b.MGDA(), rows)
    closeness = (shortest @ rows).norm() / (shortest @ length(rows))  # of a Pareto-stationary point
    distance = (d - mean).norm()
    # The Gramian knows the length of g_w only to the root of the rounding in its square.
    slack = 1e-7 if closeness > 1e-4 else 1e-3
    assert distance <= radius * (1 + slack)
    # A gain is known to within rounding of its gradient times d; equal ones are known from the shortest gradient on.
    near = 1e-8 * length(rows) * (mean.norm() + radius)
    near = near.clamp(min=near[shared].min() if shared.any() else 0.0)
    if distance >= radius * (1 - slack):
        worst = gains[shared][near[shared].argmin()]
        g_w = added / added.sum() @ rows
        assert (g_w @ mean + distance * g_w.norm() - worst).abs() <= near[shared].max()
    else:  # more than nothing can't be gained, since some convex combination is zero; d is the projection of the mean
        worst = torch.zeros(())
        assert closeness <= 1e-6
    assert (gains >= worst - near).all()
    assert (gains - worst).abs()[shared].le(near[shared]).all()


@settings(max_examples=200, deadline=None)
@given(matrices | many_tasks | hard, st.sampled_from([0.1, 0.5, 1.0, 3.0]))
def test_cagrad_is_optimal(rows: torch.Tensor, c: float) -> None:
    assume(rows.mean(0).norm() > 1e-5 * length(rows).mean())
    assert_solves_cagrad(rows, c)


def on_simplex(objective: Callable[[np.ndarray], float], num_tasks: int) -> float:
    """Returns the smallest value of the objective that SciPy finds from a few starting points."""
    starts = [np.full(num_tasks, 1 / num_tasks), *np.eye(num_tasks) * 0.9 + 0.1 / num_tasks]
    total = {"type": "eq", "fun": lambda w: w.sum() - 1}
    options = {"ftol": 1e-14, "maxiter": 500}
    return min(
        minimize(objective, x, bounds=[(0, 1)] * num_tasks, constraints=total, options=options).fun for x in starts
    )


@pytest.mark.parametrize("kind", ["random", *KINDS[:-1]])
def test_cagrad_and_sdmgrad_against_scipy(kind: str) -> None:
    for seed in range(6):
        rows = degenerate(kind, 2 + seed % 4, seed)
        moving = rows[length(rows) > 0]
        g, mean, unit = moving.numpy(), rows.mean(0).numpy(), float(length(rows).max()) ** 2
        for c in (0.2, 0.5, 2.0):

            def bound(w, c=c, g=g, mean=mean):
                return w @ g @ mean + c * np.linalg.norm(mean) * np.linalg.norm(w @ g)

            worst = float((moving @ direction(b.CAGrad(c=c), rows)).min())
            assert worst == pytest.approx(on_simplex(bound, len(g)), abs=2e-5 * unit)
        for lam in (0.0, 0.3, 2.0):

            def square(w, lam=lam, g=g, mean=mean):
                return float(np.square(w @ g + lam * mean).sum())

            least = on_simplex(square, len(g))
            found = ((1 + lam) * direction(b.SDMGrad(lam=lam), rows)).square().sum()
            assert float(found) == pytest.approx(least, abs=1e-6 * unit)
            assert found <= least + 1e-12 * unit


def test_cagrad_of_cases_done_by_hand() -> None:
    rows = random_rows(4, 6, 1)
    torch.testing.assert_close(direction(b.CAGrad(c=0), rows), rows.mean(0), rtol=1e-14, atol=0)
    far = direction(b.CAGrad(c=1e6), rows)
    assert cosine_similarity(far, direction(b.MGDA(), rows), dim=0) == pytest.approx(1.0, abs=1e-9)
    scaled = b.CAGrad(c=0.7, rescale=True)
    torch.testing.assert_close(direction(scaled, rows), direction(b.CAGrad(c=0.7), rows) / 1.49, rtol=1e-14, atol=0)
    # g and −2g: ḡ = −g/2. Whatever d does for one it does to the other; the least harm is the smallest d, (1 − c)ḡ.
    opposite = torch.stack([rows[0], -2 * rows[0]])
    torch.testing.assert_close(direction(b.CAGrad(c=0.5), opposite), -rows[0] / 4, rtol=1e-12, atol=0)
    assert direction(b.CAGrad(c=3), opposite).norm() < 1e-12
    # Stationary, since the first two cancel. ḡ = (0.1, 1)/3 harms the second; d = (0, 1)/3 harms none and is near it.
    stationary = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.1, 1.0]]).double()
    torch.testing.assert_close(direction(b.CAGrad(), stationary), torch.tensor([0.0, 1 / 3]).double())
    # The two unit gradients have d = ḡ + cḡ, longer by c: the weights are (1 + c)/2.
    right_angle = torch.eye(2).double()
    torch.testing.assert_close(weights(b.CAGrad(c=0.5), right_angle), torch.tensor([0.75, 0.75]).double())


@settings(max_examples=150, deadline=None)
@given(matrices | many_tasks | hard, st.sampled_from([0.0, 0.3, 3.0]))
def test_sdmgrad_is_optimal(rows: torch.Tensor, lam: float) -> None:
    w = weights(b.SDMGrad(lam=lam), rows)
    d = w @ rows
    moving = length(rows) > 0
    share = (1 + lam) * w - lam / len(rows)
    assert w.sum() == pytest.approx(1.0, abs=1e-12)
    assert (share >= -1e-12).all()
    # Tasks with a share have the same gain, the least: gradient of the half square, Lagrange's multiplier.
    shared = share > 1e-12
    near = 1e-9 * length(rows) * (w.abs() @ length(rows))
    least = (rows @ d)[shared][near[shared].argmin()]
    near = near.clamp(min=near[shared].min())
    assert ((rows @ d - least >= -near) | ~moving).all()
    assert (rows @ d - least).abs()[shared].le(near[shared]).all()


def test_sdmgrad_is_between_mgda_and_the_mean() -> None:
    rows = random_rows(4, 6, 3)
    torch.testing.assert_close(weights(b.SDMGrad(lam=0), rows), weights(b.MGDA(), rows), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(direction(b.SDMGrad(lam=1e9), rows), rows.mean(0), rtol=0, atol=1e-8)


def cosine(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return a @ c / (a.norm() * c.norm())  # PyTorch's own takes lengths below 1e-8 for that


def vaccinated(
    rows: torch.Tensor, targets: torch.Tensor, beta: float, orders: tuple[tuple[int, ...], ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes GradVac on the gradients themselves, as in its paper."""
    targets, total = targets.clone(), torch.zeros_like(rows[0])
    for i, order in enumerate(orders):
        g = rows[i].clone()
        for j in order:
            phi, aim = cosine(g, rows[j]), targets[i, j].clone()
            if phi < aim:
                sines = [(1 - x.square()).clamp(min=0).sqrt() for x in (phi, aim)]
                g = g + g.norm() * (aim * sines[0] - phi * sines[1]) / (rows[j].norm() * sines[1]) * rows[j]
                assert cosine(g, rows[j]) == pytest.approx(float(aim), abs=1e-9)
            targets[i, j] = (1 - beta) * aim + beta * phi
        total = total + g
    return total, targets


def test_gradvac_of_two_tasks_on_the_gradients() -> None:
    for scale in (1e-10, 1.0, 1e10):
        balancer, targets = b.GradVac(beta=0.3), torch.zeros(2, 2).double()
        turned = 0  # where PCGrad would have left them as they are
        for seed in range(60):
            rows = (random_rows(2, 4, seed) + 0.7) * scale
            expected, targets = vaccinated(rows, targets, 0.3, ((1,), (0,)))
            d = direction(balancer, rows)
            torch.testing.assert_close(d, expected, rtol=1e-9, atol=1e-10 * scale)
            torch.testing.assert_close(balancer.targets, targets, rtol=1e-9, atol=1e-12)
            turned += bool((d - rows.sum(0)).norm() > 1e-6 * scale) and bool(rows[0] @ rows[1] > 0)
        assert turned > 5


def test_gradvac_of_three_tasks_on_the_gradients() -> None:
    """In every order; the sum is of one order for each task, and so are the targets."""
    others = [list(permutations([j for j in range(3) if j != i])) for i in range(3)]
    balancer = b.GradVac(beta=0.2, seed=4)
    for seed in range(30):
        rows = random_rows(3, 3, seed)
        targets = torch.zeros(3, 3).double() if balancer.targets is None else balancer.targets
        options = [vaccinated(rows, targets, 0.2, orders) for orders in product(*others)]
        d = direction(balancer, rows)
        assert any(
            (d - total).norm() < 1e-10 * d.norm() and (balancer.targets - after).abs().max() < 1e-12
            for total, after in options
        )


@settings(max_examples=60, deadline=None)
@given(matrices | hard, st.integers(0, 2**10))
def test_gradvacs_first_step_is_pcgrads(rows: torch.Tensor, seed: int) -> None:
    near = {"rtol": 1e-6, "atol": 1e-6 * float(length(rows).max())}
    torch.testing.assert_close(direction(b.GradVac(seed=seed), rows), direction(b.PCGrad(seed=seed), rows), **near)


def test_gradvac_stays_finite_where_cosines_are_one() -> None:
    one = random_rows(1, 5, 0)
    balancer = b.GradVac(beta=0.5)
    for _ in range(100):
        torch.testing.assert_close(direction(balancer, one.repeat(3, 1)), 3 * one[0], rtol=1e-6, atol=0)
    assert balancer.targets.fill_diagonal_(1).min() > 1 - 1e-12
    # From there: opposite, at right angles, a zero row. A turned gradient is at most 1/√(1−φ̂²) times as long, 707.
    for rows in (one * torch.tensor([[1.0], [-1.0], [2.0]]), random_rows(3, 5, 1), degenerate("a zero row", 3, 2)):
        for scale in (1e-10, 1.0, 1e10):
            other = b.GradVac(beta=0.5)
            other.targets = torch.ones(3, 3).double()
            d = direction(other, rows * scale)
            assert d.isfinite().all()
            assert d.norm() <= 3 * 708**2 * length(rows).max() * scale


def test_gradvac_takes_no_cosine_with_what_is_left_by_rounding() -> None:
    """Of two opposite gradients nothing is left, so the third's cosine with it is the original one's or none."""
    for seed in range(30):
        rows = random_rows(3, 5, seed)
        rows[1] = -3.7 * rows[0]
        balancer = b.GradVac(beta=1.0, seed=seed)
        weights(balancer, rows)
        for i in range(2):
            expected = torch.stack([torch.zeros(()).double(), cosine(rows[i], rows[2])])
            assert (balancer.targets[i, 2] - expected).abs().min() < 1e-12


def run_gradnorm(balancer: b.GradNorm, norms: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    return torch.stack([balancer.weights(loss, norm.diag().square()) for norm, loss in zip(norms, losses, strict=True)])


def gradnorm_of_the_paper(
    norms: torch.Tensor, losses: torch.Tensor, alpha: float, lr: float, own: torch.Tensor
) -> torch.Tensor:
    """Its loss by autograd, over its mean norm; and each step's weights, from before it."""
    w = torch.ones(norms.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=lr)
    used = []
    for norm, loss in zip(norms, losses, strict=True):
        used.append((own * w).detach().clone())
        lengths = own * w * norm
        rates = loss / losses[0] / (loss / losses[0]).mean()
        target = (lengths.mean() * rates**alpha * own / own.mean()).detach()
        optimizer.zero_grad()
        ((lengths - target).abs().sum() / lengths.mean().detach()).backward()
        optimizer.step()
        with torch.no_grad():
            w.clamp_(min=1e-4)
            w *= own.sum() / (own * w).sum()
    return torch.stack(used)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("num_tasks", [2, 5, 40])
def test_gradnorm_is_autograd_on_the_papers_loss(num_tasks: int, scale: float) -> None:
    norms = random_rows(60, num_tasks, 1).exp()
    losses = random_rows(60, num_tasks, 2).exp()
    for own in (torch.ones(num_tasks).double(), preferences(num_tasks, 3)):
        balancer = b.GradNorm(alpha=0.7, lr=0.05)
        balancer.own = own
        found = run_gradnorm(balancer, norms * scale, losses)
        torch.testing.assert_close(found, gradnorm_of_the_paper(norms, losses, 0.7, 0.05, own), rtol=1e-7, atol=1e-9)
        assert torch.equal(found[0], own)
        assert (found > 0).all()
        torch.testing.assert_close(found.sum(1), own.sum().expand(60))
        assert (found[-1] / own).std() > 0.1


def test_gradnorm_arrives_where_it_should() -> None:
    norms = torch.tensor([1.0, 3.0, 10.0, 0.0]).double()
    """Only nearly so with α > 0: the targets' sum isn't that of the lengths, and then not all can be met."""
    for alpha, rates, near in ((0.0, [0.9, 0.1, 0.4, 0.5], 0.01), (1.5, [0.8, 0.4, 0.6, 0.5], 0.15)):
        own = torch.tensor([1.0, 2.0, 1.0, 1.0]).double()
        balancer = preferring(b.GradNorm(alpha=alpha, lr=0.005), own)
        losses = torch.stack([torch.ones(4), *[torch.tensor(rates)] * 4000]).double()
        w = run_gradnorm(balancer, norms.expand(4001, 4), losses)[-500:].mean(0)
        lengths = (w * norms)[:3] / own[:3]
        wanted = torch.tensor(rates[:3]).double() ** alpha
        torch.testing.assert_close(lengths / lengths.sum(), wanted / wanted.sum(), rtol=near, atol=0)
        assert w[3] == 1


def test_gradnorm_where_losses_or_gradients_are_zero() -> None:
    # The second task has nothing in the first batch; from then on it has a rate. None has a gradient in the third.
    losses = torch.tensor([[1.0, 0.0], [0.5, 4.0], [0.5, 2.0], [0.0, 0.0], [0.5, 2.0]]).double()
    norms = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]).double()
    balancer = b.GradNorm()
    w = run_gradnorm(balancer, norms, losses)
    assert w.isfinite().all()
    assert torch.equal(balancer.initial, torch.tensor([1.0, 4.0]).double())
    assert torch.equal(w[2], w[3])
    assert torch.equal(w[3], w[4])
    with pytest.raises(
        ArithmeticError, match=r"training rates need losses of at least 0, but the losses are \[-0.5, 1.0\]"
    ):
        balancer.weights(torch.tensor([-0.5, 1.0]).double(), torch.eye(2).double())


@pytest.mark.parametrize("stop", [0, 1, 10])
def test_gradnorm_goes_on_after_a_reload(stop: int) -> None:
    norms, losses = random_rows(20, 3, 1).exp(), random_rows(20, 3, 2).exp()
    expected = run_gradnorm(b.GradNorm(), norms, losses)
    first, second = b.GradNorm(), b.GradNorm()
    found = [run_gradnorm(first, norms[:stop], losses[:stop])] if stop else []
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    run_gradnorm(first, norms[stop:], losses[stop:])  # what was saved is not what goes on
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.cat([*found, run_gradnorm(second, norms[stop:], losses[stop:])]), expected)


def test_learned_numbers_of_two_runs_from_one_state_are_their_own() -> None:
    learned = b.GradNorm(lr=0.1).learned
    assert torch.equal(learned.at(2, torch.device("cpu")), torch.ones(2).double())
    learned.step(torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(learned.values, torch.tensor([0.9, 1.1]).double())
    state = learned.state_dict()
    learned.step(torch.tensor([1.0, 1.0]))
    others = [b.GradNorm(lr=0.1).learned for _ in range(2)]
    for other in others:
        other.load_state_dict(state)
    others[0].step(torch.tensor([1.0, 1.0]))
    others[0].values = torch.zeros(2)
    torch.testing.assert_close(others[1].values, torch.tensor([0.9, 1.1]).double())
    assert (learned.at(2, torch.device("cpu")) - torch.tensor([0.9, 1.1])).abs().min() > 0.01


@settings(max_examples=100, deadline=None)
@given(matrices, st.sampled_from([0.3, 1.0, 2.0, 5.0]), st.integers(0, 2**16))
def test_preferences_of_the_bargaining_methods(rows: torch.Tensor, alpha: float, seed: int) -> None:
    assume(well_conditioned(rows))
    p = preferences(len(rows), seed)
    w = weights(preferring(b.FairGrad(alpha=alpha), p), rows)
    torch.testing.assert_close(rows @ (w @ rows), (p / w) ** (1 / alpha), rtol=1e-5, atol=0)
    nash = weights(preferring(b.NashMTL(max_norm=None), p), rows)
    torch.testing.assert_close(rows @ (nash @ rows) * nash, p, rtol=1e-5, atol=0)
    assert (nash @ rows).norm() == pytest.approx(math.sqrt(p.sum()), rel=1e-5)
    # p U(x) = U(p^(1/(1−α)) x): a preference is the same as a longer gradient, or for α > 1 a shorter one.
    if alpha != 1:
        longer = rows * p[:, None] ** (1 / (1 - alpha))
        if well_conditioned(longer):
            torch.testing.assert_close(w @ rows, direction(b.FairGrad(alpha=alpha), longer), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [lambda: b.FairGrad(alpha=2.0), b.NashMTL])
def test_bargaining_without_a_say_is_not_taking_part(kind: Callable[[], b.Balancer]) -> None:
    rows = random_rows(4, 6, 2)
    w = weights(preferring(kind(), torch.tensor([1.0, 0.0, 2.0, 1.0]).double()), rows)
    assert w[1] == 0
    rest = weights(preferring(kind(), torch.tensor([1.0, 2.0, 1.0]).double()), rows[[0, 2, 3]])
    torch.testing.assert_close(w[[0, 2, 3]], rest)


@settings(max_examples=100, deadline=None)
@given(matrices, st.integers(0, 2**16))
def test_projections_are_in_the_ratio_of_the_preferences(rows: torch.Tensor, seed: int) -> None:
    assume(well_conditioned(rows))
    p = preferences(len(rows), seed)
    for kind in (b.ConflictFree, b.IMTLG):
        d = direction(preferring(kind(), p), rows)
        projections = rows @ d / length(rows) / p
        assert projections.min() > 0
        torch.testing.assert_close(projections, projections.mean().expand_as(projections), rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(0, 2**16))
def test_aligned_mtl_of_preferences(rows: torch.Tensor, seed: int) -> None:
    assume(well_conditioned(rows))
    p = preferences(len(rows), seed)
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    expected = p / p.sum() @ (s.min() * u @ v)
    d = direction(preferring(b.AlignedMTL(), p), rows)
    torch.testing.assert_close(d, expected, rtol=1e-6, atol=1e-6 * float(s.min()))


STEERED = ["aligned_mtl", "conflict_free", "fairgrad", "gradnorm", "imtl_g", "nash_mtl"]


def test_who_is_steered_and_by_ones_not_at_all() -> None:
    assert sorted(name for name in ALL if ALL[name]().preference == "steer") == STEERED
    for name in STEERED:
        for seed in range(10):
            rows = random_rows(4, 6, seed)
            plain, ones = ALL[name](), preferring(ALL[name](), torch.ones(4).double())
            for _ in range(3):
                assert torch.equal(weights(plain, rows), weights(ones, rows))


@pytest.mark.parametrize("kind", [b.NashMTL, lambda: b.FairGrad(alpha=1.0), b.ConflictFree, b.IMTLG])
def test_where_the_scale_of_a_task_does_not_matter_its_preference_does(kind: Callable[[], b.Balancer]) -> None:
    """A task's own weight times its loss would be lost on these methods, which is why they are steered."""
    rows = random_rows(3, 6, 5)
    p = torch.tensor([1.0, 4.0, 0.5]).double()
    for own in (torch.ones(3).double(), p):
        d = direction(preferring(kind(), own), rows)
        scaled = direction(preferring(kind(), own), rows * torch.tensor([[1e-3], [1.0], [1e4]]).double())
        assert cosine_similarity(d, scaled, dim=0) == pytest.approx(1.0, abs=1e-8)
    gains = [
        rows[1] @ d / d.norm()
        for d in (direction(preferring(kind(), own), rows) for own in (torch.ones(3).double(), p))
    ]
    assert gains[1] > 1.05 * gains[0]


TORCHJD = {
    "upgrad": lambda: aggregation.UPGrad(projector=linalg.QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10)),
    "dualproj": lambda: aggregation.DualProj(projector=linalg.QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10)),
    "mgda": lambda: aggregation.MGDA(epsilon=1e-9, max_iters=20000),
    "aligned_mtl": aggregation.AlignedMTL,
    "conflict_free": aggregation.ConFIG,
}


@pytest.mark.parametrize("name", slow_but(TORCHJD.keys() - {"mgda"}, TORCHJD))
def test_against_torchjd(name: str) -> None:
    tolerance = 3e-3 if name == "mgda" else 1e-6  # its MGDA is a Frank-Wolfe search, which nears the minimum slowly
    for seed in range(8):
        for shape in ((2, 5), (3, 4), (5, 9)):
            rows = random_rows(*shape, seed)
            expected = TORCHJD[name]()(rows)
            torch.testing.assert_close(direction(ALL[name](), rows), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["random", *KINDS])
def test_pcgrad_and_gradvac_of_two_tasks_against_torchjd(kind: str) -> None:
    ours, theirs = b.GradVac(beta=0.1), aggregation.GradVac(beta=0.1, eps=1e-300)
    for seed in range(20):
        rows = degenerate(kind, 2, seed)
        near = {"rtol": 1e-9, "atol": 1e-12 * float(length(rows).max())}
        torch.testing.assert_close(direction(b.PCGrad(), rows), aggregation.PCGrad()(rows), **near)
        torch.testing.assert_close(direction(ours, rows), theirs(rows), **near)


SOLVERS = pytest.mark.filterwarnings("ignore")  # its solvers warn of themselves


def nash_product(rows: torch.Tensor, d: torch.Tensor) -> float:
    """Returns the logarithm of the product of the gains along d, which the bargaining solution maximises."""
    rows = rows[length(rows) > 0]
    return float((rows @ d / d.norm() / length(rows)).clamp(min=0).log().sum())


@SOLVERS
@pytest.mark.parametrize("kind", ["random", "rank one", "duplicates", "few dimensions", "unlike sizes"])
def test_cagrad_against_torchjd(kind: str) -> None:
    """Its worst gain is never better by more than its solver's tolerance, of the longest gradient; see below."""
    pytest.importorskip("cvxpy")
    near = 0
    for seed in range(10):
        rows = degenerate(kind, 2 + seed % 4, seed)
        ours, theirs = direction(b.CAGrad(), rows), aggregation.CAGrad(c=0.5, norm_eps=1e-9)(rows)
        assert (rows @ ours).min() >= (rows @ theirs).min() - 1e-6 * length(rows).max() ** 2
        near += bool((ours - theirs).norm() <= 1e-3 * ours.norm())
    assert near >= 8


@SOLVERS
def test_cagrad_where_torchjd_is_wrong() -> None:
    pytest.importorskip("cvxpy")
    # With a zero row its g_w is zero and it stops all tasks; the three others can all gain.
    rows = degenerate("a zero row", 4, 0)
    assert aggregation.CAGrad(c=0.5)(rows).norm() == 0
    d = direction(b.CAGrad(), rows)
    assert (rows @ d)[length(rows) > 0].min() > 0.9 * rows.mean(0).norm()
    # A gradient of 1e-6 beside one of 1e6 is below its tolerance: it stops there too, where all four can gain.
    rows = random_rows(4, 6, 0) * torch.tensor([[1e-6], [1.0], [1e6], [1.0]]).double()
    assert aggregation.CAGrad(c=0.5)(rows).norm() == 0
    assert (rows @ direction(b.CAGrad(), rows) > 0).all()


@SOLVERS
def test_nash_mtl_against_torchjd() -> None:
    pytest.importorskip("cvxpy")
    for seed in range(10):
        for num_tasks, num_parameters in ((2, 5), (3, 4), (5, 9)):
            rows = random_rows(num_tasks, num_parameters, seed)
            theirs = aggregation.NashMTL(n_tasks=num_tasks)(rows)
            d = direction(b.NashMTL(), rows)
            assert nash_product(rows, d) >= nash_product(rows, theirs) - 1e-9
            assert cosine(d, theirs) > 1 - 1e-4
            assert d.norm() == pytest.approx(float(theirs.norm()))


@SOLVERS
def test_nash_mtl_where_torchjd_is_wrong() -> None:
    """Its solver fails, which it hides, and equal weights are left: with a zero row always, with unlike sizes often."""
    pytest.importorskip("cvxpy")
    for kind, seed in (("a zero row", 1), ("a zero row", 2), ("unlike sizes", 3)):
        rows = degenerate(kind, 4, seed)
        theirs = aggregation.NashMTL(n_tasks=4)(rows)
        assert cosine(theirs, rows.sum(0)) > 0.99999
        w = weights(b.NashMTL(max_norm=None), rows)
        moving = length(rows) > 0
        torch.testing.assert_close((rows @ (w @ rows) * w)[moving], torch.ones(int(moving.sum())).double())
        assert nash_product(rows, w @ rows) > nash_product(rows, theirs) + 0.5


def test_imtl_g_against_torchjd_where_the_two_agree() -> None:
    compared = 0
    for seed in range(50):
        rows = random_rows(3, 5, seed)
        expected = aggregation.IMTLG()(rows)
        if (rows @ expected > 0).all() and expected.norm() <= length(rows).max():
            torch.testing.assert_close(direction(b.IMTLG(), rows), expected, rtol=1e-6, atol=1e-8)
            compared += 1
    assert compared > 25


@pytest.mark.parametrize("name", list(ALL))
def test_hard_cases_give_finite_bounded_weights(name: str) -> None:
    base = random_rows(4, 6, 7)
    cases = {
        "rank one": base[:1].repeat(4, 1) * torch.tensor([[1.0], [2.0], [-0.5], [3.0]]).double(),
        "duplicates": base[[0, 0, 1, 1]],
        "a zero row": torch.cat([base[:3], torch.zeros(1, 6).double()]),
        "all zero": torch.zeros(4, 6).double(),
        "opposite": torch.stack([base[0], -base[0]]),
        "unlike sizes": base * torch.tensor([[1e-6], [1.0], [1e6], [1.0]]).double(),
        "more tasks than parameters": random_rows(10, 2, 8),
        "one task": base[:1],
    }
    for case, rows in cases.items():
        for scale in (1e-10, 1.0, 1e10):
            w = weights(ALL[name](), rows * scale)
            assert w.isfinite().all(), (case, scale)
            if name != "fairgrad":  # its direction grows without bound as a stationary point comes near
                longest = max(1.0, float(length(rows * scale).sum())) * (1.5 if name == "cagrad" else 1.001)
                assert (w @ rows * scale).norm() <= longest, (case, scale)


@pytest.mark.parametrize("name", [name for name in ALL if name not in RANDOM])
@settings(max_examples=40, deadline=None)
@given(matrices, st.randoms(use_true_random=False))
def test_order_of_tasks_and_rotation_do_not_matter(name: str, rows: torch.Tensor, random) -> None:
    assume(well_conditioned(rows))
    d = direction(ALL[name](), rows)
    near = {"rtol": 1e-5, "atol": 1e-6 * float(d.norm())}
    order = random.sample(range(len(rows)), len(rows))
    torch.testing.assert_close(direction(ALL[name](), rows[order]), d, **near)
    rotation = torch.linalg.qr(random_rows(rows.shape[1], rows.shape[1], 1))[0]
    torch.testing.assert_close(direction(ALL[name](), rows @ rotation), d @ rotation, **near)


@pytest.mark.parametrize("name", list(ALL))
def test_one_task_gives_its_own_direction(name: str) -> None:
    rows = random_rows(1, 4, 2)
    assert cosine_similarity(direction(ALL[name](), rows), rows[0], dim=0) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [b.PCGrad, b.GradVac])
def test_draws_are_its_own_and_go_on_after_a_reload(kind: type[b.Balancer]) -> None:
    rows = [random_rows(5, 3, seed) for seed in range(20)]
    first = kind(seed=3)
    draws = torch.get_rng_state()
    expected = [weights(first, r) for r in rows]
    assert torch.equal(draws, torch.get_rng_state())
    second, third = kind(seed=3), kind(seed=9)
    found = [weights(second, r) for r in rows[:10]]
    third.load_state_dict(second.state_dict())
    found += [weights(third, r) for r in rows[10:]]
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
