"""The perceptron."""

import pytest
import torch
from torch import nn

import mtl
from mtl.trunks import MLP


def test_layers_are_those_that_are_asked_for() -> None:
    trunk = MLP(12, widths=[7, 6], activation="Tanh", dropout=0.5).eval()
    assert trunk.num_features == 6
    image = torch.randn(4, 3, 2, 2)
    first, second = (layer for layer in trunk if isinstance(layer, nn.Linear))
    assert torch.equal(trunk(image), torch.tanh(second(torch.tanh(first(image.flatten(1))))))
    trunk.train()
    assert not torch.equal(trunk(image), trunk(image))  # dropout
    trunk(image).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trunk.parameters())


def test_wrong_settings() -> None:
    with pytest.raises(mtl.UserError, match=r"model\.trunk\.widths: name the width of at least one layer"):
        MLP(12, widths=[])
    for activation in ("Relu", "functional"):
        with pytest.raises(
            mtl.UserError, match=rf"model\.trunk\.activation: torch\.nn has no '{activation}'; use ReLU"
        ):
            MLP(12, widths=[3], activation=activation)
