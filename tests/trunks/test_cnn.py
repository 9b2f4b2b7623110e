"""The convolutional network."""

import pytest
import torch
from torch import nn

import mtl
from mtl.trunks import CNN


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_features_pooled_and_not(channels: int, batch_norm: bool) -> None:
    trunk = CNN(channels, widths=[4, 8, 6], kernel_size=5, batch_norm=batch_norm, pooled=False).eval()
    image = torch.randn(2, channels, 17, 24)
    maps = trunk(image)
    assert maps.shape == (2, 6, 2, 3)
    assert trunk.num_features == 6
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in trunk) == 3 * batch_norm
    trunk.pooled = True
    torch.testing.assert_close(trunk(image), maps.mean((2, 3)))
    trunk.train()(torch.randn(8, channels, 17, 24)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trunk.parameters())


def test_values() -> None:
    trunk = CNN(1, widths=[2, 3], pooled=False)
    first, second = (layer for layer in trunk if isinstance(layer, nn.Conv2d))
    x = image = torch.randn(2, 1, 8, 8)
    for layer in (first, second):
        x = nn.functional.max_pool2d(torch.relu(nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)), 2)
    torch.testing.assert_close(trunk(image), x)


def test_no_layers() -> None:
    with pytest.raises(mtl.UserError, match=r"model\.trunk\.widths: name the channels of at least one layer"):
        CNN(3, widths=[])
