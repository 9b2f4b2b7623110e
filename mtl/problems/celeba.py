"""The convolutional network with which the FAMO and FairGrad papers train the 40 attributes of CelebA."""

from torch import nn


class Network(nn.Sequential):
    """Nine layers with batch norm and ReLUs, from images (N, 3, H, W) to features (N, 512).

    Seven convolutions in four blocks, of 64, 128, 256 and 512 channels, with poolings between them, a mean over all
    positions, and two linear layers. Each block and each linear layer is a stage, see `mtl.trunks.stages`.

    Source: Liu et al., "FAMO: Fast Adaptive Multitask Optimization", arXiv 2306.03792, and its published code.
    """

    num_features = 512

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(*_convolution(3, 64), nn.MaxPool2d(2)),
            nn.Sequential(*_convolution(64, 128), *_convolution(128, 128), nn.MaxPool2d(2)),
            nn.Sequential(*_convolution(128, 256), *_convolution(256, 256), nn.MaxPool2d(2)),
            nn.Sequential(*_convolution(256, 512), *_convolution(512, 512), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            _linear(512, 512),
            _linear(512, 512),
        )


def _convolution(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def _linear(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU())
