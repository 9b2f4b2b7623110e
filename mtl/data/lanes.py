"""Reading of iterable data sets from a place at which an earlier reading ended."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils import worker

from mtl.data.alike import Alike
from mtl.data.collating import Numbered
from mtl.data.seeded import of_sample, readable
from mtl.errors import FOREIGN, UserError
from mtl.process.seeding import cpu_states, seed_cpu, set_cpu_states
from mtl.seeds import seed_of

READERS = {"processes": 8, "workers": 4}  # the default of `data.readers`
PROBED = 3  # the number of samples before and after the state by which `restores` judges
_END: Any = object()
_INNER = ("dataset", "_ex_iterable", "ex_iterable", "ex_iterables")  # where data sets have those that they read


@dataclass
class Place:
    """Where a reading ended.

    Attributes:
        taken: The number of samples that were read.
        state: The data set's own state, if it has one that restores its place.
        ended: Whether all samples were read.
    """

    taken: int = 0
    state: Any = None
    ended: bool = False


def length_of(dataset: Any) -> int | None:
    """Returns the number of samples in a data set; None if it has no length."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def is_stateful(dataset: Any) -> bool:
    """Returns whether a data set has a state as `torchdata`'s StatefulDataLoader uses it."""
    return all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))


class Lane:
    """The samples of an iterable data set in one pass, or of a part of it, from a place on.

    The random draws for a sample depend only on the seeds and on the number of the sample.

    Args:
        dataset: The data set or the part.
        seeds: Numbers from which the seed of each sample is derived.
        number: The number of the pass, which the data set gets by its method `set_epoch`, if it has one.
        place: Where to begin.
        initial: The state of the data set before any reading, if it has one.
        saves: Whether `place` returns the data set's state.
        alike: Whether all samples need the same fields.
        of: The name of the part, for error messages.
    """

    def __init__(
        self,
        dataset: Any,
        seeds: tuple[int, ...],
        number: int,
        place: Place | None = None,
        *,
        initial: Any = None,
        saves: bool = False,
        alike: bool = False,
        of: str = "",
    ) -> None:
        self._dataset = dataset
        self._seeds = seeds
        self._number = number
        self._from = place or Place()
        self._initial = initial
        self._saves = saves
        self._alike = Alike() if alike else None
        self._of = of
        self._taken = self._from.taken
        self._ended = self._from.ended
        self._samples = self._read()

    def take(self, count: int) -> list[Numbered]:
        """Returns the next samples with their numbers; fewer than `count` at the end."""
        taken: list[Numbered] = []
        while len(taken) < count and not self._ended:
            sample = next(self._samples, _END)
            if sample is _END:
                self._ended = True
            else:
                taken.append((self._taken, sample))
                self._taken += 1
        return taken

    def place(self) -> Place:
        """Returns where the reading is."""
        state = None
        if self._saves and not self._ended:
            state = self._from.state if self._taken == self._from.taken else state_of(self._dataset)
        return Place(self._taken, state, self._ended)

    def _read(self) -> Iterator[Any]:
        start = 0 if self._from.state is None else self._from.taken
        samples: Any = None
        for index in self._numbers(start):
            before = cpu_states()
            try:
                seed_cpu(seed_of(*self._seeds, index))
                if samples is None:
                    samples = self._begin()
                sample = next(samples, _END)
                if sample is _END:
                    return
                if self._alike is not None:
                    sample = self._alike(readable(sample), index)
            except FOREIGN as error:
                raise of_sample(index, error, self._of) from error
            finally:
                set_cpu_states(before)
            if index >= self._from.taken:  # a data set without a state is read from its beginning
                yield sample

    def _numbers(self, start: int) -> Iterator[int]:
        while True:
            yield start
            start += 1

    def _begin(self) -> Iterator[Any]:
        """Returns an iterator of the data set, after setting its pass and its state."""
        worker._worker_info = None  # data sets that ask for it would draw other random numbers in a worker process
        set_pass(self._dataset, self._number)
        state = self._initial if self._from.state is None else self._from.state
        if state is not None:
            self._dataset.load_state_dict(copy.deepcopy(state))
        return iter(self._dataset)


def set_pass(dataset: Any, number: int) -> None:
    """Calls the data set's method `set_epoch`, if it has one, with the number of the pass."""
    if callable(getattr(dataset, "set_epoch", None)):
        dataset.set_epoch(number)


def state_of(dataset: Any) -> Any:
    """Returns a copy of a data set's state.

    Raises:
        UserError: If the state has values that a checkpoint can't contain.
    """
    state = copy.deepcopy(dataset.state_dict())
    for leaf in tree_leaves(state):
        if not (leaf is None or type(leaf) in (bool, int, float, str, bytes, Tensor)):
            raise UserError(
                f"the state_dict of {type(dataset).__name__} contains a {type(leaf).__name__}; a checkpoint can hold "
                "numbers, texts, tensors, lists and dicts of them"
            )
    return state


def restores(dataset: Any, initial: Any, seeds: tuple[int, ...]) -> bool:
    """Returns whether the data set continues with the right samples from a state that it saved.

    The first samples are read once without an interruption and once with one. States of Hugging Face leave out the
    samples in a shuffle buffer, which would be lost.
    """
    if _has_shuffle_buffer(dataset):
        return False
    lane = Lane(dataset, seeds, 1, initial=initial, saves=True)
    lane.take(PROBED)
    place = lane.place()
    expected = lane.take(PROBED)
    if place.ended:
        return False
    again = Lane(dataset, seeds, 1, place, initial=initial).take(PROBED)
    if initial is not None:
        dataset.load_state_dict(copy.deepcopy(initial))
    return digest(expected) == digest(again)


def _has_shuffle_buffer(value: Any) -> bool:
    if type(value).__name__ == "BufferShuffledExamplesIterable":
        return True
    if isinstance(value, list):
        return any(map(_has_shuffle_buffer, value))
    inner = (vars(value).get(name) for name in _INNER if hasattr(value, "__dict__"))
    return any(_has_shuffle_buffer(each) for each in inner if each is not None)


def digest(value: Any) -> int:
    """Returns a checksum of nested values, which is the same in all processes."""
    total = 0
    for leaf in tree_leaves(dict(value) if isinstance(value, Mapping) else value):
        if isinstance(leaf, Tensor | np.ndarray):
            array = leaf.detach().cpu() if isinstance(leaf, Tensor) else torch.as_tensor(leaf)
            text = f"{array.dtype}{tuple(array.shape)}".encode()
            content = array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
        else:
            text, content = type(leaf).__name__.encode(), repr(leaf).encode() if _is_plain(leaf) else b""
        total = crc32(content, crc32(text, total))
    return total


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | bytes | np.generic)
