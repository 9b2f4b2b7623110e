"""Steps whose weights come from the Gramian: against rows, Gramian and combination written out by hand."""

import pytest
import torch
from conftest import batches, problem
from torch import nn

import mtl
from mtl.choices import PASSES


class Fixed(mtl.balancers.Balancer):
    """A balancer that records its arguments and returns fixed weights."""

    def __init__(self, weights: list[float]) -> None:
        self.given: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.answer = torch.tensor(weights, dtype=torch.float64)

    def weights(self, losses: torch.Tensor, gramian: torch.Tensor | None) -> torch.Tensor:
        self.given.append((losses, gramian))
        return self.answer


def by_hand(weights: list[float]):
    """Losses, rows over the trunk, and each parameter's gradient by task, from one forward written out."""
    model, tasks = problem(weights=weights)
    (batch,) = batches(1)
    torch.manual_seed(3)
    features = model.trunk(batch["x"])
    losses = [nn.functional.cross_entropy(model.heads[t.name](features), batch[t.target]) for t in tasks]
    named = dict(model.named_parameters())
    gradients = [
        dict(
            zip(
                named,
                torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True),
                strict=True,
            )
        )
        for loss in losses
    ]
    rows = torch.stack(
        [torch.cat([g.flatten() for n, g in each.items() if n.startswith("trunk")]) for each in gradients]
    )
    return torch.stack(losses).detach(), rows, gradients


