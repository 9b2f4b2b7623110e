"""Layers for maps and vectors alike, whose sizes follow from the first batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter, is_lazy


class LazyLayer(LazyModuleMixin, nn.Module):
    """A convolution for maps (N, C, H, W), or a linear layer for vectors (N, C).

    The first call determines which of the two, and the numbers of channels. The convolution keeps height and width.
    Initial weights are Xavier-normal, and biases 0.

    Args:
        kernel_size: The kernel size of the convolution, odd.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight: Tensor = UninitializedParameter()
        self.bias: Tensor = UninitializedParameter()

    def initialize_parameters(self, features: Tensor, channels: int) -> None:
        """Gives the parameters their shapes and initial values; called by the first forward pass."""
        if isinstance(self.weight, UninitializedParameter):
            kernel = (self.kernel_size,) * (features.ndim - 2)
            with torch.no_grad():
                self.weight.materialize((channels, features.shape[1], *kernel))
                nn.init.xavier_normal_(self.weight)
        if isinstance(self.bias, UninitializedParameter):
            with torch.no_grad():
                self.bias.materialize((channels,))
                nn.init.zeros_(self.bias)

    def forward(self, features: Tensor, channels: int) -> Tensor:
        """Returns features with this number of channels."""
        if self.weight.ndim == 2:
            return F.linear(features, self.weight, self.bias)
        return F.conv2d(features, self.weight, self.bias, padding=self.kernel_size // 2)

    def extra_repr(self) -> str:
        """Describes the layer in the text of a model."""
        return "lazy" if is_lazy(self.weight) else f"{', '.join(map(str, self.weight.shape))}"


class BatchNorm(_BatchNorm):
    """Batch norm for inputs (N, C, *)."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Allows any shape."""


class LazyBatchNorm(_LazyNormBase, _BatchNorm):
    """Batch norm for inputs (N, C, *), whose number of channels follows from the first input."""

    cls_to_become = BatchNorm

    def _check_input_dim(self, input: Tensor) -> None:
        """Allows any shape."""
