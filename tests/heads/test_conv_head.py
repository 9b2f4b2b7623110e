"""The head for pixels: a linear head at each position, resized."""

import pytest
import torch

from mtl.heads import Conv, Linear


@pytest.mark.parametrize(
    ("outputs", "squeeze", "shape"), [(1, True, (2, 9, 12)), (1, False, (2, 1, 9, 12)), (4, True, (2, 4, 9, 12))]
)
def test_prediction_has_the_targets_shape(outputs: int, squeeze: bool, shape: tuple[int, ...]) -> None:
    head = Conv(5, outputs, size=[9, 12], squeeze=squeeze)
    prediction = head(torch.randn(2, 5, 3, 4))
    assert prediction.shape == shape
    prediction.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_at_the_maps_own_size_it_is_a_linear_head_at_each_position() -> None:
    head, linear = Conv(5, 4, size=3), Linear(5, 4)
    linear.weight.data, linear.bias.data = head.weight.data.flatten(1), head.bias.data
    maps = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(
        head(maps), linear(maps.movedim(1, -1).flatten(1, 2)).movedim(1, -1).unflatten(-1, (3, 3))
    )


def test_what_is_constant_stays_so_when_it_is_resized() -> None:
    head = Conv(5, 4, size=8)
    given = head(torch.ones(2, 5, 3, 3))
    torch.testing.assert_close(given, given[:, :, :1, :1].expand_as(given))
