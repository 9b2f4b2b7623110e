"""Batches of a data set, in an order that depends on seed and epoch alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from mtl.data.fields import Fields
from mtl.errors import UserError, told


class Loader:
    """Goes over a data set once an epoch, in batches on the device; the last one may be shorter.

    Data in memory (`Fields`) are moved to the device once and indexed there. Others go through PyTorch's `DataLoader`
    and its worker processes.

    Args:
        dataset: map-style, its samples dicts of fields.
        batch_size: samples in a batch.
        seed: of the order, together with the epoch.
        shuffle: whether the order is drawn, or the data set's own.
        num_workers: processes that load samples, where the data aren't in memory.
        device: where batches are put.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.dataset = dataset.to(self.device) if isinstance(dataset, Fields) else dataset
        self.num_samples: int = len(dataset)  # type: ignore[arg-type]  # Dataset declares no length
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_workers = num_workers

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self.num_samples // self.batch_size)

    def batches(self, epoch: int = 0) -> Iterator[dict[str, Any]]:
        """The epoch's batches, dicts of fields."""
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
        order = torch.randperm(self.num_samples, generator=generator) if self.shuffle else None
        if isinstance(self.dataset, Fields):
            if order is None:
                order = torch.arange(self.num_samples)
            for indices in torch.split(order.to(self.device), self.batch_size):
                yield self.dataset.take(indices)
        else:
            loader = DataLoader(
                self.dataset,
                self.batch_size,
                sampler=None if order is None else order.tolist(),
                num_workers=self.num_workers,
                pin_memory=self.device.type == "cuda",
                generator=generator,  # without one of its own a DataLoader draws from the global one
            )
            for batch in self._loaded(loader):
                yield tree_map(self._move, batch)

    def _loaded(self, loader: DataLoader[Any]) -> Iterator[Any]:
        batches = iter(loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                name = type(self.dataset).__name__
                raise UserError(f"data: a batch of {name} can't be loaded: {told(error)}") from error
            yield batch

    def _move(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
