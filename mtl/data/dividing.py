"""How one pass over an iterable data set is divided between processes and workers."""

from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mtl.data.collating import Collate
from mtl.data.lanes import READERS, Lane, Place, digest, is_stateful, length_of, restores
from mtl.data.readers import Making, Note, PartReader, WholeReader
from mtl.distributed.collectives import gather_numbers, rank, share, world_size
from mtl.errors import FOREIGN, UserError
from mtl.seeds import seed_of

if TYPE_CHECKING:
    from mtl.data.loader import Loader


PROBED = 8  # the number of shards by which processes compare the order of their shards


@dataclass
class Position:
    """Where the training is in a stream.

    Attributes:
        number: The number of the pass over the data, from 1.
        batches: The number of batches that were made in this pass.
        turn: The number of the group of parts that makes the next batch.
        places: The places in the parts that this process reads; in part 0 if the data are not divided.
    """

    number: int
    batches: int = 0
    turn: int = 0
    places: dict[int, Place] = field(default_factory=dict)


Sizes = tuple[int, int]  # the numbers of samples of a batch in all processes and in this one
Made = Generator[tuple[Any, Sizes, Position]]  # batches with their sizes and the positions after them


class Division:
    """Makes the batches of a pass, which depend neither on the number of processes nor on that of workers.

    A data set with `num_shards` and a method `shard(num_shards=…, index=…)`, as those of Hugging Face, is divided into
    parts, `readers["processes"]` × `readers["workers"]` at most. Each part is read once. Other data sets, and those
    that have a length, are read by each process and worker, which keep their share of the samples.

    Args:
        loader: The loader, with all options.
        dataset: Its data set.
        readers: The largest numbers of processes, and of workers in each, that can share the data.

    Attributes:
        shards: The number of shards that are divided; 0 if each process and worker reads all samples.
        num_parts: The number of parts.
        is_shared: Whether several processes get a share of each batch.
        has_length: Whether the number of samples in a pass is known.
        has_state: Whether the data set has a state.

    Raises:
        UserError: If there are more processes than can share the data.
    """

    def __init__(self, loader: "Loader", dataset: Any, readers: Mapping[str, int] | None) -> None:
        self._loader = loader
        self._dataset = dataset
        self.is_shared = loader.divided and world_size() > 1
        self.has_length = length_of(self._dataset) is not None
        self.has_state = is_stateful(self._dataset)
        self._initial = self._dataset.state_dict() if self.has_state else None
        readers = {**READERS, **(readers or {})}
        shards = getattr(self._dataset, "num_shards", 1) if callable(getattr(self._dataset, "shard", None)) else 1
        lanes = min(readers["processes"], loader.batch_size)
        self.shards = 0 if self.has_length or shards < lanes else shards
        self._lanes = lanes if self.shards else 1
        self._groups = min(readers["workers"], shards // lanes) if self.shards else 1
        self.num_parts = self._lanes * self._groups
        self._restores: bool | None = None
        self._is_checked = False
        if self.shards and self.is_shared and world_size() > lanes:
            raise UserError(
                f"data.readers.processes is {readers['processes']}, so that the shards can be divided between {lanes} "
                f"processes, and there are {world_size()}. Set it, and data.batch_size, to {world_size()} at least; "
                "the batches depend on it"
            )

    @property
    def is_restored(self) -> bool:
        """Whether the data set continues from a saved state, and does not have to be read again from its beginning."""
        if self._restores is None:
            try:
                part = self._dataset.shard(num_shards=self.num_parts, index=0) if self.shards else self._dataset
                initial = None if self.shards else self._initial
                self._restores = is_stateful(part) and restores(part, initial, (self._loader.seed, 1))
            except FOREIGN:  # the training reports the error if it occurs there as well
                self._restores = False
        return self._restores

    def batches(self, position: Position) -> Made:
        """Yields the batches of one pass from a position on, with their sizes and the positions after them."""
        return self._of_parts(position) if self.shards else self._of_whole(position)

    def _of_whole(self, position: Position) -> Made:
        turns = max(self._loader.num_workers, 1)
        place = position.places.get(0, Place())
        readers = [
            self._start(
                WholeReader(
                    self._dataset,
                    self._making(position),
                    turn=turn,
                    turns=turns,
                    first=position.batches,
                    place=place,
                    initial=self._initial,
                    limit=self._loader.num_samples if self.has_length else None,
                ),
                position,
            )
            for turn in range(turns)
        ]
        try:
            number = position.batches
            while True:
                batch, note = next(readers[number % turns], (None, _NOTHING))
                self._check_same([note["size"], note["digest"]])
                if not note["size"]:
                    return
                number += 1
                if note["size"] == self._loader.batch_size or not self._loader.drop_last:
                    places = {0: Place(**note["places"][0])}
                    own = len(range(note["size"])[share()]) if self.is_shared else note["size"]
                    yield self._loader.placed(batch), (note["size"], own), Position(position.number, number, 0, places)
        finally:
            for reader in readers:
                reader.close()

    def _of_parts(self, position: Position) -> Made:
        turns = min(max(self._loader.num_workers, 1), self._groups)
        groups = [(position.turn + number) % self._groups for number in range(self._groups)]
        own = range(rank(), self._lanes, world_size()) if self.is_shared else range(self._lanes)
        if not self._is_checked:
            self._is_checked = True
            self._check_same([self.shards, self._digest()])
        readers = {
            turn: self._start(
                PartReader(
                    self._dataset,
                    self._making(position),
                    groups=[group for group in groups if group % turns == turn],
                    lanes=self._lanes,
                    num_parts=self.num_parts,
                    own=own,
                    places=position.places,
                    stateful=self._loader.shuffle and self.is_restored,
                ),
                position,
            )
            for turn in range(turns)
        }
        places, number = dict(position.places), position.batches
        going, ended = deque(groups), set[int]()
        empty: Any = [{}] if self._loader.is_cut else {}
        try:
            while going:
                group = going.popleft()
                batch, note = (empty, _NOTHING) if group in ended else next(readers[group % turns])
                if not note["size"]:
                    ended.add(group)
                places |= {part: Place(**place) for part, place in note["places"].items()}
                size = note["size"]
                if self.is_shared:
                    size = int(sum(size for (size,) in gather_numbers([size])))
                if not size:
                    continue
                going.append(group)
                number += 1
                if size == self._loader.batch_size or not self._loader.drop_last:
                    after = Position(position.number, number, going[0], dict(places))
                    yield self._loader.placed(batch), (size, note["size"]), after
        finally:
            for reader in readers.values():
                reader.close()

    def _digest(self) -> int:
        """Returns a checksum of the first samples of some shards, which differs if the order of the shards does."""
        if not self.is_shared:
            return 0
        steps = max(min(self.shards, PROBED) - 1, 1)
        numbers = [(self.shards - 1) * step // steps for step in range(steps + 1)]  # with the first and the last shard
        shards = [self._dataset.shard(num_shards=self.shards, index=number) for number in numbers]
        lanes = [Lane(shard, (self._loader.seed, 1), 1) for shard in shards]
        return digest([[sample for _, sample in lane.take(1)] for lane in lanes])

    def _check_same(self, facts: list[float]) -> None:
        """Raises a UserError, in all processes, if what they read differs in these numbers."""
        if not self.is_shared or self.has_length:
            return
        seen = gather_numbers(facts)
        if number := next((number for number, each in enumerate(seen) if each != seen[0]), 0):
            raise UserError(
                f"data: {type(self._dataset).__name__} gives different samples in the processes of rank 0 and {number}."
                " It must give all samples in each process, whatever the rank, and draw no random numbers that depend "
                "on the process; mtl divides them. To read only a part in each process, define num_shards and "
                "shard(num_shards, index)"
            )

    def _making(self, position: Position) -> Making:
        loader = self._loader
        micro = loader.micro if loader.is_cut else None
        whole = bool(self.shards) or not self.is_shared
        return Making(
            Collate(loader.collate, micro, slice(None) if whole else share()),
            loader.batch_size,
            (loader.seed, position.number),
            position.number,
            saves=loader.shuffle and self.is_restored,
            alike=loader.collate is None,
            compares=self.is_shared and not self.has_length,
        )

    def _start(self, reader: Any, position: Position) -> Generator[tuple[Any, Note]]:
        """Starts a reader, in a worker process if there are any."""
        generator = torch.Generator().manual_seed(seed_of(self._loader.seed, position.number))
        workers = min(self._loader.num_workers, 1)
        return self._loader.fetched(reader, generator, _unchanged, batch_size=None, num_workers=workers)


_NOTHING: Note = {"size": 0, "digest": 0, "places": {}}


def _unchanged(item: Any) -> Any:
    return item
