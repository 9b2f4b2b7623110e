"""Data that are drawn anew for every batch: points at which an equation is to hold."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl.errors import UserError


class Drawn(Dataset[dict[str, Tensor]]):
    """Batches from a function, each with a random generator of its own, seeded by run, epoch and batch.

    Args:
        draw: `draw(generator, count)` gives a dict of fields, tensors with `count` samples.
        num_samples: that count as an epoch.

    Raises:
        UserError: for a number of samples below 1.
    """

    def __init__(self, draw: Callable[[torch.Generator, int], dict[str, Tensor]], *, num_samples: int) -> None:
        if type(num_samples) is not int or num_samples < 1:
            raise UserError(f"num_samples is {num_samples!r}; it must be a whole number of at least 1")
        self.draw = draw
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, to look at; batches are drawn by `Loader` at once."""
        return {name: value[0] for name, value in self.draw(torch.Generator().manual_seed(index), 1).items()}
