"""The head with hidden layers."""

import torch
from torch import nn

from mtl.heads import MLP


def test_layers_are_those_that_are_asked_for() -> None:
    head = MLP(5, 3, widths=[7, 6], dropout=0.5).eval()
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(5, 7), (7, 6), (6, 3)]
    x = features = torch.randn(4, 5)
    for layer in linear[:-1]:
        x = torch.relu(layer(x))
    assert torch.equal(head(features), linear[-1](x))
    assert not torch.equal(head.train()(features), head(features))  # dropout


def test_without_hidden_layers_it_is_linear_and_one_output_loses_its_dimension() -> None:
    assert len(MLP(5, 1, widths=[])) == 1
    assert MLP(5, 1)(torch.randn(4, 5)).shape == (4,)
    assert MLP(5, 1, squeeze=False)(torch.randn(4, 5, 2, 2)).shape == (4, 1)


def test_gradients_reach_all_parameters() -> None:
    head = MLP(5, 2)
    head(torch.randn(64, 5)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
