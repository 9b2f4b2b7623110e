"""Batches of a data set, in an order that depends on seed and epoch alone."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mtl.batch import bounds, cut
from mtl.data.collating import Collate, Numbers, NumbersInStream
from mtl.data.drawn import Drawn
from mtl.data.fields import Fields
from mtl.data.seeded import Seeded, SeededStream, seed_of
from mtl.errors import FOREIGN, UserError, dead_worker, text_of, told
from mtl.process.seeding import num_threads


class Loader:
    """Goes over a data set once an epoch, in batches on the device; the last one may be shorter.

    Data in memory (`Fields`) are moved to the device once and indexed there. Others go through PyTorch's `DataLoader`
    and its worker processes. Iterable data sets give their samples in their own order, `len(dataset)` an epoch, and in
    one worker process at most, since several would each give all of them.

    Args:
        dataset: map-style, or iterable with a length; its samples dicts of fields.
        batch_size: samples in a batch.
        seed: of the order, together with the epoch.
        shuffle: whether the order is drawn, or the data set's own.
        drop_last: whether an incomplete last batch is left out.
        num_workers: processes that load samples, where the data aren't in memory.
        device: where batches are put.
        collate: from a list of samples to a batch, a dict of fields; by default what PyTorch does.
        micro_batch_size: where it is given, each batch is a list of micro-batches of so many samples, collated each by
            itself: flat fields, such as the ids of bags, are its own, and texts are padded to its own width.
        num_micro_batches: the number of micro-batches, instead.
        of: which split, and source if there are several, the data set is; for messages.
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
        of: str = "",
    ) -> None:
        self.device = torch.device(device)
        self.dataset = dataset.to(self.device) if isinstance(dataset, Fields) else dataset
        self.num_samples: int = len(dataset)  # type: ignore[arg-type]  # Dataset declares no length
        if drop_last and self.num_samples < batch_size:
            raise UserError(f"trainer.tail=drop leaves no batch: {self.num_samples} samples in batches of {batch_size}")
        self.num_samples -= self.num_samples % batch_size if drop_last else 0
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.collate = collate
        self.of = of
        self.micro = {"size": micro_batch_size, "count": num_micro_batches}
        self.is_cut = any(self.micro.values())

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self.num_samples // self.batch_size)

    def samples(self, epoch: int, position: int) -> list[int]:
        """The numbers of the samples in the epoch's batch with this number."""
        start = position * self.batch_size
        return self._order(epoch)[0][start : min(start + self.batch_size, self.num_samples)].tolist()

    def size_of(self, position: int) -> int:
        """How many samples an epoch's batch with this number has."""
        return min(self.batch_size, self.num_samples - position * self.batch_size)

    def sizes(self, epoch: int = 0, *, start: int = 0) -> Iterator[int]:
        """How many samples each of the epoch's batches has, from the one with number `start` on."""
        return (self.size_of(position) for position in range(start, len(self)))

    def progress(self, epoch: int, position: int) -> dict[str, Any]:
        """How far the data have been gone through after so many batches of the epoch, in plain types."""
        return {"epoch": epoch, "batches": position, "of samples": self.num_samples}

    def parts(self) -> list[tuple["Loader", list[str] | None]]:
        """Itself, for all tasks: how validation goes over it."""
        return [(self, None)]

    def _order(self, epoch: int) -> tuple[Tensor, torch.Generator]:
        """The epoch's order, and the generator that it was drawn from."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        total = len(self.dataset)  # type: ignore[arg-type]
        drawn = self.shuffle and not isinstance(self.dataset, IterableDataset | Drawn)
        return torch.randperm(total, generator=generator) if drawn else torch.arange(total), generator

    def batches(self, epoch: int = 0, *, start: int = 0) -> Iterator[Any]:
        """The epoch's batches, dicts of fields or lists of micro-batches, from the one with number `start` on.

        What a data set draws for a sample depends on seed, epoch and sample alone.
        """
        if isinstance(self.dataset, Drawn):
            for number in range(start, len(self)):
                drawn_from = torch.Generator().manual_seed(seed_of(self.seed, epoch, number))
                count = min(self.batch_size, self.num_samples - number * self.batch_size)
                batch = tree_map(self._move, self._drawn(drawn_from, count))
                yield cut(batch, count, **self.micro) if self.is_cut else batch
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
            yield from self._loaded(numbered, generator, num_workers=min(self.num_workers, 1))
        elif isinstance(self.dataset, Fields) and self.collate is None:
            for indices in torch.split(order.to(self.device), self.batch_size):
                if self.is_cut:
                    yield [self.dataset.take(indices[a:b]) for a, b in bounds(len(indices), **self.micro)]
                else:
                    yield self.dataset.take(indices)
        else:
            samples = Seeded(self.dataset, self.seed, epoch, readable=self.collate is None)
            yield from self._loaded(Numbers(samples), generator, num_workers=self.num_workers, sampler=order.tolist())

    def _drawn(self, generator: torch.Generator, count: int) -> Any:
        assert isinstance(self.dataset, Drawn)
        try:
            return self.dataset.draw(generator, count)
        except FOREIGN as error:
            raise UserError(f"data: {type(self.dataset).__name__} can't draw a batch: {_in_process(error)}") from error

    def _loaded(self, samples: Dataset[Any], generator: torch.Generator, **options: Any) -> Iterator[Any]:
        """Batches by PyTorch's DataLoader."""
        batches = iter(
            DataLoader(
                samples,
                self.batch_size,
                collate_fn=Collate(self.collate, self.micro if self.is_cut else None),
                pin_memory=self.device.type == "cuda",
                generator=generator,  # without one of its own a DataLoader draws from the global one
                **options,
            )
        )
        while True:
            try:
                with num_threads(1):  # as PyTorch's worker processes have it
                    batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                name = type(self.dataset).__name__ + (f" ({self.of})" if self.of else "")
                gone = isinstance(error, OSError | EOFError) or dead_worker(error)
                cause = _ended_worker(batches) if gone else None
                text = _in_process(cause or error)
                raise UserError(f"data: a batch of {name} can't be loaded: {text}") from (cause or error)
            pieces = [self._on_device(each) for each in (batch if self.is_cut else [batch])]
            yield pieces if self.is_cut else pieces[0]

    def _on_device(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            raise UserError(f"data.collate gives a {type(batch).__name__}; a batch must be a dict of fields")
        return tree_map(self._move, _as_dicts(batch))

    def _move(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value


def _ended_worker(batches: Any) -> RuntimeError | None:
    """How a worker process ended, if one did: torch doesn't always know, or misses what it had loaded first."""
    for worker in getattr(batches, "_workers", ()):
        worker.join(0.5)
        if not worker.is_alive():
            how = f"killed by signal {-worker.exitcode}" if worker.exitcode < 0 else f"exit code {worker.exitcode}"
            return RuntimeError(f"DataLoader worker (pid {worker.pid}) ended: {how}")
    return None


def _in_process(error: BaseException) -> str:
    """What went wrong, in this process or in a worker process, out of which the traceback comes as text."""
    text = text_of(error).strip()
    if text.startswith("Caught "):
        ours = text.rpartition(f"\n{UserError.__module__}.{UserError.__qualname__}: ")[2]
        return ours if ours != text else text.splitlines()[-1]
    return text if isinstance(error, UserError) else told(error)


def _as_dicts(value: Any) -> Any:
    """The batch with plain dicts in the place of other mappings, which tokenizers give and torch doesn't look into."""
    return {key: _as_dicts(each) for key, each in value.items()} if isinstance(value, Mapping) else value
