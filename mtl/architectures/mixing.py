"""Operations on the values between the stages of trunks: a tensor, or a tuple that begins with a tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.trunks.stages import tensor_of


def replaced(value: Any, tensor: Tensor) -> Any:
    """Returns the value between two stages with another tensor at its beginning."""
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def check_channels(stage: nn.Module, value: Any) -> None:
    """Checks that three dimensions of a stage's output are (N, L, C), as `channels_of` takes them.

    Raises:
        UserError: If the stage has a one-dimensional convolution, whose output is (N, C, L).
    """
    convolutions = (nn.Conv1d, nn.ConvTranspose1d)
    if tensor_of(value).ndim == 3 and any(isinstance(module, convolutions) for module in stage.modules()):
        raise UserError(
            "model.trunk: a stage with a one-dimensional convolution has an output with three dimensions, and this "
            "architecture takes the last one as channels, as in tokens (N, L, C). Use torch.nn.Conv2d with a kernel of "
            "height 1 on inputs (N, C, 1, L), or pool over the positions at the end of the stage"
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
