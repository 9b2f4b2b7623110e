"""Several data sets, each for some of the tasks: which of them gives a batch in which step."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from mtl.choices import LENGTHS, SAMPLING
from mtl.data.fields import Splits
from mtl.data.loader import Loader
from mtl.errors import UserError


class Sources:
    """Data sets by name, of which each task names its own in `tasks.NAME.source`.

    Args:
        sources: `Splits` by name.
        sampling: which of them give a batch in a step: `all` of them; one after the other, `round_robin`; or one that
            is drawn, `proportional` to its number of samples n, or to n^(1/temperature).
        temperature: at least 1; the higher, the more alike.
        epoch: the steps of an epoch: as many as the shortest (`min`) or longest (`max`) source has batches, as all have
            together (`sum`), or a number. A source that is through begins again, in another order.

    Raises:
        UserError: for words that aren't known.
    """

    def __init__(
        self,
        sources: Mapping[str, Splits],
        *,
        sampling: str = "all",
        temperature: float = 2.0,
        epoch: str | int = "max",
    ) -> None:
        if not isinstance(sources, Mapping) or not sources:
            raise UserError("data.sources: name at least one, such as {digits: {_target_: mtl.data.mnist}}")
        for name, splits in sources.items():
            if not isinstance(splits, Splits):
                raise UserError(f"data.sources.{name} is a {type(splits).__name__}, not mtl.data.Splits")
        if sampling not in SAMPLING:
            raise UserError(f"data.sampling: '{sampling}' is not one of {', '.join(SAMPLING)}")
        if type(temperature) not in (int, float) or not 1 <= temperature < float("inf"):
            raise UserError(f"data.temperature is {temperature!r}; it must be a finite number of at least 1")
        if epoch not in LENGTHS and not (type(epoch) is int and epoch > 0):
            raise UserError(f"data.epoch is {epoch!r}; it must be one of {', '.join(LENGTHS)}, or a number of steps")
        self.sources = dict(sources)
        self.sampling = sampling
        self.temperature = float(temperature)
        self.epoch = epoch
        self.facts = {name: dict(splits.facts) for name, splits in sources.items()}
        self.warnings = [f"{name}: {warning}" for name, splits in sources.items() for warning in splits.warnings]

    def fact(self, key: str, source: str | None) -> Any:
        """What is known of the source's data under this key; without a source what is known of all that know it.

        Raises:
            UserError: where nothing is, or without a source different things are.
        """
        if source is not None:
            return self.sources[source].fact(key, None)
        known = {name: facts[key] for name, facts in self.facts.items() if key in facts}
        values = list(known.values())
        if not values:
            there = sorted({name for facts in self.facts.values() for name in facts})
            raise UserError(f"the data have no fact '{key}'; they have: {', '.join(there) or 'none'}")
        if any(value != values[0] for value in values):
            raise UserError(f"the sources {', '.join(known)} have each a fact '{key}' of their own; write down one")
        return values[0]

    def of_task(self, task: str, source: str | None) -> Splits:
        """The data of the task.

        Raises:
            UserError: for a source that isn't there.
        """
        if source not in self.sources:
            named = "names no source" if source is None else f"names the source '{source}'"
            raise UserError(f"tasks.{task}.source: it {named}; there are: {', '.join(self.sources)}")
        return self.sources[source]

    def items(self) -> list[tuple[str, Any]]:
        """All sources' splits, by what each is for."""
        return [pair for splits in self.sources.values() for pair in splits.items()]

    def summary(self, only: str | None = None) -> str:
        """What each source is, or each that has the split that is named."""
        shown = {n: s for n, s in self.sources.items() if only is None or only in dict(s.items())}
        return "; ".join(f"{name}: {splits.summary(only)}" for name, splits in shown.items())


