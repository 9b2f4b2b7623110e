"""The head that draws an image."""

import pytest
import torch
from torch import nn

from mtl.heads import Decoder


@pytest.mark.parametrize(
    ("size", "widths", "shape"), [(28, (8, 4), (28, 28)), ([5, 7], (8, 4), (5, 7)), (3, (6,), (3, 3))]
)
def test_images_are_of_any_size(size, widths, shape) -> None:
    head = Decoder(10, channels=3, size=size, widths=widths)
    images = head(torch.randn(2, 10))
    assert images.shape == (2, 3, *shape)
    images.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
    assert head(torch.randn(2, 10, 4, 4)).shape == images.shape


def test_it_learns_given_images() -> None:
    torch.manual_seed(0)
    head, features, images = Decoder(8, channels=1, size=10), torch.eye(8), torch.randn(8, 1, 10, 10)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(head(features), images)
        loss.backward()
        optimizer.step()
    assert loss < 0.05  # the images' variance is 1
