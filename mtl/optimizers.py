"""Optimizers that PyTorch doesn't have."""

from collections.abc import Callable
from typing import Any

import torch


class LBFGS(torch.optim.LBFGS):
    """PyTorch's L-BFGS for batches that change from step to step: curvature is estimated within one batch only.

    In each step, PyTorch's L-BFGS also uses the difference between the gradients of the previous batch and of the new
    one, which isn't curvature: if it is nearly orthogonal to the last update, the next update is arbitrary.
    """

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Runs up to `max_iter` iterations on the loss that the closure returns, with the gradient in `.grad`."""
        state = self.state[self._params[0]]
        if "t" in state:
            state["t"] = 0  # an update of length 0 has no curvature, so its pair of gradients is left out
        return super().step(closure)  # type: ignore[no-untyped-call]
