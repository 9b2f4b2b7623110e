"""Iterable data sets and shard files: divided over processes and workers, and continued."""

import multiprocessing
import re
from typing import Any

import pytest
import torch
from conftest import slow_but
from processes import processes
from streams_by_hand import TOTAL, Parts, Plain, Stateful, Taken, data_set, made_shards, taken
from torch.utils.data import IterableDataset

import mtl
from mtl.config.data import build_loaders
from mtl.data import Fields, Loader, Sources, Splits, Stream, datasets

KINDS = ("plain", "stateful", "parts", "hugging face", "hugging face shuffled")
IN_PARTS = [10 * shard + each for shard in range(40) for each in range(3 + shard % 3)]
EXPECTED = {"plain": range(101), "stateful": range(101), "parts": IN_PARTS}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return made_shards(tmp_path_factory.mktemp("shards"))


def numbers(batches: Taken) -> list[int]:
    return [number for _, samples in batches for number, _ in samples]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_has_each_sample_once_whatever_the_number_of_workers(kind: str, paths: list[str]) -> None:
    one, _ = taken(kind, paths, epoch=0)
    two, _ = taken(kind, paths, epoch=0, num_workers=2)
    assert one == two
    assert sorted(numbers(one)) == list(EXPECTED.get(kind, range(TOTAL)))
    assert [size for size, _ in one] == [len(samples) for _, samples in one]
    micro = Loader(data_set(kind, paths), batch_size=16, micro_batch_size=3, seed=3)
    cut = [number for batch in micro.batches() for each in batch for number in each["number"].tolist()]
    assert cut == numbers(one)


@pytest.mark.parametrize("kind", slow_but(["stateful", "parts", "hugging face"], KINDS))
def test_epochs_of_so_many_steps_go_through_the_passes_and_continue_from_a_state(kind: str, paths: list[str]) -> None:
    steps = 26 if kind.startswith("hugging face") else 9
    whole, _ = taken(kind, paths, steps=steps, epochs=3)
    assert len(whole) == 3 * steps
    total = len(EXPECTED.get(kind, range(TOTAL)))
    for begin in range(0, len(numbers(whole)) - total + 1, total):
        assert len(set(numbers(whole)[begin : begin + total])) == total
    assert len({tuple(draws) for _, samples in whole for _, draws in samples}) >= total
    for count, start in ((steps + 6, 6), (10**9, None)):  # in epoch 2, and at its end
        done, state = taken(kind, paths, steps=steps, count=count, epochs=2)
        rest, _ = taken(kind, paths, 2, start, state, steps=steps, epochs=2 if start else 1, num_workers=2)
        assert done + rest == whole


def test_passes_are_numbered_and_the_batches_are_consecutive_samples() -> None:
    loader = Loader(Plain(10), batch_size=4, seed=3, shuffle=True, steps=4)
    passes = [set(batch["pass"].tolist()) for epoch in (1, 2) for batch in loader.batches(epoch)]
    assert passes == [{1}, {1}, {1}, {2}, {2}, {2}, {3}, {3}]
    assert [len(batch["x"]) for batch in loader.batches(3)] == [2, 4, 4, 2]
    loader.close()
    dropping = Loader(Stateful(10), batch_size=4, shuffle=True, steps=5, drop_last=True)
    assert [batch["number"].tolist() for batch in dropping.batches(1)][0] == [2, 3, 4, 5]
    assert [len(batch["x"]) for batch in dropping.batches(2)] == [4] * 5
    dropping.close()


def test_a_batch_that_is_only_tried_does_not_move_the_stream(paths: list[str]) -> None:
    whole, _ = taken("stateful", paths, steps=9)
    _, state = taken("stateful", paths, steps=9, count=4)
    loader = Loader(Stateful(), batch_size=16, seed=3, shuffle=True, steps=9)
    loader.restore(state, 1, 4)
    tried: Any = loader.batches(1)
    assert next(tried)["number"].tolist() == numbers(whole[:1])
    tried.close()
    rest = [number for batch in loader.batches(1, start=4) for number in batch["number"].tolist()]
    assert rest == numbers(whole[4:])


def test_a_data_set_with_a_state_is_not_read_again_and_others_are(paths: list[str]) -> None:
    for data, read in ((Stateful(), 32), (Stateful(1000), 32)):
        _, state = taken("stateful", paths, steps=9, count=3)
        loader = Loader(data, batch_size=16, seed=3, shuffle=True, steps=9)
        loader.restore(state, 1, 3)
        assert loader.stream is not None
        assert loader.stream.notes() == []  # reads some samples
        before = data.num_read
        batches: Any = loader.batches(1, start=3)
        next(batches), next(batches)
        batches.close()
        assert data.num_read - before == read
    for data, reason in (
        (Plain(), "has no state_dict"),
        (Forgetful(), "does not restore its place from its state_dict"),
        (data_set("hugging face shuffled", paths), "does not restore its place from its state_dict"),
    ):
        stream = Loader(data, batch_size=16, shuffle=True, steps=9).stream
        assert stream is not None
        assert f"{reason}: a resumed run reads the samples of the current pass again" in stream.notes()[-1]
    stream = Loader(Plain(), batch_size=16, shuffle=True, steps=9, num_workers=3).stream
    assert stream is not None
    assert stream.notes()[0].endswith("each of 3 readers reads all samples and keeps its share")


