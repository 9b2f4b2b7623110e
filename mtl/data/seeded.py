"""Data sets whose random draws depend only on seed, epoch and sample."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from mtl.data.alike import Alike
from mtl.errors import FOREIGN, UserError, describe_error, text_of
from mtl.process.seeding import cpu_states, seed_cpu, set_cpu_states
from mtl.seeds import seed_of


class Seeded(Dataset[Any]):
    """A data set that seeds the random generators for each sample.

    Augmentations are therefore independent of the number of worker processes and of where a run is resumed.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int, *, readable: bool = False) -> None:
        self.dataset = dataset
        self.readable = readable  # whether lists of numbers become tensors, for PyTorch's default collate
        self.alike = Alike()
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        before = cpu_states()
        try:
            seed_cpu(seed_of(self.seed, self.epoch, index))
            sample = self.dataset[index]
            return self.alike(readable(sample), index) if self.readable else sample
        except FOREIGN as error:
            raise of_sample(index, error) from error
        finally:
            set_cpu_states(before)


def of_sample(index: int, error: BaseException, of: str = "") -> UserError:
    """Returns an error that names the sample, and the part of the data that it belongs to."""
    text = text_of(error) if isinstance(error, UserError) else describe_error(error)
    return UserError(f"sample {index}{of}: {text}")


def readable(sample: Any) -> Any:
    """Converts a dict's lists of numbers to tensors, which torch's collate would transpose, and None to NaN."""
    if not isinstance(sample, Mapping):
        return sample
    return {
        key: _number_list(value) if isinstance(value, list) else math.nan if value is None else value
        for key, value in sample.items()
    }


def _number_list(value: list[Any]) -> Any:
    try:
        return torch.tensor(value) if value else value
    except (TypeError, ValueError, RuntimeError):  # texts, tensors or ragged lists need a custom collate function
        return value