class Mix:
    """Goes over several loaders at once; a batch of it is a dict of batches by task name.

    What comes in which step depends on seed and epoch alone.

    Args:
        loaders: by source.
        tasks: from each task's name to its source.
        sampling, temperature, epoch: see `Sources`.
        seed: of what is drawn.
    """

    def __init__(
        self,
        loaders: Mapping[str, Loader],
        tasks: Mapping[str, str],
        *,
        sampling: str = "all",
        temperature: float = 2.0,
        epoch: str | int = "max",
        seed: int = 0,
    ) -> None:
        self.loaders = dict(loaders)
        self.tasks = dict(tasks)
        self.sampling = sampling
        self.temperature = temperature
        self.seed = seed
        lengths = [len(loader) for loader in self.loaders.values()]
        known = {"min": min(lengths), "max": max(lengths), "sum": sum(lengths)}
        self._length = epoch if isinstance(epoch, int) else known[epoch]

    def __len__(self) -> int:
        """Steps in an epoch."""
        return self._length

    def parts(self) -> list[tuple[Loader, list[str] | None]]:
        """Each loader with the tasks that it is for: how validation goes over them."""
        of = {name: [task for task, source in self.tasks.items() if source == name] for name in self.loaders}
        return [(loader, of[name]) for name, loader in self.loaders.items()]

    def batches(self, epoch: int = 0, *, start: int = 0) -> Iterator[Any]:
        """The epoch's batches by task name, from the one with number `start` on; tasks of one source share theirs.

        Where the loaders give micro-batches, a batch is the list of all sources' micro-batches by task name.
        """
        plan = self._plan(epoch)
        done = Counter(name for names in plan[:start] for name in names)
        streams = {name: self._stream(name, epoch, done[name]) for name in self.loaders}
        try:
            for names in plan[start:]:
                drawn = {name: next(streams[name]) for name in names}
                if any(self.loaders[name].is_cut for name in names):
                    yield [self._by_task({name: each}) for name in names for each in drawn[name]]
                else:
                    yield self._by_task(drawn)
        finally:
            for stream in streams.values():  # worker processes end with them
                stream.close()

    def _by_task(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        return {task: drawn[source] for task, source in self.tasks.items() if source in drawn}

    def sizes(self, epoch: int = 0, *, start: int = 0) -> Iterator[int]:
        """How many samples each of these batches has; those of a source count once."""
        plan = self._plan(epoch)
        done = Counter(name for names in plan[:start] for name in names)
        for names in plan[start:]:
            yield sum(self.loaders[name].size_of(done[name] % len(self.loaders[name])) for name in names)
            done.update(names)

    def samples(self, epoch: int, position: int) -> dict[str, list[int]]:
        """By source, the numbers of the samples in the epoch's batch with this number."""
        plan = self._plan(epoch)
        done = Counter(name for names in plan[:position] for name in names)
        found = {}
        for name in plan[position]:
            loader = self.loaders[name]
            again, batch = divmod(done[name], len(loader))
            found[name] = loader.samples(_again(epoch, again), batch)
        return found

    def progress(self, epoch: int, position: int) -> dict[str, Any]:
        """How far each task's data have been gone through after so many batches of the epoch, in plain types."""
        done = Counter(name for names in self._plan(epoch)[:position] for name in names)
        return {task: self.loaders[source].progress(epoch, done[source]) for task, source in self.tasks.items()}

    def _stream(self, name: str, epoch: int, done: int) -> Any:
        """The source's batches of this epoch without end, when so many have been taken."""
        loader = self.loaders[name]
        again, position = divmod(done, len(loader))
        while True:
            yield from loader.batches(_again(epoch, again), start=position)
            again, position = again + 1, 0

    def _plan(self, epoch: int) -> list[list[str]]:
        """By step, the sources that give a batch."""
        names = list(self.loaders)
        if self.sampling == "all":
            return [names] * len(self)
        if self.sampling == "round_robin":
            return [[names[(epoch * len(self) + step) % len(names)]] for step in range(len(self))]
        sizes = torch.tensor([loader.num_samples for loader in self.loaders.values()], dtype=torch.float64)
        chances = sizes ** (1 / self.temperature if self.sampling == "temperature" else 1.0)
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        drawn = torch.multinomial(chances, len(self), replacement=True, generator=torch.Generator().manual_seed(seed))
        return [[names[index]] for index in drawn.tolist()]


def _again(epoch: int, again: int) -> int:
    """A number for the epoch's further rounds of a source, which are in orders of their own."""
    return epoch + (again << 32)
