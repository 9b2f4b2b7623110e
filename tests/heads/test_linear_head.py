"""The linear head: torch's own layer, for vectors and maps, with the target's shape."""

import pytest
import torch
from torch import nn

from mtl.heads import Linear


@pytest.mark.parametrize(("outputs", "squeeze", "shape"), [(1, True, (4,)), (1, False, (4, 1)), (3, True, (4, 3))])
def test_prediction_has_the_targets_shape(outputs: int, squeeze: bool, shape: tuple[int, ...]) -> None:
    head = Linear(5, outputs, squeeze=squeeze)
    features = torch.randn(4, 5)
    prediction = head(features)
    assert prediction.shape == shape
    assert torch.equal(prediction.view(4, outputs), nn.functional.linear(features, head.weight, head.bias))


def test_parameters_are_those_of_torchs_layer() -> None:
    torch.manual_seed(0)
    ours = Linear(5, 3).state_dict()
    torch.manual_seed(0)
    theirs = nn.Linear(5, 3).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_maps_are_averaged() -> None:
    head, maps = Linear(5, 3), torch.randn(4, 5, 6, 7)
    torch.testing.assert_close(head(maps), head(maps.mean((2, 3))))


def test_tokens_stay() -> None:
    assert Linear(5, 3)(torch.randn(4, 6, 5)).shape == (4, 6, 3)
