"""Operations on the values between the stages of trunks: a tensor, or a tuple that begins with a tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.trunks.stages import tensor_of

_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear, nn.RNNBase)  # layers that decide about the number of channels


def replaced(value: Any, tensor: Tensor) -> Any:
    """Returns the value between two stages with another tensor at its beginning."""
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def check_channels(value: Any, *stages: nn.Module) -> None:
    """Checks that three dimensions of the output of stages are (N, L, C), as `channels_of` takes them.

    Stages with one-dimensional convolutions may have outputs (N, C, L). Their last layer tells the number of channels;
    if none or both of the dimensions are of this size, an output of a convolution is (N, C, L).

    Args:
        value: The output.
        stages: The stages that computed it.

    Raises:
        UserError: If the output is (N, C, L).
    """
    shape = tensor_of(value).shape
    layers = [module for stage in stages for module in stage.modules() if isinstance(module, _LAYERS)]
    if len(shape) != 3 or not any(isinstance(layer, _CONVOLUTIONS) for layer in layers):
        return
    channels = getattr(layers[-1], "out_channels", None) or getattr(layers[-1], "out_features", None)
    second, third = shape[1] == channels, shape[2] == channels
    if isinstance(layers[-1], _CONVOLUTIONS) if second == third else second:
        raise UserError(
            "model.trunk: the output of a stage with a one-dimensional convolution has the dimensions (N, C, L), and "
            "this architecture takes the last one as channels, as in tokens (N, L, C). Transpose it at the end of the "
            "stage, use torch.nn.Conv2d with a kernel of height 1 on inputs (N, C, 1, L), or pool over the positions"
        )


def channels_of(tensor: Tensor) -> int:
    """Returns the dimension of the channels: the last one of vectors (N, C) and tokens (N, L, C), 1 of maps."""
    return 1 if tensor.ndim > 3 else tensor.ndim - 1


def by_channel(values: Tensor, like: Tensor) -> Tensor:
    """Returns values (…, C) in a shape that is broadcast along the channels of a tensor, one dimension for each."""
    behind = like.ndim - 1 - channels_of(like)
    return values.reshape(*values.shape[:-1], *[1] * (like.ndim - 1 - behind), -1, *[1] * behind)


def weighted(weights: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Returns the weighted sum of tensors of one shape.

    Args:
        weights: A weight for each tensor, (T,), or a weight for each tensor and channel, (T, C).
        tensors: The tensors.
    """
    stacked = torch.stack(list(tensors))
    weights = weights.to(stacked.dtype)
    if weights.ndim == 1:
        mixed: Tensor = torch.tensordot(weights, stacked, 1)
        return mixed
    mixed = (by_channel(weights, stacked[0]) * stacked).sum(0)
    return mixed
