"""Data sets whose random draws depend only on seed, epoch and sample."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

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
            return self.alike(_readable(sample), index) if self.readable else sample
        except FOREIGN as error:
            raise _of_sample(index, error) from error
        finally:
            set_cpu_states(before)


class SeededStream(IterableDataset[Any]):
    """The samples `start` to `stop` of an iterable data set, with random generators seeded for the epoch."""

    def __init__(
        self, dataset: IterableDataset[Any], seed: int, epoch: int, start: int, stop: int, *, alike: bool = False
    ) -> None:
        self.dataset = dataset
        self.alike = Alike() if alike else None
        self.seed = seed
        self.epoch = epoch
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[Any]:
        inside = None  # the states of the generators after the data set's last draw
        for index in range(self.stop):
            before = cpu_states()
            try:
                if inside is None:
                    seed_cpu(seed_of(self.seed, self.epoch))
                    samples = iter(self.dataset)
                else:
                    set_cpu_states(inside)
                sample = next(samples)
            except StopIteration:
                name = type(self.dataset).__name__
                raise UserError(f"{name} ends after {index} samples, but its length is {self.stop}") from None
            except FOREIGN as error:
                raise _of_sample(index, error) from error
            finally:
                inside = cpu_states()
                set_cpu_states(before)
            if index >= self.start:  # a resumed run repeats the draws of earlier samples and discards them
                yield self._checked(sample, index)

    def _checked(self, sample: Any, index: int) -> Any:
        try:
            return sample if self.alike is None else self.alike(sample, index)
        except UserError as error:
            raise UserError(f"sample {index}: {error}") from None


def _of_sample(index: int, error: BaseException) -> UserError:
    return UserError(f"sample {index}: {text_of(error) if isinstance(error, UserError) else describe_error(error)}")


def _readable(sample: Any) -> Any:
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
