"""Batch norm over the samples of all processes."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from mtl.distributed.collectives import world_size
from mtl.errors import UserError


def sync_batchnorm(model: nn.Module) -> nn.Module:
    """Makes each batch norm in a model normalise with the mean and variance over all processes.

    Call it before `prepare` and before the `mtl.Step` is made. An optimizer may exist already, since parameters,
    buffers and their names stay the same. `torch.nn.SyncBatchNorm` works on GPUs only, and `mtl.Step` refuses it.

    Args:
        model: The model, which is changed.

    Returns:
        The model.

    Raises:
        UserError: If a batch norm is lazy, or has no running statistics. Without them, it normalises with the batch in
            eval mode as well, and would wait for processes that have fewer batches to validate.
    """
    for name, module in model.named_modules():
        if isinstance(module, _LazyNormBase):
            raise UserError(f"model.sync_batchnorm: '{name}' is a {type(module).__name__}; give it its num_features")
        if isinstance(module, _BatchNorm) and not isinstance(module, BatchNorm):
            _check_statistics(module, name)
            # In place, since a model may refer to a module from several places.
            module.__class__ = BatchNorm
    return model


def is_synchronised(model: nn.Module) -> bool:
    """Returns whether a model has a batch norm that normalises over all processes."""
    return any(isinstance(module, BatchNorm) for module in model.modules())


class BatchNorm(_BatchNorm):
    """Batch norm over the samples of all processes, for inputs of shape (N, C, *).

    In training mode, all processes have to call it equally often and in the same order, forward and backward.
    Arguments: see `torch.nn.BatchNorm1d`.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises the input."""
        self._check_input_dim(input)
        momentum = self._count_batch()
        over_batch = self.training or self.running_mean is None
        if not over_batch or world_size() == 1:
            keep = not self.training or self.track_running_stats
            mean, variance = (self.running_mean, self.running_var) if keep else (None, None)
            return F.batch_norm(input, mean, variance, self.weight, self.bias, over_batch, momentum, self.eps)
        values = input if input.dtype == torch.float64 else input.float()
        dims = [dim for dim in range(input.ndim) if dim != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        size = values.new_tensor([values.numel() // values.shape[1]])
        sums = _Sum.apply(torch.cat([values.sum(dims), size]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        self._move(mean.detach(), variance.detach(), count, momentum)
        normal: Tensor = centred * (variance.view(shape) + self.eps).rsqrt()
        if self.weight is not None:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _count_batch(self) -> float:
        """Counts the batch in training mode, and returns the share of the batch in the running statistics."""
        if not self.training or not self.track_running_stats:
            return 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, count: Tensor, momentum: float) -> None:
        """Moves the running statistics towards those of the batch; the running variance is unbiased."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), momentum)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of the gradients in all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _check_statistics(norm: _BatchNorm, name: str) -> None:
    if norm.running_mean is None:
        raise UserError(
            f"model.sync_batchnorm: '{name}' is a {type(norm).__name__} with track_running_stats=False, which in eval "
            "mode normalises with the batch, and some processes validate fewer batches than others. Set "
            "track_running_stats=True, or model.sync_batchnorm=false"
        )
