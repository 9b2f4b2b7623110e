"""Division of the batches of an epoch over the processes."""

from collections.abc import Iterator

import torch

from mtl.distributed.collectives import share, world_size
from mtl.seeds import seed_of


class Sampler:
    """A batch sampler for `torch.utils.data.DataLoader` that gives each process its share of each batch.

    The order of the samples depends only on seed and epoch, and each sample is used once in an epoch. The batches are
    those of one process; only if the last one had fewer samples than there are processes, they belong to the batch
    before. Each process has every `world_size`-th sample of a batch, beginning with its own rank.

    Args:
        num_samples: The number of samples in the data set.
        batch_size: The number of samples in a batch of all processes together.
        shuffle: Whether the order of the samples is random.
        seed: The seed of the order.

    Raises:
        ValueError: If the data set or a batch has fewer samples than there are processes.
    """

    def __init__(self, num_samples: int, batch_size: int, *, shuffle: bool = True, seed: int = 0) -> None:
        if min(num_samples, batch_size) < world_size():
            raise ValueError(
                f"batches of {min(num_samples, batch_size)} samples can't be divided over {world_size()} processes"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.sampler = self  # Lightning sets the epoch of the sampler that a batch sampler has

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the epoch, on which the order depends.

        Call it before each epoch; otherwise, all epochs have the same order.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        """Returns the number of batches in an epoch, which is the same in all processes."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest >= world_size())

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.num_samples)
        if self.shuffle:
            seed = seed_of(self.seed, self.epoch)
            order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(seed))
        for number in range(len(self)):
            end = (number + 1) * self.batch_size if number + 1 < len(self) else self.num_samples
            yield order[number * self.batch_size : end][share()].tolist()
