"""Batches: their order depends only on seed and epoch, and they are the same for every way of loading."""

import gc
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import mtl
from mtl.data import Fields, Loader, Stream
from mtl.errors import dead_worker

FIELDS = Fields({"x": torch.arange(10.0).view(10, 1), "y": torch.arange(10)})


class Samples(Dataset):
    """The same data, sample by sample."""

    def __len__(self) -> int:
        return len(FIELDS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        return {**FIELDS[index], "in_worker": torch.tensor(worker is not None)}


def order(loader: Loader, epoch: int) -> list[list[int]]:
    return [batch["y"].tolist() for batch in loader.batches(epoch)]


def test_every_sample_once_and_a_short_last_batch() -> None:
    loader = Loader(FIELDS, batch_size=4, shuffle=True)
    batches = order(loader, 1)
    assert len(loader) == 3
    assert [len(b) for b in batches] == [4, 4, 2]
    assert sorted(sum(batches, [])) == list(range(10))
    assert order(Loader(FIELDS, batch_size=4), 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = order(Loader(FIELDS, batch_size=4, shuffle=True, seed=3), 2)
    loader = Loader(FIELDS, batch_size=4, shuffle=True, seed=3)
    order(loader, 1)
    torch.rand(5)
    assert order(loader, 2) == first
    assert order(loader, 1) != first
    assert order(Loader(FIELDS, batch_size=4, shuffle=True, seed=4), 2) != first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_through_a_dataloader_come_as_the_fields_do(num_workers: int) -> None:
    draws = torch.get_rng_state()
    memory = Loader(FIELDS, batch_size=4, shuffle=True, seed=3)
    loaded = Loader(Samples(), batch_size=4, shuffle=True, seed=3, num_workers=num_workers)
    for epoch in (1, 2):
        for expected, batch in zip(memory.batches(epoch), loaded.batches(epoch), strict=True):
            assert torch.equal(expected["x"], batch["x"])
            assert torch.equal(expected["y"], batch["y"])
            assert batch["in_worker"].all() == (num_workers > 0)
    assert torch.equal(draws, torch.get_rng_state())  # nothing is drawn from the generator that training draws from


def test_collate_makes_the_batches() -> None:
    def flat(samples: list[dict[str, torch.Tensor]]) -> dict[str, object]:
        return {"rows": torch.cat([sample["x"] for sample in samples]), "names": [int(s["y"]) for s in samples]}

    for dataset in (FIELDS, Samples()):
        batches = list(Loader(dataset, batch_size=4, collate=flat).batches())
        assert [batch["names"] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert batches[2]["rows"].tolist() == [8, 9]
    with pytest.raises(mtl.UserError, match=r"data\.collate returns a list; a batch must be a dict of fields"):
        list(Loader(Samples(), batch_size=4, collate=list).batches())


class Bags(Dataset):
    """Samples with a number of items each."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"ids": torch.full((1 + index % 3,), index), "click": torch.tensor(index)}


def flat(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns all items in one tensor, with the number of the sample of each item."""
    lengths = torch.tensor([len(sample["ids"]) for sample in samples])
    return {
        "ids": torch.cat([sample["ids"] for sample in samples]),
        "segment": torch.repeat_interleave(torch.arange(len(samples)), lengths),
        "click": torch.stack([sample["click"] for sample in samples]),
    }


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("how", "cuts"),
    [({"micro_batch_size": 3}, [[3, 1], [3, 1], [2]]), ({"num_micro_batches": 3}, [[1, 1, 2], [1, 1, 2], [1, 1]])],
)
def test_each_micro_batch_is_collated_by_itself(how: dict[str, int], cuts: list[list[int]], num_workers: int) -> None:
    options = {"batch_size": 4, "shuffle": True, "seed": 3, "collate": flat, "num_workers": num_workers}
    whole = list(Loader(Bags(), **options).batches(2))
    micro = list(Loader(Bags(), **options, **how).batches(2))
    assert [[len(each["click"]) for each in pieces] for pieces in micro] == cuts
    for pieces, batch in zip(micro, whole, strict=True):
        assert torch.equal(torch.cat([each["click"] for each in pieces]), batch["click"])
        assert torch.equal(torch.cat([each["ids"] for each in pieces]), batch["ids"])
        for each in pieces:
            assert torch.equal(each["click"][each["segment"]], each["ids"])


def test_micro_batches_of_data_in_memory_and_of_streams() -> None:
    for dataset in (FIELDS, Samples(), Stream([FIELDS[i] for i in range(10)], 10)):
        loader = Loader(dataset, batch_size=4, shuffle=True, seed=3, micro_batch_size=3)
        whole = Loader(dataset, batch_size=4, shuffle=True, seed=3)
        for pieces, batch in zip(loader.batches(1), whole.batches(1), strict=True):
            assert torch.equal(torch.cat([each["x"] for each in pieces]), batch["x"])
    assert [len(pieces) for pieces in loader.batches(1)] == [2, 2, 1]


def test_samples_are_counted_by_the_sampler() -> None:
    loader = Loader(Bags(), batch_size=4, collate=flat)
    assert list(loader.sizes(1)) == [4, 4, 2]
    assert list(loader.sizes(1, start=1)) == [4, 2]
    assert list(Loader(Bags(), batch_size=4, collate=flat, drop_last=True).sizes()) == [4, 4]
    for batch, size in zip(loader.batches(1), loader.sizes(1), strict=True):
        assert len(batch["click"]) == size != len(batch["ids"])


class Broken(Samples):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 7:
            raise self.error
        return super().__getitem__(index)


def said(dataset: Dataset, num_workers: int) -> str:
    with pytest.raises(mtl.UserError) as error:
        list(Loader(dataset, batch_size=4, num_workers=num_workers).batches())
    text = str(error.value)
    del error
    gc.collect()  # ends the workers here, while they are waited for only briefly
    return text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_went_wrong_in_a_worker_is_told(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    damaged = said(Broken(mtl.UserError("7.jpg is damaged")), num_workers)
    assert damaged == "data: a batch of Broken can't be loaded: sample 7: 7.jpg is damaged"
    other = said(Broken(RuntimeError("no more")), num_workers)
    assert other.startswith("data: a batch of Broken can't be loaded: sample 7: RuntimeError: no more")


class Uneven(Samples):
    """Samples, one of which has other fields than the others."""

    def __init__(self, odd: int, change: dict[str, object], gone: str = "") -> None:
        self.odd, self.change, self.gone = odd, change, gone

    def __getitem__(self, index: int) -> dict[str, object]:
        sample = {**super().__getitem__(index), "more": {"a": 1}}
        if index == self.odd:
            sample |= self.change
            sample.pop(self.gone, None)
        return sample


class UnevenStream(IterableDataset):
    def __len__(self) -> int:
        return 10

    def __iter__(self):
        for index in range(10):
            yield {"y": index, "extra": 1} if index == 5 else {"y": index}


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 2}])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Uneven(7, {"extra": 1}), "sample 7: it has 'extra', unlike sample 0; all samples need the same fields, or a"),
        (Uneven(0, {"extra": 1}), "sample 1: it lacks 'extra', unlike sample 0"),
        (Uneven(6, {}, "y"), "sample 6: it lacks 'y', unlike sample 0"),
        (Uneven(6, {"z": 1}, "y"), "sample 6: it lacks 'y' and has 'z', unlike sample 0"),
        (Uneven(6, {"more": {"b": 1}}), "sample 6: it lacks 'more.a' and has 'more.b', unlike sample 0"),
        (UnevenStream(), "sample 5: it has 'extra', unlike sample 0"),
    ],
)
def test_samples_with_other_fields_are_named(dataset, message, num_workers, how, monkeypatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(mtl.UserError) as error:
        list(Loader(dataset, batch_size=4, num_workers=num_workers, of="train of digits", **how).batches())
    name = type(dataset).__name__
    assert str(error.value).startswith(f"data: a batch of {name} (train of digits) can't be loaded: {message}")


class Odd(Samples):
    """Samples, one of which is of another kind than the others."""

    def __init__(self, odd: Any, usual: Any = None) -> None:
        self.odd, self.usual = odd, torch.zeros(2) if usual is None else usual

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "f": self.odd if index == 6 else self.usual}