class Forgetful(Plain):
    """A data set whose state has no meaning."""

    def state_dict(self) -> dict[str, Any]:
        return {"nothing": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("kind", slow_but(["stateful", "hugging face"], KINDS[:-1]))
def test_processes_share_each_batch_and_continue_in_another_number(kind: str, paths: list[str]) -> None:
    whole, _ = taken(kind, paths, steps=16, epochs=2)
    states = {}
    for count in (2, 3):
        answers = processes(count)(call, kind, paths, {"steps": 16, "count": 13, "num_workers": 3 - count})
        assert joined(answers) == ordered(whole[:13])
        states[count] = [state for _, state in answers]
        assert all(state == states[count][0] for state in states[count])
    assert states[2] == states[3][:2]
    for before, after in ((2, 3), (3, 2)):
        settings = {"steps": 16, "epochs": 2, "start": 13, "state": states[before][0]}
        assert joined(processes(after)(call, kind, paths, settings)) == ordered(whole[13:])
    rest, _ = taken(kind, paths, 1, 13, states[3][0], steps=16, epochs=2, num_workers=2)
    assert rest == whole[13:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stateful", "hugging face"])
def test_processes_with_several_workers_each_share_each_batch(kind: str, paths: list[str]) -> None:
    """Each worker imports torch first, which takes most of the time."""
    whole, _ = taken(kind, paths, steps=16)
    state: Any = None
    for count, start, end in ((2, 0, 7), (3, 7, 16)):
        settings = {"steps": 16, "start": start, "state": state, "count": end - start, "num_workers": 2}
        answers = processes(count)(call, kind, paths, settings)
        assert joined(answers) == ordered(whole[start:end])
        state = answers[0][1]


def call(kind: str, paths: list[str], settings: dict[str, Any]) -> Any:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may start workers
    return taken(kind, paths, **settings)


def ordered(batches: Taken) -> Taken:
    return [(size, sorted(samples)) for size, samples in batches]


def joined(answers: list[tuple[Taken, Any]]) -> Taken:
    """Returns the batches of all processes together."""
    together = []
    for shares in zip(*(batches for batches, _ in answers), strict=True):
        (size,) = {size for size, _ in shares}
        together.append((size, [sample for _, samples in shares for sample in samples]))
    return ordered(together)


def test_processes_that_would_read_wrong_samples_are_refused(paths: list[str]) -> None:
    with pytest.raises(RuntimeError, match="ByRank gives different samples in the processes of rank 0 and 1"):
        processes(2)(call, "by rank", paths, {"steps": 3})
    readers = {"processes": 2}
    with pytest.raises(RuntimeError, match="data.readers.processes is 2, .* between 2 processes, and there are 3"):
        processes(3)(call, "parts", paths, {"steps": 3, "readers": readers})


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return ({"x": torch.ones(1) * number} for number in range(10**9))


class Nothing(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": Endless()}, "data.train: Endless has no length; set data.epoch to the number of steps in an epoch"),
        ({"train": Fields({"x": torch.ones(3)}), "epoch": 3}, "data.epoch is for iterable data sets; an epoch of Fie"),
        ({"train": Endless(), "epoch": "max"}, "data.epoch is 'max'; it must be a whole number of steps of at least 1"),
        ({"train": Endless(), "epoch": 3, "readers": {"process": 2}}, "data.readers is {'process': 2}; it must have"),
        ({"train": Endless(), "epoch": 3, "readers": {"workers": 0}}, "data.readers is {'workers': 0}; it must have"),
        ({"train": Nothing(), "epoch": 3}, "data.train: Nothing has no samples"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(mtl.UserError, match=re.escape(message)):
        datasets(**arguments)


def test_one_of_several_sources_needs_a_length() -> None:
    config = {
        "data": {"batch_size": 4, "eval_batch_size": 4, "num_workers": 0},
        "tasks": {"a": {"source": "web"}},
        "trainer": {"tail": "keep"},
        "seed": 0,
    }
    sources = Sources({"web": Splits(Endless(), epoch=3)}, epoch=3)
    with pytest.raises(mtl.UserError, match=r"data\.sources\.web\.train: one of several sources needs a length"):
        build_loaders(config, sources, torch.device("cpu"))


def test_other_names_of_fields_leave_shards_and_states(paths: list[str]) -> None:
    splits = datasets(data_set("hugging face", paths), fields={"y": "number"}, epoch=5)
    assert splits.summary() == "IterableDataset: 200 shards of train; fields: y"
    loader = Loader(splits.train, batch_size=16, shuffle=True, steps=5)
    assert loader.stream is not None
    assert loader.stream.notes() == []
    batches = [batch["y"].tolist() for batch in loader.batches(1)]
    loader.close()
    assert batches == [[number for number, _ in samples] for _, samples in taken("hugging face", paths, steps=5)[0]]
    few = Stream(Parts([[1], [2]]), None)
    assert few.num_shards == 2
    assert not hasattr(Stream(Plain(), None), "state_dict")
    assert not hasattr(Stream(Plain(), None), "shard")
