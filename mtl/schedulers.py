"""Learning rates that warm up: linearly from zero, then constant, down half a cosine, or down a line to zero.

The formulas are those of Hugging Face's `get_constant_schedule_with_warmup`, `get_cosine_schedule_with_warmup` and
`get_linear_schedule_with_warmup`. The first step of a warm-up has the learning rate 0.
"""

import math
from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mtl.errors import UserError


def warmup(optimizer: Optimizer, *, warmup: int | float, total: int) -> LambdaLR:
    """Creates a scheduler with a linear warm-up, followed by the constant learning rate of the optimizer.

    Args:
        optimizer: The optimizer, whose learning rates are multiplied by a factor between 0 and 1.
        warmup: The number of warm-up steps, or, as a float between 0 and 1, their share of `total`.
        total: The number of steps in the run.

    Raises:
        UserError: If the warm-up is longer than the run.
    """
    return _scheduler(optimizer, _constant, warmup, total)


def warmup_cosine(optimizer: Optimizer, *, warmup: int | float, total: int) -> LambdaLR:
    """Creates a scheduler with a linear warm-up, followed by half a cosine down to zero; see `warmup` for arguments."""
    return _scheduler(optimizer, _cosine, warmup, total)


def warmup_linear(optimizer: Optimizer, *, warmup: int | float, total: int) -> LambdaLR:
    """Creates a scheduler with a linear warm-up, followed by a line down to zero; see `warmup` for the arguments."""
    return _scheduler(optimizer, _linear, warmup, total)


def _scheduler(optimizer: Optimizer, then: Callable[[float], float], warmup: int | float, total: int) -> LambdaLR:
    if type(warmup) not in (int, float) or not 0 <= warmup <= (total if type(warmup) is int else 1):
        raise UserError(
            f"warmup is {warmup!r}; it must be a whole number of steps up to {total}, or a share of these, a float "
            "between 0 and 1 such as 0.1"
        )
    steps = warmup if isinstance(warmup, int) else round(warmup * total)
    return LambdaLR(optimizer, partial(_factor, then=then, warmup=steps, total=total))


def _factor(step: int, *, then: Callable[[float], float], warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return then(min((step - warmup) / max(1, total - warmup), 1.0))


def _constant(share: float) -> float:
    return 1.0


def _cosine(share: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * share)


def _linear(share: float) -> float:
    return 1.0 - share