UNLIKE = {
    "shape": (
        torch.zeros(3),
        None,
        "field 'f' is float32 of shape (2,) in samples 4, 5, 7, float32 of shape (3,) in sample 6",
    ),
    "dimensions": (torch.zeros(2, 1), None, "float32 of shape (2, 1) in sample 6"),
    "array": (
        np.zeros(3),
        np.zeros(2),
        "field 'f' is float64 of shape (2,) in samples 4, 5, 7, float64 of shape (3,) in sample 6",
    ),
    "text": ("none", None, "field 'f' is float32 of shape (2,) in samples 4, 5, 7, of type str in sample 6"),
    "nested": (
        {"g": {"h": torch.zeros(3)}},
        {"g": {"h": torch.zeros(2)}},
        "field 'f.g.h' is float32 of shape (2,) in samples 4, 5, 7, float32 of shape (3,) in sample 6",
    ),
    "texts": (["a"], ["a", "b"], "field 'f' is a list of length 2 in samples 4, 5, 7, a list of length 1 in sample 6"),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", UNLIKE)
def test_samples_that_make_no_batch(name: str, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The field, the sizes and the samples are told, from a worker process as from this one."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    odd, usual, message = UNLIKE[name]
    text = said(Odd(odd, usual), num_workers)
    assert text.startswith("data: a batch of Odd can't be loaded: field 'f")
    assert message in text
    assert text.endswith("Samples of unequal size need a data.collate that makes a batch of them")


def test_samples_of_a_stream_that_make_no_batch() -> None:
    class Uneven(IterableDataset):
        def __len__(self) -> int:
            return 12

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter({"f": torch.zeros(3 if index == 6 else 2)} for index in range(12))

    loader = Loader(Uneven(), batch_size=4)
    for start in (0, 1):  # a run that goes on counts as before
        with pytest.raises(mtl.UserError, match=r"in samples 4, 5, 7, float32 of shape \(3,\) in sample 6"):
            list(loader.batches(start=start))


def test_micro_batches_that_are_unlike_one_another_are_batches() -> None:
    loader = Loader(Odd(torch.zeros(3)), batch_size=4, micro_batch_size=1)
    assert [len(micro["f"][0]) for batch in loader.batches() for micro in batch] == [2, 2, 2, 2, 2, 2, 3, 2, 2, 2]


def unequal(samples: list[Any]) -> Any:
    raise KeyError("width")


def leaves(samples: list[Any]) -> Any:
    sys.exit(3)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("collate", "what"), [(unequal, "KeyError: 'width'"), (leaves, "SystemExit: 3")])
def test_a_collate_that_fails(
    collate: Callable[..., Any], what: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(mtl.UserError) as error:
        list(Loader(Samples(), batch_size=4, num_workers=num_workers, collate=collate).batches())
    place = rf"\(test_loader.py, line {collate.__code__.co_firstlineno + 1}\)"
    message = rf"data: a batch of Samples can't be loaded: data.collate fails on samples 0, 1, 2, 3: {what} {place}"
    assert re.fullmatch(message, str(error.value)), str(error.value)
    del error
    gc.collect()


def test_a_collate_of_ones_own_may_take_samples_with_other_fields() -> None:
    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"extra": torch.tensor([sample.get("extra", 0) for sample in samples])}

    dataset = Uneven(7, {"extra": 3})
    extra = [b["extra"] for b in Loader(dataset, batch_size=4, collate=collate).batches()]
    assert torch.cat(extra).tolist() == [0] * 7 + [3] + [0] * (len(dataset) - 8)


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class TwoArguments(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one}\nand {two}")


RAISED = {
    "lines": (TwoArguments(1, 2), r"sample 7: TwoArguments: 1 \(test_loader.py, line \d+\)"),
    "sentences": (mtl.UserError("one\ntwo"), "sample 7: one\ntwo"),
    "none": (OSError(), r"sample 7: OSError \(test_loader.py, line \d+\)"),
    "no text": (
        NoText(),
        r"sample 7: NoText: its message can't be shown, since its __str__ raises RuntimeError \(test_loader.py, line \d+\)",
    ),
    "exit": (SystemExit(0), r"sample 7: SystemExit: 0 \(test_loader.py, line \d+\)"),
    "like a dead worker": (
        RuntimeError("DataLoader worker (pid 7) is mine"),
        r"sample 7: RuntimeError: DataLoader worker \(pid 7\) is mine \(test_loader.py, line \d+\)",
    ),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", [Broken, "stream"])
@pytest.mark.parametrize("name", RAISED)
def test_what_a_data_set_raises_is_told_with_the_sample_and_the_line(
    name: str, kind: Any, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    raised, message = RAISED[name]
    dataset = Stream(BrokenStream(raised), 10) if kind == "stream" else kind(raised)
    text = said(dataset, num_workers)
    assert re.fullmatch(rf"data: a batch of (Broken|Stream) can't be loaded: {message}", text), text


class BrokenStream(IterableDataset):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(10):
            if index == 7:
                raise self.error
            yield {"y": index}


class Ends(Samples):
    def __init__(self, how: str) -> None:
        self.how = how

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            if self.how == "exit":
                os._exit(5)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize(("how", "what"), [("exit", "ended: exit code 5"), ("kill", "ended: killed by signal 9")])
def test_a_worker_that_really_died_is_known(how: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(mtl.UserError) as error:
        list(Loader(Ends(how), batch_size=4, num_workers=1).batches())
    died = dead_worker(error.value)
    assert died is not None
    assert died.startswith("DataLoader worker (pid")
    assert re.search(what, died), died
    del error
    gc.collect()


def test_no_other_error_is_a_dead_worker() -> None:
    for error in (
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nstack expects each tensor to be equal size"),
        ValueError("DataLoader worker (pid 1) is killed by signal: Killed."),
        mtl.UserError("DataLoader worker (pid 1) is killed by signal: Killed."),
    ):
        assert dead_worker(error) is None
    real = RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")
    assert dead_worker(real) == "DataLoader worker (pid 1) is killed by signal: Killed"


class Draws(IterableDataset):
    """Numbered samples with draws from all three random generators."""

    def __len__(self) -> int:
        return 10

    def __iter__(self):
        for index in range(12):
            drawn = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])
            yield {"y": index, "drawn": drawn}


def test_iterable_data_sets() -> None:
    outside = torch.get_rng_state(), random.getstate()
    epochs = {}
    for num_workers in (0, 1, 3):
        loader = Loader(Draws(), batch_size=4, seed=3, shuffle=True, num_workers=num_workers)
        assert len(loader) == 3
        for epoch in (1, 2):
            batches = list(loader.batches(epoch))
            assert [batch["y"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
            drawn = torch.cat([batch["drawn"] for batch in batches])
            assert len(drawn.unique()) == 30
            assert torch.equal(epochs.setdefault(epoch, drawn), drawn)  # whatever the number of workers
            for start in range(4):
                rest = [batch["drawn"] for batch in loader.batches(epoch, start=start)] if num_workers < 3 else []
                assert num_workers == 3 or torch.equal(torch.cat([*rest, drawn[:0]]), drawn[4 * start :])
    assert not torch.equal(epochs[1], epochs[2])
    assert torch.equal(outside[0], torch.get_rng_state())
    assert outside[1] == random.getstate()
    assert [len(batch["y"]) for batch in Loader(Draws(), batch_size=4, drop_last=True).batches()] == [4, 4]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterable_data_set_that_ends_too_early(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    assert said(Stream(Draws(), 15), num_workers).endswith("Stream ends after 12 samples, but its length is 15")