@pytest.mark.parametrize("own", [[1.0, 1.0, 1.0], [0.5, 2.0, 3.0]])
@pytest.mark.parametrize("kind", list(PASSES))
def test_gramian_weights_and_combination(kind: str, own: list[float]) -> None:
    losses, rows, gradients = by_hand(own)
    model, tasks = problem(weights=own)
    balancer = Fixed([0.25, -1.0, 4.0])
    torch.manual_seed(3)
    result = mtl.Step(model, tasks, balancer=balancer, passes=kind).backward(batches(1)[0], measure=True)
    ((given, gramian),) = balancer.given
    preference = torch.tensor(own, dtype=torch.float64)
    torch.testing.assert_close(given, losses * preference, rtol=1e-12, atol=0)
    weighted = rows * preference[:, None]
    torch.testing.assert_close(gramian, weighted @ weighted.T, rtol=1e-10, atol=1e-13)
    applied = [w * o for w, o in zip([0.25, -1.0, 4.0], own, strict=True)]
    assert [w.item() for w in result.weights.values()] == pytest.approx(applied)
    for name, parameter in model.named_parameters():
        factors = applied if name.startswith("trunk") else own  # a head's gradient is its own task's alone
        expected = sum(f * each[name] for f, each in zip(factors, gradients, strict=True) if each[name] is not None)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-13, msg=name)
    for index, task in enumerate(tasks):
        norm = torch.cat([g.flatten() for g in gradients[index].values() if g is not None]).norm()
        torch.testing.assert_close(result.grad_norms[task.name], norm, rtol=1e-11, atol=0)
    expected = nn.functional.cosine_similarity(rows[0], rows[2], dim=0)
    torch.testing.assert_close(result.cosines["t0", "t2"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", list(PASSES))
def test_measuring_changes_no_bit_and_buffers_move_once(kind: str) -> None:
    ends = []
    for measure in (False, True):
        model, tasks = problem()
        step = mtl.Step(
            model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=mtl.balancers.UPGrad(), passes=kind
        )
        torch.manual_seed(5)
        for batch in batches(4):
            step(batch, measure=measure)
        ends.append((model.state_dict(), torch.get_rng_state()))
    (plain, draws), (measured, measured_draws) = ends
    assert torch.equal(draws, measured_draws)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    assert int(plain["trunk.norm.num_batches_tracked"]) == 4


@pytest.mark.parametrize("kind", list(PASSES))
def test_equal_weights_from_the_gramian_are_the_plain_sum(kind: str) -> None:
    gradients = []
    for balancer in (mtl.balancers.Equal(), Fixed([1.0, 1.0, 1.0])):
        model, tasks = problem(weights=[1.0, 0.5, 2.0])
        torch.manual_seed(5)
        mtl.Step(model, tasks, balancer=balancer, passes=kind).backward(batches(1)[0])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)


def test_gramian_is_summed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The balancer and the measured cosines take the same one."""
    calls: list[int] = []
    original = mtl.gradients.rows.gramian
    monkeypatch.setattr(mtl.gradients.rows, "gramian", lambda rows: (calls.append(1), original(rows))[1])
    model, tasks = problem()
    mtl.Step(model, tasks, balancer=mtl.balancers.MGDA()).backward(batches(1)[0], measure=True)
    assert len(calls) == 1


def test_rows_are_not_copied() -> None:
    """What autograd wrote for the first task is what holds the combination in the end."""
    model, tasks = problem()
    step = mtl.Step(model, tasks, balancer=mtl.balancers.MGDA(), passes="sequential")
    pointers: list[int] = []
    take = mtl.gradients.rows.Rows.take

    def noted(self, task: str) -> None:
        pointers.append(model.trunk.conv.weight.grad.data_ptr())
        take(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mtl.gradients.rows.Rows, "take", noted)
        step.backward(batches(1)[0])
    assert len(set(pointers)) == 3
    assert model.trunk.conv.weight.grad.data_ptr() == pointers[0]


def test_rows_that_come_through_the_features_are_not_copied_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `autograd.grad` gave is the row, and the first one holds the combination."""
    model, tasks = problem()
    given, kept = [], []
    laid_out = mtl.gradients.at_features._laid_out

    def noted(gradient, parameter, there=None):
        given.append(gradient.data_ptr())
        result = laid_out(gradient, parameter, there)
        kept.append(result.data_ptr())
        return result

    monkeypatch.setattr(mtl.gradients.at_features, "_laid_out", noted)
    mtl.Step(
        model, tasks, balancer=mtl.balancers.MGDA(), passes="shared", gradients=mtl.Gradients(source="rows")
    ).backward(batches(1)[0])
    assert given == kept
    assert len(kept) == 3 * len(list(model.trunk.parameters()))
    assert {p.grad.data_ptr() for p in model.trunk.parameters()} == set(kept[: len(kept) // 3])


def test_fp16_gramian_is_that_of_unscaled_gradients_and_overflow_skips_the_step() -> None:
    norms = {}
    for precision in ("fp32", "fp16"):
        model, tasks = problem(2, dtype=torch.float32, dropout=0.0)
        balancer = Fixed([1.0, 1.0])
        step = mtl.Step(
            model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=balancer, precision=precision
        )
        torch.manual_seed(2)
        good, bad = batches(2, 2, size=64, dtype=torch.float32)
        assert step(good).taken
        norms[precision] = balancer.given[0][1].diagonal().sqrt()
    torch.testing.assert_close(norms["fp16"], norms["fp32"], rtol=0.05, atol=0)
    bad["x"][0] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    assert not step(bad).taken
    assert len(balancer.given) == 1  # the balancer isn't asked about gradients that overflowed
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_cannot_be_balanced() -> None:
    model, tasks = problem(2)
    (batch,) = batches(1, 2)
    tasks[1].loss = lambda prediction, target: prediction.sum() * float("nan")
    with pytest.raises(mtl.UserError, match="task 't1': its loss is nan. Try"):
        mtl.Step(model, tasks, balancer=mtl.balancers.MGDA()).backward(batch)
    model, tasks = problem(2)
    model.freeze(["trunk"])
    with pytest.raises(mtl.UserError, match="the tasks share no parameter, so there is nothing to balance"):
        mtl.Step(model, tasks, balancer=mtl.balancers.MGDA()).backward(batch)
    balancer = Fixed([1.0, 1.0])
    balancer.needs = "luck"
    with pytest.raises(mtl.UserError, match="Fixed: needs is 'luck'"):
        mtl.Step(model, tasks, balancer=balancer)
