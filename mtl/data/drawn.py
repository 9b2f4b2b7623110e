"""Data that are drawn anew for every batch, such as the points at which an equation must hold."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl.errors import UserError


class Drawn(Dataset[dict[str, Tensor]]):
    """Batches drawn by a function, which gets a random generator seeded by run, epoch and batch number.

    Args:
        draw: A function `draw(generator, count)` that returns a dict of fields with `count` samples each.
        num_samples: The number of samples in an epoch.

    Raises:
        UserError: If `num_samples` isn't an integer of at least 1.
    """

    def __init__(self, draw: Callable[[torch.Generator, int], dict[str, Tensor]], *, num_samples: int) -> None:
        if type(num_samples) is not int or num_samples < 1:
            raise UserError(f"num_samples is {num_samples!r}; it must be a whole number of at least 1")
        self.draw = draw
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one sample, for inspection. In training, `Loader` draws whole batches instead."""
        return {name: value[0] for name, value in self.draw(torch.Generator().manual_seed(index), 1).items()}
