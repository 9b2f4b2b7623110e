"""Optimizers that PyTorch hasn't."""

from collections.abc import Callable
from typing import Any

import torch


class LBFGS(torch.optim.LBFGS):
    """PyTorch's, for batches that change from step to step: curvature comes from pairs of gradients of one batch alone.

    PyTorch's takes the first pair of a step from the last batch's gradient and the new one's, whose difference is no
    curvature: where it is nearly at right angles to the last move, the next one goes anywhere.
    """

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Up to `max_iter` iterations on the loss that the closure gives, its gradient in `.grad`."""
        state = self.state[self._params[0]]
        if "t" in state:
            state["t"] = 0  # the last move counts as none, and its pair is left out, as every one without curvature
        return super().step(closure)  # type: ignore[no-untyped-call]
