"""Losses of normals and depths, by hand."""

import math

import pytest
import torch
from torch import nn

import mtl
from mtl.labels import label_mask
from mtl.losses import CosineDistance, InverseL1, ScaleInvariant
from mtl.step.forward import loss_of

nan = math.nan


def task(loss: nn.Module, **options: object) -> mtl.Task:
    return mtl.Task("t", head=nn.Identity(), loss=loss, target="y", **{"missing": True, **options})


def test_cosine_distance_of_normals_that_are_there() -> None:
    a = torch.tensor([[[0.0, 3.0, 1.0]], [[0.0, 0.0, 1.0]], [[2.0, 0.0, 1.0]]])[None]  # (1, 3, 1, 3)
    y = torch.tensor([[[0.0, 1.0, nan]], [[0.0, 1.0, nan]], [[1.0, 0.0, nan]]])[None]
    wanted = ((1 - 1) + (1 - 1 / math.sqrt(2))) / 2
    by_nan = loss_of(task(CosineDistance(), mean_over="positions"), a, {"y": y})
    assert float(by_nan) == pytest.approx(wanted, rel=1e-6)
    mask = torch.tensor([[[[True, True, False]]]])  # one channel
    masked = loss_of(task(CosineDistance(), mean_over="positions", mask="m"), a, {"y": y.nan_to_num(0), "m": mask})
    assert float(masked) == pytest.approx(wanted, rel=1e-6)


def test_inverse_depths() -> None:
    y, p = torch.tensor([[2.0, nan, 4.0]]), torch.tensor([[1.0, 5.0, 0.5]])
    assert float(loss_of(task(InverseL1()), p, {"y": y})) == pytest.approx((0.5 + 0.25) / 2)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_scale_invariant_error_over_pairs_of_pixels(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(3, 2, 4, generator=generator, dtype=torch.float64) + 0.5
    p = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y[0, 0, 1], y[1, 1, 2], y[2] = nan, 0.0, nan
    loss = ScaleInvariant(weight)(p, y)
    wanted = 0.0
    for image in (0, 1):
        d = [
            a - math.log(b)
            for a, b in zip(p[image].flatten().tolist(), y[image].flatten().tolist(), strict=True)
            if b > 0
        ]
        pairs = sum((a - b) ** 2 for a in d for b in d) / (2 * len(d) ** 2)  # the paper's equation 2, for weight 1
        wanted += weight * pairs + (1 - weight) * sum(a**2 for a in d) / len(d)
    assert loss.item() == pytest.approx(wanted / 3, rel=1e-12)
    loss.backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()
    assert not p.grad[y.isnan() | (y == 0)].any()
    with pytest.raises(ValueError, match="weight is 2; it must be from 0 to 1"):
        ScaleInvariant(2)


def test_a_mask_of_one_channel() -> None:
    mask = torch.tensor([[[[1, 0]]], [[[0, 1]]]])  # (2, 1, 1, 2)
    channels, none = torch.zeros(2, 3, 1, 2), torch.zeros(2, 1, 2)
    for loss in (nn.L1Loss(), nn.MSELoss()):
        wanted = torch.tensor([[[[True, False]]] * 3, [[[False, True]]] * 3]).view(2, 3, 1, 2)
        assert torch.equal(label_mask(task(loss, mask="m"), {"y": channels, "m": mask}), wanted)
        assert torch.equal(label_mask(task(loss, mask="m"), {"y": none, "m": mask}), wanted[:, 0])
    y = torch.tensor([[[[1.0, 9.0]], [[2.0, 9.0]], [[6.0, 9.0]]]])
    assert float(loss_of(task(nn.L1Loss(), mask="m"), torch.zeros(1, 3, 1, 2), {"y": y, "m": mask[:1]})) == 3
    with pytest.raises(mtl.UserError, match="one channel for all of the target's"):
        label_mask(task(nn.L1Loss(), mask="m"), {"y": channels, "m": torch.ones(2, 2, 1, 2)})
