"""The readers of an iterable data set: each makes some of the batches, in a process of its own or in the main one."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import IterableDataset

from mtl.data.collating import Numbered
from mtl.data.lanes import Lane, Place, digest, set_pass
from mtl.errors import UserError

COMPARED = 16  # every so many batches that all processes read are compared
Note = dict[str, Any]  # plain data on a batch, which a reader sends with it


@dataclass(frozen=True)
class Making:
    """How the batches of a pass are made.

    Attributes:
        collate: A function from numbered samples to a batch.
        batch_size: The number of samples in a batch of all processes together.
        seeds: Numbers from which the seeds of the samples are derived.
        number: The number of the pass.
        saves: Whether the notes contain the states of the data set.
        alike: Whether all samples need the same fields.
        compares: Whether the notes contain checksums of some batches, which the processes compare.
    """

    collate: Callable[[Sequence[Numbered]], Any]
    batch_size: int
    seeds: tuple[int, ...]
    number: int
    saves: bool
    alike: bool
    compares: bool


class WholeReader(IterableDataset[tuple[Any, Note]]):
    """Reads all samples of a data set, and makes every `turns`-th batch of them, beginning with number `turn`.

    Args:
        dataset: The data set.
        making: How batches are made.
        turn, turns: Which batches this reader makes.
        first: The number of the first batch.
        place: Where to begin.
        initial: The state of the data set before any reading, if it has one.
        limit: The number of samples in a pass; None for all that there are.
    """

    def __init__(
        self,
        dataset: Any,
        making: Making,
        *,
        turn: int,
        turns: int,
        first: int,
        place: Place,
        initial: Any,
        limit: int | None,
    ) -> None:
        self._dataset = dataset
        self._making = making
        self._turn = turn
        self._turns = turns
        self._first = first
        self._place = place
        self._initial = initial
        self._limit = limit

    def __iter__(self) -> Iterator[tuple[Any, Note]]:
        making = self._making
        lane = Lane(
            self._dataset,
            making.seeds,
            making.number,
            self._place,
            initial=self._initial,
            saves=making.saves,
            alike=making.alike,
        )
        number, done = self._first, self._place.taken
        while self._limit is None or done < self._limit:
            wanted = making.batch_size if self._limit is None else min(making.batch_size, self._limit - done)
            samples = lane.take(wanted)
            done += len(samples)
            if len(samples) < wanted and self._limit is not None:
                name = type(self._dataset).__name__
                raise UserError(f"{name} ends after {done} samples, but its length is {self._limit}")
            if samples and number % self._turns == self._turn:
                is_compared = making.compares and (number == self._first or number % COMPARED == 0)
                checksum = digest([sample for _, sample in samples]) if is_compared else 0
                note = {"size": len(samples), "digest": checksum, "places": {0: asdict(lane.place())}}
                yield making.collate(samples), note
            if len(samples) < wanted:
                return
            number += 1


class PartReader(IterableDataset[tuple[Any, Note]]):
    """Reads parts of a data set, which take turns in groups: each batch has samples of the parts of one group.

    Args:
        dataset: The data set, with a method `shard(num_shards=…, index=…)`.
        making: How batches are made.
        groups: The numbers of the groups of this reader, beginning with that of its first batch.
        lanes: The number of parts in a group; the sample at position i of a batch is from part i modulo `lanes`.
        num_parts: The number of parts in all groups.
        own: The parts of a group that this process reads, as numbers from 0.
        places: Where to begin in each part.
        stateful: Whether the parts have states that restore their places.
    """

    def __init__(
        self,
        dataset: Any,
        making: Making,
        *,
        groups: Sequence[int],
        lanes: int,
        num_parts: int,
        own: range,
        places: Mapping[int, Place],
        stateful: bool,
    ) -> None:
        self._dataset = dataset
        self._making = making
        self._groups = groups
        self._lanes = lanes
        self._num_parts = num_parts
        self._own = own
        self._places = places
        self._stateful = stateful

    def __iter__(self) -> Iterator[tuple[Any, Note]]:
        set_pass(self._dataset, self._making.number)
        lanes = {group: {each: self._lane(group * self._lanes + each) for each in self._own} for group in self._groups}
        positions = [i % self._lanes for i in range(self._making.batch_size) if i % self._lanes in self._own]
        turns = deque(self._groups)
        while turns:
            group = turns.popleft()
            samples = [pair for each in positions for pair in lanes[group][each].take(1)]
            places = {group * self._lanes + each: asdict(lane.place()) for each, lane in lanes[group].items()}
            yield self._making.collate(samples), {"size": len(samples), "digest": 0, "places": places}
            if samples:
                turns.append(group)

    def _lane(self, number: int) -> Lane:
        making = self._making
        part = self._dataset.shard(num_shards=self._num_parts, index=number)
        return Lane(
            part,
            (*making.seeds, number),
            making.number,
            self._places.get(number),
            saves=making.saves and self._stateful,
            alike=making.alike,
            of=f" of part {number + 1} of {self._num_parts}",
        )
