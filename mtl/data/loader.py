"""Loads the batches of a data set, in an order that depends only on seed and epoch."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mtl.batch import bounds, cut, take
from mtl.data.collating import Collate, Numbers, as_dicts
from mtl.data.drawn import Drawn
from mtl.data.fields import Fields
from mtl.data.lanes import length_of
from mtl.data.loading_errors import ended_worker, in_process, other_data
from mtl.data.seeded import Seeded
from mtl.data.streams import Streamed
from mtl.distributed.collectives import share, world_size
from mtl.errors import FOREIGN, UserError, dead_worker
from mtl.process.seeding import num_threads
from mtl.seeds import seed_of


class Loader:
    """Iterates over a data set once per epoch, in batches on the device; the last batch may be smaller.

    With several processes, the batches are the same as with one, and each process gets its share of each: every
    `world_size`-th sample, beginning with its own rank. A share without samples is a batch without fields.

    Data in memory (`Fields`) are moved to the device once and indexed there. Other data sets are loaded by PyTorch's
    `DataLoader` and its worker processes. Iterable data sets are read in their own order, see `Streamed`.

    Args:
        dataset: A map-style or an iterable data set; samples are dicts of fields.
        batch_size: The number of samples in a batch.
        seed: The seed of the order, which also depends on the epoch.
        shuffle: Whether the order is random; otherwise it is the order of the data set.
        drop_last: Whether to leave out an incomplete last batch.
        num_workers: The number of processes that load samples of data sets that aren't in memory.
        device: The device of the batches.
        collate: A function from a list of samples to a batch, a dict of fields. Default: PyTorch's function.
        micro_batch_size: If set, each batch is a list of micro-batches of this size. Each micro-batch is collated
            separately: it has flat fields of its own, such as the ids of bags, and texts padded to its own width.
        num_micro_batches: The number of micro-batches, as an alternative to `micro_batch_size`.
        divided: Whether each process gets its share of a batch, if there are several; otherwise each gets the whole.
        of: The name of the split (and of the source, if there are several), for error messages.
        steps: For an iterable data set, the number of batches in an epoch, after which the next epoch continues.
            None if each epoch is a pass over the data.
        readers: For an iterable data set, the largest numbers of processes and workers that can share it.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        collate: Callable[[list[Any]], Any] | None = None,
        micro_batch_size: int | None = None,
        num_micro_batches: int | None = None,
        divided: bool = True,
        of: str = "",
        steps: int | None = None,
        readers: Mapping[str, int] | None = None,
    ) -> None:
        self.divided = divided
        self.device = torch.device(device)
        self.dataset = dataset.to(self.device) if isinstance(dataset, Fields) else dataset
        self.num_samples = length_of(dataset) or 0  # 0 if unknown
        if drop_last and self.num_samples < batch_size and length_of(dataset) is not None:
            raise UserError(f"trainer.tail=drop leaves no batch: {self.num_samples} samples in batches of {batch_size}")
        self.num_samples -= self.num_samples % batch_size if drop_last else 0
        if divided and batch_size < world_size():
            raise UserError(
                f"data.batch_size and data.eval_batch_size are numbers of samples in all processes together, and "
                f"{batch_size} can't be divided over {world_size()} processes; set both to {world_size()} at least"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.collate = collate
        self.of = of
        self.micro = {"size": micro_batch_size, "count": num_micro_batches}
        self.is_cut = any(self.micro.values())
        self.drop_last = drop_last
        self.stream = Streamed(self, steps, readers) if isinstance(dataset, IterableDataset) else None
        self._steps = steps if self.stream is not None else None
        self.is_sized = length_of(dataset) is not None and self._steps is None

    def __len__(self) -> int:
        """Returns the number of batches in an epoch.

        Raises:
            TypeError: If the number is unknown, as for an iterable data set without a length.
        """
        if self._steps is not None:
            return self._steps
        if not self.is_sized:
            raise TypeError(f"{type(self.dataset).__name__} has no length")
        return -(-self.num_samples // self.batch_size)

    @property
    def has_one_batch(self) -> bool:
        """Whether an epoch is known to have only one batch."""
        return (self.is_sized or self._steps is not None) and len(self) <= 1

    def samples(self, epoch: int, position: int) -> list[int] | dict[str, list[int]]:
        """Returns the numbers of the samples in the batch at this position of the epoch, or the number of the batch."""
        if not self.is_sized:
            return {"batch": [max(epoch - 1, 0) * (self._steps or 0) + position]}
        start = position * self.batch_size
        return self._order(epoch)[0][start : min(start + self.batch_size, self.num_samples)].tolist()

    def size_of(self, position: int) -> int:
        """Returns the number of samples in the batch at this position of an epoch; an unknown batch counts as full."""
        if not self.is_sized:
            return self.batch_size
        return min(self.batch_size, self.num_samples - position * self.batch_size)

    def sizes(self, epoch: int = 0, *, start: int = 0) -> Iterator[int]:
        """Returns the number of samples of each batch of the epoch, beginning with batch number `start`."""
        return (self.size_of(position) for position in range(start, len(self)))

    def progress(self, epoch: int, position: int | None) -> dict[str, Any]:
        """Describes in plain types how much of the data has been used after `position` batches of the epoch.

        Args:
            epoch: The number of the epoch.
            position: The number of batches; None between this epoch and the next.
        """
        state: dict[str, Any] = {"epoch": epoch, "batches": position or 0, "of samples": self.num_samples}
        if self.stream is not None and (of_stream := self.stream.state(epoch, position)) is not None:
            state["stream"] = of_stream
        return state

    def restore(self, saved: Mapping[str, Any], epoch: int, position: int | None) -> None:
        """Continues at a position that `progress` described.

        Raises:
            UserError: If the data aren't those of the saved position.
        """
        ours = {"epoch": epoch, "batches": position or 0, "of samples": self.num_samples}
        theirs = {key: value for key, value in saved.items() if key != "stream"}
        if theirs != ours:
            raise other_data(theirs, ours)
        if self.stream is not None and saved.get("stream") is not None:
            self.stream.load(saved["stream"])

    def by_source(self) -> list[tuple["Loader", list[str] | None]]:
        """Returns the loader itself, for all tasks; validation iterates over this list of loaders and task names."""
        return [(self, None)]

    def _order(self, epoch: int) -> tuple[Tensor, torch.Generator]:
        """Returns the order of the samples in the epoch, and the random generator after drawing the order."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        total = len(self.dataset)  # type: ignore[arg-type]
        drawn = self.shuffle and not isinstance(self.dataset, Drawn)
        return torch.randperm(total, generator=generator) if drawn else torch.arange(total), generator

    def batches(self, epoch: int = 0, *, start: int = 0) -> Iterator[Any]:
        """Yields the epoch's batches, dicts of fields or lists of micro-batches, beginning with batch number `start`.

        The random draws of the data set for a sample depend only on seed, epoch and sample.
        """
        if self.stream is not None:
            with closing(self.stream.pairs(epoch, start)) as pairs:
                for batch, _ in pairs:
                    yield batch
            return
        if isinstance(self.dataset, Drawn):
            yield from self._draws(epoch, start)
            return
        order, generator = self._order(epoch)
        first = start * self.batch_size
        order = order[first : self.num_samples]
        if not len(order):
            return
        if isinstance(self.dataset, Fields) and self.collate is None:
            for of_all in torch.split(order.to(self.device), self.batch_size):
                indices = of_all[self._share()]
                if not len(indices):
                    yield [{}] if self.is_cut else {}
                elif self.is_cut:
                    yield [self.dataset.take(indices[a:b]) for a, b in bounds(len(indices), **self.micro)]
                else:
                    yield self.dataset.take(indices)
        else:
            samples = Seeded(self.dataset, self.seed, epoch, readable=self.collate is None)
            batches = [indices[self._share()].tolist() for indices in torch.split(order, self.batch_size)]
            collate = Collate(self.collate, self.micro if self.is_cut else None)
            options = {"num_workers": self.num_workers, "batch_sampler": batches}
            for batch in self.fetched(Numbers(samples), generator, collate, **options):
                yield self.placed(batch)

    def sized_batches(self, epoch: int = 0, *, start: int = 0) -> Iterator[tuple[Any, int]]:
        """Yields the batches of `batches`, each with its number of samples in all processes."""
        return self._with_size(epoch, start, 0)

    def shares(self, epoch: int = 0) -> Iterator[tuple[Any, int]]:
        """Yields the batches of `batches`, each with its number of samples in this process."""
        return self._with_size(epoch, 0, 1)

    def _with_size(self, epoch: int, start: int, which: int) -> Iterator[tuple[Any, int]]:
        if self.stream is not None:
            pairs: Any = self.stream.pairs(epoch, start)
        else:
            sizes = ((size, len(range(size)[self._share()])) for size in self.sizes(epoch, start=start))
            pairs = paired(self.batches(epoch, start=start), sizes)
        with closing(pairs):
            for batch, both in pairs:
                yield batch, both[which]

    def close(self) -> None:
        """Ends worker processes that would go on in the next epoch."""
        if self.stream is not None:
            self.stream.close()

    def _draws(self, epoch: int, start: int) -> Iterator[Any]:
        for number in range(start, len(self)):
            drawn_from = torch.Generator().manual_seed(seed_of(self.seed, epoch, number))
            count = self.size_of(number)
            batch = tree_map(self._move, self._drawn(drawn_from, count))
            ours = list(range(count))[self._share()]
            if not ours:
                yield [{}] if self.is_cut else {}
                continue
            batch = take(batch, count, ours) if len(ours) < count else batch
            yield cut(batch, len(ours), **self.micro) if self.is_cut else batch

    def _share(self) -> slice:
        """Returns the samples of a batch that this process gets."""
        return share() if self.divided else slice(None)

    def _drawn(self, generator: torch.Generator, count: int) -> Any:
        assert isinstance(self.dataset, Drawn)
        try:
            return self.dataset.draw(generator, count)
        except FOREIGN as error:
            raise UserError(f"data: {type(self.dataset).__name__} can't draw a batch: {in_process(error)}") from error

    def fetched(
        self, samples: Dataset[Any], generator: torch.Generator, collate: Callable[[Any], Any], **options: Any
    ) -> Generator[Any]:
        """Starts PyTorch's DataLoader, and returns the generator of what it loads."""
        return self._fetched(
            iter(
                DataLoader(
                    samples,
                    collate_fn=collate,
                    pin_memory=self.device.type == "cuda",
                    generator=generator,  # without a generator, a DataLoader draws from the global one
                    **options,
                )
            )
        )

    def _fetched(self, batches: Iterator[Any]) -> Generator[Any]:
        while True:
            try:
                with num_threads(1):  # as in PyTorch's worker processes
                    batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                name = type(self.dataset).__name__ + (f" ({self.of})" if self.of else "")
                may_have_ended = isinstance(error, OSError | EOFError) or dead_worker(error)
                cause = ended_worker(batches) if may_have_ended else None
                text = in_process(cause or error)
                raise UserError(f"data: a batch of {name} can't be loaded: {text}") from (cause or error)
            yield batch

    def placed(self, batch: Any) -> Any:
        """Returns a batch, or a list of micro-batches, on the device."""
        pieces = [self._on_device(each) for each in (batch if self.is_cut else [batch])]
        return pieces if self.is_cut else pieces[0]

    def _on_device(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            raise UserError(f"data.collate returns a {type(batch).__name__}; a batch must be a dict of fields")
        return tree_map(self._move, as_dicts(batch))

    def _move(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value


def paired(batches: Any, sizes: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields batches with their sizes; closing the generator also closes that of the batches."""
    with closing(batches):
        yield from zip(batches, sizes, strict=True)
