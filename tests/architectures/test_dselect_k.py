"""DSelect-k: the smooth-step function, selectors, and the entropy in the training loss."""

import itertools
from typing import Any

import pytest
import torch
from every import NAMES, batches, mlp
from torch import Tensor, nn

import mtl
from mtl.architectures import DSelectK
from mtl.architectures.dselect_k import StaticGate, smooth_step
from mtl.batch import take


def test_smooth_step_by_hand() -> None:
    t = torch.tensor([-5, -1, -0.5, 0, 0.25, 1, 3], dtype=torch.float64, requires_grad=True)
    # gamma = 2: -t³/4 + 3t/4 + 1/2
    expected = [0, 0, 0.03125 - 0.375 + 0.5, 0.5, 0.5 + 0.1875 - 0.00390625, 1, 1]
    values = smooth_step(t, 2.0)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    (slope,) = torch.autograd.grad(values.sum(), t)
    torch.testing.assert_close(
        slope, torch.tensor([0, 0, 0.75 * 0.75, 0.75, 0.75 * (1 - 0.0625), 0, 0], dtype=torch.float64)
    )


@pytest.mark.parametrize("experts", [2, 3, 4, 5, 8])
def test_each_code_selects_one_expert(experts: int) -> None:
    gate = StaticGate(experts, k=1, gamma=1.0)
    seen = []
    for bits in itertools.product([0, 1], repeat=gate.bits):
        gate.z.data = torch.tensor([bits]) - 0.5
        number = sum(bit << place for place, bit in enumerate(bits))
        expected = torch.zeros(experts)
        expected[number if number < experts else number - experts] = 1
        assert torch.equal(gate(None), expected)
        seen.append(int(gate(None).argmax()))
    assert set(seen) == set(range(experts))


def tasks(loss: nn.Module | None = None, outputs: int = 1, **options: Any) -> list[mtl.Task]:
    torch.manual_seed(0)
    loss = loss or nn.BCEWithLogitsLoss()
    return [mtl.Task(name, head=mtl.heads.Linear(6, outputs), loss=loss, target=name, **options) for name in NAMES]


def built(made: list[mtl.Task], **options: Any) -> DSelectK:
    torch.manual_seed(0)
    model = DSelectK(mlp, made, inputs=["image"], experts=4, **options).double()
    model.eval()(batches(1)[0])
    return model.train()


def entropy(model: DSelectK, task: str, x: Tensor) -> Tensor:
    """Returns the entropy by its definition, from products over bits in a loop."""
    gate = model.branches[task].gate
    z = gate.linear_z(x.flatten(1)).view(len(x), gate.k, gate.bits)
    total = torch.zeros(len(x), dtype=x.dtype)
    s = -2 * z**3 + 1.5 * z + 0.5
    assert z.abs().max() < 0.5
    for number in range(4):
        r = torch.ones(len(x), gate.k, dtype=x.dtype)
        for bit in range(2):
            r = r * (s[..., bit] if number >> bit & 1 else 1 - s[..., bit])
        total -= (r * r.log()).sum(1)
    return total


@pytest.mark.parametrize("kind", ["joint", "sequential", "shared"])
def test_the_entropy_is_a_part_of_the_training_loss(kind: str) -> None:
    """It is averaged over the samples that have a label, in the value and in the gradient."""
    made = tasks()
    model = built(made, entropy=0.7, per_sample=True)
    (batch,) = batches(1, missing=True)
    result = mtl.Step(model, made, passes=kind).backward(batch)
    total = torch.zeros((), dtype=torch.float64)
    for name, prediction in model(batch).items():
        here = ~batch[name].isnan()
        loss = nn.functional.binary_cross_entropy_with_logits(prediction[here], batch[name][here])
        loss = loss + 0.7 * entropy(model, name, batch["image"])[here].mean()
        torch.testing.assert_close(result.losses[name], loss.detach(), rtol=1e-5, atol=0)
        total = total + loss
    named = dict(model.named_parameters())
    for (name, p), gradient in zip(named.items(), torch.autograd.grad(total, list(named.values())), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7, msg=name)
    plain = mtl.Step(model.eval(), made, passes=kind).backward(batch)
    assert all(plain.losses[name] < result.losses[name] - 0.5 for name in NAMES)


class RMSE(nn.Module):
    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean().sqrt()


@pytest.mark.parametrize(
    "made",
    [
        lambda: tasks(),
        lambda: tasks(nn.CrossEntropyLoss(weight=torch.tensor([0.1, 3.0]).double()), 2),
        lambda: tasks(RMSE(), whole_batch=True),
    ],
    ids=["missing labels", "class weights", "whole batch"],
)
@pytest.mark.parametrize("balancer", ["Equal", "MGDA"])
def test_the_entropy_in_micro_batches(made: Any, balancer: str) -> None:
    (batch,) = batches(1, missing=True)
    states = []
    for pieces in (batch, [take(batch, 8, slice(0, 2)), take(batch, 8, slice(2, 8))]):
        own = made()
        if isinstance(own[0].loss, nn.CrossEntropyLoss):
            parts = pieces if isinstance(pieces, list) else [pieces]
            parts = [{**p, **{n: p[n].nan_to_num(-100).long() for n in NAMES}} for p in parts]
            pieces = parts if isinstance(pieces, list) else parts[0]
        model = built(own, entropy=5.0, per_sample=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        result = mtl.Step(model, own, optimizer, balancer=getattr(mtl.balancers, balancer)())(pieces)
        states.append({**model.state_dict(), **result.losses})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key].to(value.dtype), value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_the_entropy_makes_each_selector_choose_one_expert(factor: float) -> None:
    made = tasks()
    model = built(made, entropy=factor)
    step = mtl.Step(model, made, torch.optim.SGD(model.parameters(), lr=0.05))
    (batch,) = batches(1)
    for _ in range(150):
        step(batch)
    for weights in model.eval().gate_weights(batch).values():
        chosen = int((weights > 0).sum())
        assert chosen <= 2 if factor else chosen == 4
