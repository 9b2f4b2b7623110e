"""Balancers that are functions of the Gramian: optimality conditions, identities, invariances, TorchJD, hard cases."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity
from torchjd import aggregation, linalg

from mtl import balancers as b

ALL = {
    "aligned_mtl": b.AlignedMTL,
    "conflict_free": b.ConflictFree,
    "dualproj": b.DualProj,
    "fairgrad": lambda: b.FairGrad(alpha=2.0),
    "imtl_g": b.IMTLG,
    "mgda": b.MGDA,
    "nash_mtl": b.NashMTL,
    "pcgrad": b.PCGrad,
    "upgrad": b.UPGrad,
}
LOSSES = torch.ones(40, dtype=torch.float64)


def weights(balancer: b.Balancer, rows: torch.Tensor) -> torch.Tensor:
    return balancer.weights(LOSSES[: len(rows)], rows @ rows.T)


def direction(balancer: b.Balancer, rows: torch.Tensor) -> torch.Tensor:
    return weights(balancer, rows) @ rows


def random_rows(num_tasks: int, num_parameters: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_tasks, num_parameters, generator=generator, dtype=torch.float64)


def length(rows: torch.Tensor) -> torch.Tensor:
    return rows.norm(dim=1)


def well_conditioned(rows: torch.Tensor) -> bool:
    return len(rows) <= rows.shape[1] and np.linalg.cond((rows / length(rows)[:, None]).numpy()) < 1e3


SCALES = st.sampled_from([1e-10, 1e-4, 1.0, 1e4, 1e10])
matrices = st.builds(random_rows, st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**20), SCALES)


@settings(max_examples=150, deadline=None)
@given(matrices)
def test_upgrad_and_dualproj_conflict_with_no_task(rows: torch.Tensor) -> None:
    for balancer in (b.UPGrad(), b.DualProj()):
        w = weights(balancer, rows)
        d = w @ rows
        assert (rows @ d >= -1e-11 * length(rows) * length(rows).mean()).all()
        assert (w >= 1 / len(rows) - 1e-12).all()
    # KKT of the mean's projection: a gradient gains weight only where d is at right angles to it.
    added = weights(b.DualProj(), rows) - 1 / len(rows)
    assert (added * (rows @ direction(b.DualProj(), rows))).abs().max() <= 1e-10 * length(rows).max() ** 2


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


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**20), SCALES)
def test_two_tasks_upgrad_is_half_of_pcgrad(seed: int, scale: float) -> None:
    rows = random_rows(2, 5, seed, scale)
    half = direction(b.PCGrad(), rows) / 2
    torch.testing.assert_close(direction(b.UPGrad(), rows), half, rtol=1e-9, atol=1e-12 * scale)


TORCHJD = {
    "upgrad": lambda: aggregation.UPGrad(projector=linalg.QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10)),
    "dualproj": lambda: aggregation.DualProj(projector=linalg.QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10)),
    "mgda": lambda: aggregation.MGDA(epsilon=1e-9, max_iters=20000),
    "aligned_mtl": aggregation.AlignedMTL,
    "conflict_free": aggregation.ConFIG,
}


@pytest.mark.parametrize("name", list(TORCHJD))
def test_against_torchjd(name: str) -> None:
    tolerance = 3e-3 if name == "mgda" else 1e-6  # its MGDA is a Frank-Wolfe search, which nears the minimum slowly
    for seed in range(8):
        for shape in ((2, 5), (3, 4), (5, 9)):
            rows = random_rows(*shape, seed)
            expected = TORCHJD[name]()(rows)
            torch.testing.assert_close(direction(ALL[name](), rows), expected, rtol=tolerance, atol=tolerance)


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
                assert (w @ rows * scale).norm() <= max(1.0, float(length(rows * scale).sum())) * 1.001, (case, scale)


@pytest.mark.parametrize("name", [name for name in ALL if name != "pcgrad"])
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


def test_pcgrads_draws_are_its_own_and_go_on_after_a_reload() -> None:
    rows = [random_rows(5, 3, seed) for seed in range(20)]
    first = b.PCGrad(seed=3)
    draws = torch.get_rng_state()
    expected = [weights(first, r) for r in rows]
    assert torch.equal(draws, torch.get_rng_state())
    second, third = b.PCGrad(seed=3), b.PCGrad(seed=9)
    found = [weights(second, r) for r in rows[:10]]
    third.load_state_dict(second.state_dict())
    found += [weights(third, r) for r in rows[10:]]
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
