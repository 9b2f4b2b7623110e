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
    """Warm-up, then the optimizer's own learning rate.

    Args:
        optimizer: whose learning rates are multiplied by a factor between 0 and 1.
        warmup: how long it takes: a whole number of steps, or a share of `total` between 0 and 1, a float.
        total: steps in the run.

    Raises:
        UserError: for a warm-up that is longer than the run.
    """
    return _scheduler(optimizer, _constant, warmup, total)


def warmup_cosine(optimizer: Optimizer, *, warmup: int | float, total: int) -> LambdaLR:
    """Warm-up, then half a cosine down to zero; arguments as for `warmup`."""
    return _scheduler(optimizer, _cosine, warmup, total)


def warmup_linear(optimizer: Optimizer, *, warmup: int | float, total: int) -> LambdaLR:
    """Warm-up, then a line down to zero; arguments as for `warmup`."""
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
