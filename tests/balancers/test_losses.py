"""Balancers that use only the losses: against autograd on the formula that each descends, and against TorchJD."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd import scalarization

from mtl import balancers as b

positive = st.lists(st.floats(1e-10, 1e10), min_size=2, max_size=40).map(lambda v: torch.tensor(v, dtype=torch.float64))


def preferring(balancer: b.Balancer, own: torch.Tensor) -> b.Balancer:
    balancer.own = own
    return balancer


def descends(formula: Callable[[torch.Tensor], torch.Tensor], losses: torch.Tensor) -> torch.Tensor:
    """The weights with which the formula's gradient goes down each loss."""
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(formula(losses), losses)[0]


def some(num_tasks: int, seed: int) -> torch.Tensor:
    return torch.rand(num_tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05


@settings(max_examples=100, deadline=None)
@given(positive, st.integers(0, 2**16))
def test_gls_si_and_uw_so_are_what_they_say(losses: torch.Tensor, seed: int) -> None:
    p = some(len(losses), seed)
    near = {"rtol": 1e-10, "atol": 0}
    expected = descends(lambda v: ((p * v.log()).sum() / p.sum()).exp(), losses)
    torch.testing.assert_close(preferring(b.GLS(), p).weights(losses, None), expected, **near)
    expected = descends(lambda v: (p * v.log()).sum(), losses)
    torch.testing.assert_close(preferring(b.SI(), p).weights(losses, None), expected, **near)
    inverse = (1 / losses).tolist()
    top = max(inverse)
    shares = [math.exp((value - top) / 3.0) for value in inverse]
    expected = p * torch.tensor(shares, dtype=torch.float64) / sum(shares)
    torch.testing.assert_close(
        preferring(b.UWSO(temperature=3.0), p).weights(losses, None), expected, rtol=1e-6, atol=1e-300
    )


@settings(max_examples=60, deadline=None)
@given(positive, st.integers(0, 2**16), st.sampled_from([0.1, 1.0, 5.0]))
def test_stch_before_and_after_its_warm_up(losses: torch.Tensor, seed: int, mu: float) -> None:
    p = some(len(losses), seed)
    balancer = preferring(b.STCH(mu=mu, warmup_epochs=2), p)
    started = descends(lambda v: (p * v.log()).sum() / p.sum(), losses)
    epochs = [[losses * 3, losses * 5], [losses * 2, losses * 4, losses * 9]]
    for epoch in epochs:
        for step in epoch:
            torch.testing.assert_close(balancer.weights(losses, None), started, rtol=1e-12, atol=0)
            balancer.after(step, None)
        balancer.epoch_end()
    nadir = losses * 5  # the mean of the warm-up's last epoch
    expected = descends(lambda v: mu * torch.logsumexp((p * v / nadir).log() / mu, 0), losses)
    torch.testing.assert_close(balancer.weights(losses, None), expected, rtol=1e-8, atol=1e-300)
    balancer.after(losses * 100, None)
    balancer.epoch_end()
    torch.testing.assert_close(balancer.weights(losses, None), expected, rtol=1e-8, atol=1e-300)  # the nadir stays


def test_geometric_mean_and_stch_against_torchjd() -> None:
    for seed in range(20):
        losses = some(2 + seed % 5, seed)
        expected = descends(scalarization.GeometricMean(), losses)
        torch.testing.assert_close(b.GLS().weights(losses, None), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("own", [None, torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)])
@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        (b.UW, lambda s, losses: 0.5 * (-s).exp() * losses + 0.5 * s),
        (b.IMTLL, lambda s, losses: s.exp() * losses - s),
    ],
)
def test_learned_weights_follow_adam_on_the_papers_loss(kind, formula, own) -> None:
    balancer = preferring(kind(lr=0.05), own)
    p = torch.ones(3, dtype=torch.float64) if own is None else own
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.05)
    for seed in range(30):
        losses = some(3, seed)
        mine = balancer.weights(torch.full((3,), torch.nan, dtype=torch.float64), None)
        at = losses.clone().requires_grad_()
        total = (p * formula(s, at)).sum()
        adam.zero_grad()
        total.backward()
        torch.testing.assert_close(mine, at.grad, rtol=1e-9, atol=0)
        adam.step()
        balancer.after(losses, None)
    assert (mine - balancer.__class__().weights(losses, None) * p).abs().min() > 0.01  # they did move


@pytest.mark.parametrize("kind", [b.UW, b.IMTLL])
def test_learned_weights_come_to_rest_where_the_losses_scale_makes_no_difference(kind) -> None:
    losses = torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64)
    balancer = kind(lr=0.05)
    for _ in range(2000):
        balancer.weights(losses, None)
        balancer.after(losses, None)
    expected = (0.5 if kind is b.UW else 1.0) / losses
    torch.testing.assert_close(balancer.weights(losses, None), expected, rtol=1e-3, atol=0)


