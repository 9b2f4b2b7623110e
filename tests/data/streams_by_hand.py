"""Made shard files, iterable data sets, and what a loader gives of them, in one process or several."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from mtl.data import Loader
from mtl.distributed.collectives import rank

SHARDS = 200


def made_shards(folder: Path) -> list[str]:
    """Writes 200 files of 3 to 7 samples, which are numbered from 0, and returns their paths."""
    number, paths = 0, []
    for shard in range(SHARDS):
        count = 3 + shard * 7 % 5
        numbers = list(range(number, number + count))
        lines = [json.dumps({"number": each, "x": [each / 1000, 1.0]}) + "\n" for each in numbers]
        path = folder / f"shard-{shard:03}.jsonl"
        path.write_text("".join(lines))
        paths.append(str(path))
        number += count
    return paths


TOTAL = sum(3 + shard * 7 % 5 for shard in range(SHARDS))


def hugging_face(paths: list[str], shuffled: bool = False) -> Any:
    """Returns the files as an iterable data set of Hugging Face."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(Path(paths[0]).parent / "cache")
    import datasets

    datasets.disable_progress_bars()
    data = datasets.load_dataset("json", data_files=paths, split="train", streaming=True)
    return data.shuffle(seed=5, buffer_size=20) if shuffled else data


class Plain(IterableDataset[Any]):
    """Numbered samples with random draws, in an order that depends on the pass."""

    def __init__(self, total: int = 101) -> None:
        self.total = total
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(self.total).tolist()
        for number in order:
            yield {"number": number, "x": torch.rand(2), "pass": self.epoch}


class Stateful(Plain):
    """Numbered samples, which go on after a state that was saved; counts how many are read."""

    def __init__(self, total: int = 101) -> None:
        super().__init__(total)
        self.done = 0
        self.num_read = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.done < self.total:
            self.done += 1
            self.num_read += 1
            yield {"number": (self.done + 31 * self.epoch) % self.total, "x": torch.rand(2), "pass": self.epoch}
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


class ByRank(Plain):
    """A data set that gives each process other samples."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (sample | {"number": sample["number"] + 1000 * rank()} for sample in super().__iter__())


class Parts(IterableDataset[Any]):
    """Numbered samples in shards, without a state."""

    def __init__(self, numbers: list[list[int]]) -> None:
        self.numbers = numbers

    @property
    def num_shards(self) -> int:
        return len(self.numbers)

    def shard(self, num_shards: int, index: int) -> "Parts":
        return Parts(self.numbers[index::num_shards])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"number": number, "x": torch.rand(2)} for shard in self.numbers for number in shard)


def data_set(kind: str, paths: list[str]) -> Any:
    """Returns a data set of a kind; called in each process."""
    if kind.startswith("hugging face"):
        return hugging_face(paths, shuffled=kind.endswith("shuffled"))
    if kind == "parts":
        return Parts([list(range(10 * shard, 10 * shard + 3 + shard % 3)) for shard in range(40)])
    return {"plain": Plain, "stateful": Stateful, "by rank": ByRank}[kind]()


Taken = list[tuple[int, list[Any]]]


def taken(
    kind: str,
    paths: list[str],
    epoch: int = 1,
    start: int | None = 0,
    state: dict[str, Any] | None = None,
    count: int = 10**9,
    epochs: int = 1,
    **options: Any,
) -> tuple[Taken, dict[str, Any]]:
    """Returns the sizes and the shares of batches of some epochs, from a position or state on, and the last state.

    A sample is its number with its random draws. `start` is the position that the state was saved at.
    """
    options = {"batch_size": 16, "seed": 3, "shuffle": True, **options}
    loader = Loader(data_set(kind, paths), **options)
    if state is not None:
        loader.restore(state, epoch, start)
    epoch, start = (epoch + 1, 0) if start is None else (epoch, start)
    batches: Taken = []
    after: dict[str, Any] = {}
    for each in range(epoch, epoch + epochs):
        position = start if each == epoch else 0
        pairs: Any = loader.sized_batches(each, start=position)
        for batch, size in pairs:
            position += 1
            samples = [] if not batch else list(zip(batch["number"].tolist(), batch["x"].tolist(), strict=True))
            batches.append((size, samples))
            if len(batches) == count:
                after = loader.progress(each, position)
                pairs.close()
                return batches, after
        after = loader.progress(each, None)
    loader.close()
    return batches, after


def part(folder: str, begin: int, end: int) -> Any:
    """Returns some of the made shards as an iterable data set of Hugging Face; for configs."""
    paths = sorted(str(path) for path in Path(folder).glob("*.jsonl"))
    return hugging_face(paths[begin:end]).map(labelled)


def labelled(sample: dict[str, Any]) -> dict[str, Any]:
    return {"x": [*sample["x"], random.random()], "odd": sample["number"] % 2, "third": sample["number"] % 3}
