"""Heads for pixels with several layers."""

import pytest
import torch

from mtl.heads import DeepLab, Upsampling

MAPS = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("outputs", "squeeze", "shape"), [(1, True, (2, 16, 24)), (1, False, (2, 1, 16, 24)), (3, True, (2, 3, 16, 24))]
)
def test_predictions_have_the_size_of_the_target(outputs: int, squeeze: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for head in (
        DeepLab(5, outputs, size=[16, 24], channels=8, rates=[1, 2], squeeze=squeeze),
        Upsampling(5, outputs, size=[16, 24], widths=[7, 6], squeeze=squeeze),
    ):
        prediction = head(MAPS)
        assert prediction.shape == shape
        prediction.square().sum().backward()
        assert all(p.grad is not None for p in head.parameters())


def test_numbers_of_parameters() -> None:
    count = sum(p.numel() for p in DeepLab(5, 3, size=8, channels=8, rates=[1, 2]).parameters())
    norm, pyramid = 2 * 8, 5 * 8 + 2 * 9 * 5 * 8 + 5 * 8  # a 1x1, two dilated 3x3, and the pooled 1x1
    assert count == pyramid + 4 * norm + 4 * 8 * 8 + norm + 9 * 8 * 8 + norm + 8 * 3 + 3
    assert sum(p.numel() for p in Upsampling(5, 3, size=8, widths=[7]).parameters()) == 9 * 5 * 7 + 2 * 7 + 7 * 3 + 3


def test_each_step_doubles_the_maps() -> None:
    sizes: list[tuple[int, ...]] = []
    head = Upsampling(5, 1, size=100, widths=[4, 4])
    for layer in head:
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    head(MAPS)
    assert sizes == [(8, 12), (16, 24), (16, 24)]
