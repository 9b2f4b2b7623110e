"""Splits samples into training, validation and test."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.errors import UserError

NAMES = ("train", "val", "test")


def random_parts(count: int, split: Sequence[float], seed: int) -> dict[str, Tensor]:
    """Draws the samples of each split at random, in ascending order; splits with a share of 0 are left out.

    Args:
        count: The number of samples.
        split: The shares of training, validation and test, which must sum to 1.
        seed: The seed of the random split.

    Raises:
        UserError: If the shares are invalid, or so small that a split would have no samples.
    """
    check_shares(split)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    ends = [round(count * sum(split[: index + 1])) for index in range(len(NAMES))]
    parts = {}
    for name, share, start, end in zip(NAMES, split, [0, *ends], ends, strict=False):
        if share and start == end:
            raise UserError(f"data.split: {share} of {count} samples leaves none for {name}")
        if share:
            parts[name] = order[start:end].sort().values
    return parts


def check_shares(split: Sequence[float]) -> None:
    """Raises a UserError unless `split` has three shares that sum to 1, the first of them above 0."""
    right = isinstance(split, list | tuple) and len(split) == len(NAMES) and all(type(s) in (int, float) for s in split)
    if not right or min(split) < 0 or split[0] == 0 or abs(sum(split) - 1) > 1e-6:
        raise UserError(
            f"data.split is {split!r}; it must be three shares that sum to 1, of training (above 0), validation and "
            "test, such as [0.8, 0.1, 0.1]"
        )


def held_out(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draws at random which samples remain for training and which are held out for validation, in ascending order.

    Raises:
        UserError: If the share is invalid, or leaves no sample for training or validation.
    """
    if not 0 < share < 1:
        raise UserError(f"data.validation is {share!r}; it must be a share of the training images, such as 0.1")
    parts = random_parts(count, [1 - share, share, 0], seed)
    return parts["train"], parts["val"]