def test_dwa_by_hand() -> None:
    """Epoch means 2 and 4 for one task, 3 and 3 for the other: ratios 2 and 1, halved by the temperature."""
    balancer = b.DWA(temperature=2.0)
    nan = torch.full((2,), torch.nan, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    epochs = [[[1.0, 3.0], [3.0, 3.0]], [[4.0, 2.0], [4.0, 4.0], [4.0, 3.0]]]
    for epoch in epochs:
        for losses in epoch:
            assert torch.equal(balancer.weights(nan, None), ones)
            balancer.after(torch.tensor(losses, dtype=torch.float64), None)
        balancer.epoch_end()
    first = 2 * math.exp(1.0) / (math.exp(1.0) + math.exp(0.5))
    expected = torch.tensor([first, 2 - first], dtype=torch.float64)
    torch.testing.assert_close(balancer.weights(nan, None), expected, rtol=1e-12, atol=0)
    balancer.epoch_end()  # an epoch without a step changes nothing
    torch.testing.assert_close(balancer.weights(nan, None), expected, rtol=1e-12, atol=0)


def test_rlw_draws_a_softmax_of_normals_from_its_own_generator() -> None:
    nan = torch.full((3,), torch.nan, dtype=torch.float64)
    state = torch.get_rng_state()
    balancer, draws = b.RLW(seed=4), []
    for _ in range(4000):
        draws.append(balancer.weights(nan, None))
        assert torch.equal(draws[-1], balancer.weights(nan, None))  # one draw a step
        balancer.after(nan, None)
    assert torch.equal(state, torch.get_rng_state())
    drawn = torch.stack(draws)
    torch.testing.assert_close(drawn.sum(1), torch.full((4000,), 3.0, dtype=torch.float64), rtol=1e-12, atol=0)
    gaps = (drawn[:, 0] / drawn[:, 1]).log()  # the difference of two normals: mean 0, variance 2
    assert gaps.mean().abs() < 4 * math.sqrt(2 / 4000)
    assert abs(gaps.var() - 2.0) < 0.2


def test_famo_by_hand_and_by_autograd() -> None:
    """Its two-task step: weights c·z/L, and Adam down the softmax's Jacobian times the change of the log-losses."""
    balancer = b.FAMO(lr=0.025, weight_decay=1e-3)
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi], lr=0.025, weight_decay=1e-3)
    for seed in range(25):
        before, after = some(3, seed), some(3, seed + 100)
        z = xi.softmax(0)
        at = before.clone().requires_grad_()
        scale = 1 / (z / before).sum()
        (expected,) = torch.autograd.grad((scale * z * at.log()).sum().detach() + (scale * z).detach() @ at.log(), at)
        torch.testing.assert_close(balancer.weights(before, None), expected, rtol=1e-10, atol=0)
        assert expected.sum() == pytest.approx(1.0)
        adam.zero_grad()
        xi.grad = torch.autograd.grad(xi.softmax(0) @ (before.log() - after.log()), xi)[0]
        adam.step()
        balancer.after(before, after)
    assert (xi.softmax(0) - 1 / 3).abs().max() > 0.01


def test_famo_gives_more_weight_to_the_task_that_fell_less() -> None:
    balancer = b.FAMO()
    losses = torch.ones(2, dtype=torch.float64)
    before = balancer.weights(losses, None)
    balancer.after(losses, losses * torch.tensor([0.5, 0.9], dtype=torch.float64))
    after = balancer.weights(losses, None)
    assert after[1] > before[1]
    assert after[0] < before[0]


@settings(max_examples=50, deadline=None)
@given(positive, st.sampled_from([1e-10, 1e-3, 1e10]))
def test_scale_of_a_loss_makes_no_difference_where_none_is_promised(losses: torch.Tensor, factor: float) -> None:
    """Multiplying one task's loss by a factor multiplies its weight by the inverse: its gradient's share stays."""
    scaled = losses.clone()
    scaled[0] *= factor
    for balancer in (b.SI(), b.GLS(), b.FAMO()):
        share, scaled_share = (balancer.weights(v, None) * v for v in (losses, scaled))
        torch.testing.assert_close(share / share.sum(), scaled_share / scaled_share.sum(), rtol=1e-8, atol=1e-300)


def test_a_loss_of_zero_is_at_its_minimum_and_left_out() -> None:
    losses = torch.tensor([2.0, 0.0, 8.0], dtype=torch.float64)
    rest = losses[[0, 2]]
    for kind in (b.SI, b.GLS, b.FAMO):
        weights = kind().weights(losses, None)
        assert weights[1] == 0
        torch.testing.assert_close(weights[[0, 2]], kind().weights(rest, None))
    famo = b.FAMO()
    famo.weights(losses, None)
    famo.after(losses, losses.flip(0) * 0)
    assert famo.weights(losses, None).isfinite().all()
    for kind in (b.SI, b.GLS, b.STCH, b.UWSO, b.FAMO):
        assert kind().weights(torch.zeros(3, dtype=torch.float64), None).isfinite().all()


@pytest.mark.parametrize("kind", [b.SI, b.GLS, b.STCH, b.UWSO, b.FAMO])
def test_losses_that_the_method_is_not_defined_for_have_no_finite_weights(kind) -> None:
    assert not kind().weights(torch.tensor([0.5, -1.0], dtype=torch.float64), None).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b.DWA(temperature=0), "temperature is 0"),
        (lambda: b.UWSO(temperature=-1), "temperature is -1"),
        (lambda: b.STCH(mu=0), "mu is 0"),
        (lambda: b.STCH(warmup_epochs=0), "warmup_epochs is 0"),
        (lambda: b.UW(lr=0), "lr is 0"),
        (lambda: b.MoCo(beta=0), "beta 0 must be"),
        (lambda: b.DBMTL(beta=1), "beta 1 must be"),
        (lambda: b.ExcessMTL(eta=0), "eta is 0"),
        (lambda: b.TorchJD(aggregator="Nothing"), "'Nothing' is not one of AlignedMTL, "),
    ],
)
def test_what_cannot_be(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
