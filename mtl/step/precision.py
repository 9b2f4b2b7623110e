"""The precision of forward passes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from mtl.choices import PRECISIONS
from mtl.errors import UserError

Autocast = Callable[[], AbstractContextManager[Any]]
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_for(precision: str, device: torch.device) -> Autocast:
    """Returns a function that makes the context manager for forward passes of a precision.

    Raises:
        UserError: If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: '{precision}' is not one of {', '.join(PRECISIONS)}")
    dtype = DTYPES[precision]
    return partial(torch.autocast, device.type, dtype) if dtype else nullcontext
