"""Iterable data sets from epoch to epoch, and where a resumed run continues."""

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mtl.data.dividing import Division, Made, Position, Sizes
from mtl.data.lanes import Place
from mtl.distributed.collectives import gather_objects, world_size
from mtl.errors import UserError

if TYPE_CHECKING:
    from mtl.data.loader import Loader

Key = tuple[int, int]  # the number of an epoch and of a batch in it; 0 and the number of a batch in the whole training


class Streamed:
    """The batches of an iterable data set, epoch by epoch. See `Division` for who reads which samples.

    Args:
        loader: The loader of the data set, with all options.
        steps: The number of batches in an epoch, after which the stream continues in the next epoch. None if each epoch
            is a pass over the data.
        readers: The largest numbers of processes, and of workers in each, that can share the data.
    """

    def __init__(self, loader: "Loader", steps: int | None, readers: Mapping[str, int] | None) -> None:
        self._loader = loader
        self._name = type(loader.dataset).__name__
        self._steps = steps
        self._division = Division(loader, loader.dataset, readers)
        self._reached: dict[Key, Position] = {}  # the positions after the last two batches
        self._live: tuple[Key, Made] | None = None  # the batches after those of the last epoch

    def notes(self) -> list[str]:
        """Returns a sentence for each cost of reading this data set."""
        notes = []
        division, name = self._division, self._name
        readers = max(self._loader.num_workers, 1) * (world_size() if division.is_shared else 1)
        if not division.shards and readers > 1:
            why = "has a length" if division.has_length else "can't be divided into enough parts"
            notes.append(f"{name} {why}: each of {readers} readers reads all samples and keeps its share")
        if not division.is_restored:
            why = "does not restore its place from its state_dict" if division.has_state else "has no state_dict"
            notes.append(f"{name} {why}: a resumed run reads the samples of the current pass again up to its position")
        return notes

    def pairs(self, epoch: int, start: int) -> Generator[tuple[Any, Sizes]]:
        """Yields the batches of an epoch from number `start` on, each with its sizes."""
        first = self._key(epoch, start)
        live, self._live = self._live, None
        if live is not None and live[0] != first:
            live[1].close()
            live = None
        batches = self._open(first) if live is None else live[1]
        place, number = first
        last = None if self._steps is None else number + self._steps - start
        try:
            for batch, sizes, position in batches if last is None or number < last else ():
                number += 1
                self._remember((place, number), position)
                yield batch, sizes
                if number == last:
                    break
            if number == last:
                self._live = (place, number), batches
        finally:
            if self._live is None:
                batches.close()  # ends the worker processes

    def close(self) -> None:
        """Ends the worker processes, which otherwise live from one epoch to the next."""
        live, self._live = self._live, None
        if live is not None:
            live[1].close()

    def _key(self, epoch: int, position: int) -> Key:
        return (epoch, position) if self._steps is None else (0, max(epoch - 1, 0) * self._steps + position)

    def _remember(self, key: Key, position: Position) -> None:
        """Keeps the position, unless a batch is only tried before the training continues from a later one."""
        if self._reached and key < max(self._reached):
            return
        self._reached = {**{at: each for at, each in self._reached.items() if at == max(self._reached)}, key: position}

    def _open(self, key: Key) -> Made:
        position = self._reached.get(key)
        if self._steps is None:
            if position is None:
                taken = key[1] * self._loader.batch_size
                position = Position(key[0], key[1], places={0: Place(taken)} if taken else {})
            yield from self._division.batches(position)
            return
        skipped = key[1] if position is None else 0
        position = Position(1) if position is None else position
        while True:
            is_new, count = not position.batches, 0
            with closing(self._division.batches(position)) as batches:
                for each in batches:
                    count += 1
                    if skipped:
                        skipped -= 1
                    else:
                        yield each
            if is_new and not count:
                raise UserError(f"data: {self._name} gives no batch in a pass over its samples")
            position = Position(position.number + 1)

    def state(self, epoch: int, position: int | None) -> dict[str, Any] | None:
        """Returns in plain types where the stream is, of all processes together; None if a resumed run reads it again.

        Args:
            epoch: The current epoch.
            position: The number of batches of the epoch that are done; None between two epochs.
        """
        if self._steps is None and not self._division.is_restored:
            return None
        key = self._key(epoch + 1, 0) if position is None else self._key(epoch, position)
        reached = self._reached.get(key)
        if reached is None:
            return None
        is_spread = self._division.is_shared and self._division.shards
        places = gather_objects(reached.places) if is_spread else [reached.places]
        merged = {part: asdict(place) for each in places for part, place in each.items()}
        return {
            "at": list(key),
            **{"number": reached.number, "batches": reached.batches, "turn": reached.turn},
            **{"shards": self._division.shards, "parts": self._division.num_parts, "places": merged},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state`.

        Raises:
            UserError: If the data were divided in another way.
        """
        saved, ours = (state["shards"], state["parts"]), (self._division.shards, self._division.num_parts)
        if saved != ours:
            raise UserError(
                f"the training data aren't those of the run, which were {saved[0]} shards in {saved[1]} parts, not "
                f"{ours[0]} in {ours[1]}"
            )
        places = {part: Place(**place) for part, place in state["places"].items()}
        first, second = state["at"]
        self._reached = {(first, second): Position(state["number"], state["batches"], state["turn"], places)}
