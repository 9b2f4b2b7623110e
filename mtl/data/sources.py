"""Several data sources, each for some of the tasks, and which source provides a batch in which step."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mtl.choices import LENGTHS, SAMPLING
from mtl.data.fields import Splits
from mtl.data.loader import Loader, paired
from mtl.data.loading_errors import other_data
from mtl.errors import UserError
from mtl.seeds import seed_of


class Sources:
    """Several data sources by name; each task names its source in `tasks.NAME.source`.

    Args:
        sources: The `Splits` of each source, by name.
        sampling: Which sources provide a batch in a step. `all`: every source; `round_robin`: one after the other;
            `proportional`: one drawn in proportion to its number of samples n; `temperature`: one drawn in proportion
            to n^(1/temperature).
        temperature: A number of at least 1; the higher, the more equal the probabilities of the sources.
        epoch: The number of steps in an epoch: the number of batches of the shortest (`min`) or longest (`max`) source,
            of all sources together (`sum`), or an integer. An exhausted source begins again, in another order.

    Raises:
        UserError: If an argument is invalid.
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
            raise UserError("data.sources: name at least one source, such as {digits: {_target_: mtl.data.mnist}}")
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
        """Returns the fact with the given key of a source, or the fact that all sources agree on if no source is named.

        Raises:
            UserError: If there is no such fact, or if no source is named and the facts of the sources differ.
        """
        if source is not None:
            return self.sources[source].fact(key, None)
        by_source = {name: facts[key] for name, facts in self.facts.items() if key in facts}
        values = list(by_source.values())
        if not values:
            available = sorted({name for facts in self.facts.values() for name in facts})
            raise UserError(f"the data have no fact '{key}'; they have: {', '.join(available) or 'none'}")
        if any(value != values[0] for value in values):
            raise UserError(f"the sources {', '.join(by_source)} have different facts '{key}'; write the value itself")
        return values[0]

    def of_task(self, task: str, source: str | None) -> Splits:
        """Returns the data of the task.

        Raises:
            UserError: If the source is unknown.
        """
        if source not in self.sources:
            named = "names no source" if source is None else f"names the source '{source}'"
            raise UserError(f"tasks.{task}.source: the task {named}; the sources are: {', '.join(self.sources)}")
        return self.sources[source]

    def items(self) -> list[tuple[str, Any]]:
        """Returns the splits of all sources as pairs of split name and data set."""
        return [pair for splits in self.sources.values() for pair in splits.items()]

    def summary(self, only: str | None = None) -> str:
        """Describes each source, or each source that has the split `only`."""
        shown = {n: s for n, s in self.sources.items() if only is None or only in dict(s.items())}
        return "; ".join(f"{name}: {splits.summary(only)}" for name, splits in shown.items())


class Mix:
    """Iterates over several loaders together; a batch is a dict of batches by task name.

    Which source provides a batch in which step depends only on seed and epoch.

    Args:
        loaders: The loaders, by source.
        tasks: The source of each task, by task name.
        sampling, temperature, epoch: See `Sources`.
        seed: The seed for drawing the sources.
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
        named = {"min": min(lengths), "max": max(lengths), "sum": sum(lengths)}
        self._length = epoch if isinstance(epoch, int) else named[epoch]

    def __len__(self) -> int:
        """Returns the number of steps in an epoch."""
        return self._length

    def by_source(self) -> list[tuple[Loader, list[str] | None]]:
        """Returns each loader with the names of its tasks; validation iterates over this list."""
        of = {name: [task for task, source in self.tasks.items() if source == name] for name in self.loaders}
        return [(loader, of[name]) for name, loader in self.loaders.items()]

    def batches(self, epoch: int = 0, *, start: int = 0) -> Iterator[Any]:
        """Yields the epoch's batches by task name, from batch number `start` on; tasks of one source share a batch.

        If the loaders yield micro-batches, a batch is the list of the micro-batches of all sources, each by task name.
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
            for stream in streams.values():  # ends the worker processes
                stream.close()

    def _by_task(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        return {task: drawn[source] for task, source in self.tasks.items() if source in drawn}

    def sizes(self, epoch: int = 0, *, start: int = 0) -> Iterator[int]:
        """Yields the number of samples of each batch; the samples of a source count once, however many tasks it has."""
        plan = self._plan(epoch)
        done = Counter(name for names in plan[:start] for name in names)
        for names in plan[start:]:
            yield sum(self.loaders[name].size_of(done[name] % len(self.loaders[name])) for name in names)
            done.update(names)

    def samples(self, epoch: int, position: int) -> dict[str, list[int]]:
        """Returns, by source, the numbers of the samples in the batch at this position of the epoch."""
        plan = self._plan(epoch)
        done = Counter(name for names in plan[:position] for name in names)
        numbers: dict[str, Any] = {}
        for name in plan[position]:
            loader = self.loaders[name]
            again, batch = divmod(done[name], len(loader))
            numbers[name] = loader.samples(_again(epoch, again), batch)
        return numbers

    def sized_batches(self, epoch: int = 0, *, start: int = 0) -> Iterator[tuple[Any, int]]:
        """Yields the batches of `batches`, each with its number of samples in all processes."""
        return paired(self.batches(epoch, start=start), self.sizes(epoch, start=start))

    def restore(self, saved: Mapping[str, Any], epoch: int, position: int | None) -> None:
        """Checks that a saved position, as `progress` describes it, is one in these data.

        Raises:
            UserError: If it isn't.
        """
        ours = self.progress(epoch, position)
        if saved != ours:
            raise other_data(saved, ours)

    def progress(self, epoch: int, position: int | None) -> dict[str, Any]:
        """Describes in plain types how much of each task's data has been used after `position` batches of the epoch."""
        done = Counter(name for names in self._plan(epoch)[: position or 0] for name in names)
        return {task: self.loaders[source].progress(epoch, done[source]) for task, source in self.tasks.items()}

    def _stream(self, name: str, epoch: int, done: int) -> Any:
        """Yields the source's batches of this epoch without end, beginning after `done` batches."""
        loader = self.loaders[name]
        again, position = divmod(done, len(loader))
        while True:
            yield from loader.batches(_again(epoch, again), start=position)
            again, position = again + 1, 0

    def _plan(self, epoch: int) -> list[list[str]]:
        """Returns, for each step, the sources that provide a batch."""
        names = list(self.loaders)
        if self.sampling == "all":
            return [names] * len(self)
        if self.sampling == "round_robin":
            return [[names[(epoch * len(self) + step) % len(names)]] for step in range(len(self))]
        sizes = torch.tensor([loader.num_samples for loader in self.loaders.values()], dtype=torch.float64)
        chances = sizes ** (1 / self.temperature if self.sampling == "temperature" else 1.0)
        seed = seed_of(self.seed, epoch)
        drawn = torch.multinomial(chances, len(self), replacement=True, generator=torch.Generator().manual_seed(seed))
        return [[names[index]] for index in drawn.tolist()]


def _again(epoch: int, again: int) -> int:
    """Returns an epoch number for a repeated pass over a source within an epoch, so that its order differs."""
    return epoch + (again << 32)
