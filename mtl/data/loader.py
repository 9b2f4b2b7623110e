"""Loads the batches of a data set, in an order that depends only on seed and epoch."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mtl.batch import bounds, cut, take
from mtl.data.collating import Collate, Numbers, NumbersInStream
from mtl.data.drawn import Drawn
from mtl.data.fields import Fields
from mtl.data.seeded import Seeded, SeededStream
from mtl.distributed.collectives import share, world_size
from mtl.errors import FOREIGN, UserError, dead_worker, describe_error, text_of
from mtl.process.seeding import num_threads
from mtl.seeds import seed_of


class Loader:
    """Iterates over a data set once per epoch, in batches on the device; the last batch may be smaller.

    With several processes, the batches are the same as with one, and each process gets its share of each: every
    `world_size`-th sample, beginning with its own rank. A share without samples is a batch without fields.

    Data in memory (`Fields`) are moved to the device once and indexed there. Other data sets are loaded by PyTorch's
    `DataLoader` and its worker processes. Iterable data sets yield `len(dataset)` samples per epoch in their own order,
    from at most one worker process, because each of several processes would yield all samples.

    Args:
        dataset: A map-style data set, or an iterable one with a length; samples are dicts of fields.
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
    ) -> None:
        self.divided = divided
        self.device = torch.device(device)
        self.dataset = dataset.to(self.device) if isinstance(dataset, Fields) else dataset
        self.num_samples: int = len(dataset)  # type: ignore[arg-type]  # Dataset declares no length
        if drop_last and self.num_samples < batch_size:
            raise UserError(f"trainer.tail=drop leaves no batch: {self.num_samples} samples in batches of {batch_size}")
        self.num_samples -= self.num_samples % batch_size if drop_last else 0
        if divided and batch_size < world_size():
            raise UserError(
                f"data: batches of {batch_size} samples can't be divided over {world_size()} processes; set "
                f"data.batch_size and data.eval_batch_size to {world_size()} at least"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.collate = collate
        self.of = of
        self.micro = {"size": micro_batch_size, "count": num_micro_batches}
        self.is_cut = any(self.micro.values())

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        return -(-self.num_samples // self.batch_size)

    def samples(self, epoch: int, position: int) -> list[int]:
        """Returns the numbers of the samples in the batch at this position of the epoch."""
        start = position * self.batch_size
        return self._order(epoch)[0][start : min(start + self.batch_size, self.num_samples)].tolist()

    def size_of(self, position: int) -> int:
        """Returns the number of samples in the batch at this position of an epoch."""
        return min(self.batch_size, self.num_samples - position * self.batch_size)

    def sizes(self, epoch: int = 0, *, start: int = 0) -> Iterator[int]:
        """Returns the number of samples of each batch of the epoch, beginning with batch number `start`."""
        return (self.size_of(position) for position in range(start, len(self)))

    def progress(self, epoch: int, position: int) -> dict[str, Any]:
        """Describes in plain types how much of the epoch's data has been used after `position` batches."""
        return {"epoch": epoch, "batches": position, "of samples": self.num_samples}

    def by_source(self) -> list[tuple["Loader", list[str] | None]]:
        """Returns the loader itself, for all tasks; validation iterates over this list of loaders and task names."""
        return [(self, None)]

    def _order(self, epoch: int) -> tuple[Tensor, torch.Generator]:
        """Returns the order of the samples in the epoch, and the random generator after drawing the order."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        total = len(self.dataset)  # type: ignore[arg-type]
        drawn = self.shuffle and not isinstance(self.dataset, IterableDataset | Drawn)
        return torch.randperm(total, generator=generator) if drawn else torch.arange(total), generator

    def batches(self, epoch: int = 0, *, start: int = 0) -> Iterator[Any]:
        """Yields the epoch's batches, dicts of fields or lists of micro-batches, beginning with batch number `start`.

        The random draws of the data set for a sample depend only on seed, epoch and sample.
        """
        if isinstance(self.dataset, Drawn):
            for number in range(start, len(self)):
                drawn_from = torch.Generator().manual_seed(seed_of(self.seed, epoch, number))
                count = min(self.batch_size, self.num_samples - number * self.batch_size)
                batch = tree_map(self._move, self._drawn(drawn_from, count))
                ours = list(range(count))[self._share()]
                if not ours:
                    yield [{}] if self.is_cut else {}
                    continue
                batch = take(batch, count, ours) if len(ours) < count else batch
                yield cut(batch, len(ours), **self.micro) if self.is_cut else batch
            return
        order, generator = self._order(epoch)
        first = start * self.batch_size
        order = order[first : self.num_samples]
        if not len(order):
            return
        if isinstance(self.dataset, IterableDataset):
            alike = self.collate is None
            stream = SeededStream(self.dataset, self.seed, epoch, first, self.num_samples, alike=alike)
            numbered = NumbersInStream(stream, first)
            yield from self._loaded(
                numbered, generator, num_workers=min(self.num_workers, 1), batch_size=self.batch_size
            )
        elif isinstance(self.dataset, Fields) and self.collate is None:
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
            yield from self._loaded(Numbers(samples), generator, num_workers=self.num_workers, batch_sampler=batches)

    def _share(self) -> slice:
        """Returns the samples of a batch that this process gets."""
        return share() if self.divided else slice(None)

    def _drawn(self, generator: torch.Generator, count: int) -> Any:
        assert isinstance(self.dataset, Drawn)
        try:
            return self.dataset.draw(generator, count)
        except FOREIGN as error:
            raise UserError(f"data: {type(self.dataset).__name__} can't draw a batch: {_in_process(error)}") from error

    def _loaded(self, samples: Dataset[Any], generator: torch.Generator, **options: Any) -> Iterator[Any]:
        """Yields the batches that PyTorch's DataLoader loads."""
        ours = self._share() if "batch_size" in options else slice(None)
        batches = iter(
            DataLoader(
                samples,
                collate_fn=Collate(self.collate, self.micro if self.is_cut else None, ours),
                pin_memory=self.device.type == "cuda",
                generator=generator,  # without a generator, a DataLoader draws from the global one
                **options,
            )
        )
        while True:
            try:
                with num_threads(1):  # as in PyTorch's worker processes
                    batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                name = type(self.dataset).__name__ + (f" ({self.of})" if self.of else "")
                may_have_ended = isinstance(error, OSError | EOFError) or dead_worker(error)
                cause = _ended_worker(batches) if may_have_ended else None
                text = _in_process(cause or error)
                raise UserError(f"data: a batch of {name} can't be loaded: {text}") from (cause or error)
            pieces = [self._on_device(each) for each in (batch if self.is_cut else [batch])]
            yield pieces if self.is_cut else pieces[0]

    def _on_device(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            raise UserError(f"data.collate returns a {type(batch).__name__}; a batch must be a dict of fields")
        return tree_map(self._move, _as_dicts(batch))

    def _move(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value


def _ended_worker(batches: Any) -> RuntimeError | None:
    """Returns an error for a worker process that ended unexpectedly, or None; torch doesn't always detect it."""
    for worker in getattr(batches, "_workers", ()):
        worker.join(0.5)
        if not worker.is_alive():
            how = f"killed by signal {-worker.exitcode}" if worker.exitcode < 0 else f"exit code {worker.exitcode}"
            return RuntimeError(f"DataLoader worker (pid {worker.pid}) ended: {how}")
    return None


def _in_process(error: BaseException) -> str:
    """Describes an error from this process, or from a worker process, which reports errors as formatted tracebacks."""
    text = text_of(error).strip()
    if text.startswith("Caught "):
        message = text.rpartition(f"\n{UserError.__module__}.{UserError.__qualname__}: ")[2]
        return message if message != text else text.splitlines()[-1]
    return text if isinstance(error, UserError) else describe_error(error)


def _as_dicts(value: Any) -> Any:
    """Replaces mappings, such as the ones that tokenizers return, with dicts, because torch only traverses dicts."""
    return {key: _as_dicts(each) for key, each in value.items()} if isinstance(value, Mapping) else value
