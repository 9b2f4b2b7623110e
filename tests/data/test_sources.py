"""Several data sets: which batch is used in which step, and that this depends only on seed and epoch."""

from collections import Counter
from typing import Any

import pytest
import torch

import mtl
from mtl.data import Drawn, Fields, Loader, Mix, Sources, Splits

SIZES = {"a": 20, "b": 7}


def numbers(count: int, start: int = 0) -> Fields:
    return Fields({"x": torch.arange(start, start + count)})


def mixed(**options: Any) -> Mix:
    loaders = {
        name: Loader(numbers(count, 100 * index), batch_size=4, shuffle=True, seed=index)
        for index, (name, count) in enumerate(SIZES.items())
    }
    return Mix(loaders, {"one": "a", "two": "b", "three": "a"}, **{"seed": 3, **options})


def plain(batches: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    return [{task: batch["x"].tolist() for task, batch in step.items()} for step in batches]


def test_all_at_once() -> None:
    """Five batches of a, and the two of b again and again, in another order each time."""
    mix = mixed()
    steps = list(mix.batches(1))
    assert len(mix) == len(steps) == 5
    assert all(list(step) == ["one", "two", "three"] for step in steps)
    assert all(step["one"] is step["three"] for step in steps)  # one batch, which takes one forward
    assert sorted(sum((step["one"] for step in plain(steps)), [])) == list(range(20))
    rounds = [sum((step["two"] for step in plain(steps)[part]), []) for part in (slice(0, 2), slice(2, 4))]
    assert all(sorted(each) == list(range(100, 107)) for each in rounds)
    assert rounds[0] != rounds[1]
    assert (len(mixed(epoch="min")), len(mixed(epoch="max")), len(mixed(epoch="sum"))) == (2, 5, 7)
    assert len(mixed(epoch=13)) == len(list(mixed(epoch=13).batches(1))) == 13


def sources_of(mix: Mix, epoch: int) -> str:
    return "".join("a" if "one" in step else "b" for step in mix.batches(epoch))


def test_one_at_a_time() -> None:
    turns = mixed(sampling="round_robin", epoch=7)
    assert sources_of(turns, 0) == "abababa"
    assert sources_of(turns, 1) == "bababab"  # it goes on where the epoch before ended
    assert all(list(step) in (["one", "three"], ["two"]) for step in turns.batches(0))
    for sampling, temperature, share in (
        ("proportional", 2.0, 20 / 27),
        ("temperature", 2.0, 20**0.5 / (20**0.5 + 7**0.5)),
        ("temperature", 1.0, 20 / 27),
        ("temperature", 1e9, 0.5),
    ):
        mix = mixed(sampling=sampling, temperature=temperature, epoch=4000)
        drawn = Counter("a" if names == ["a"] else "b" for names in mix._plan(1))
        assert drawn["a"] / 4000 == pytest.approx(share, abs=0.03)  # four standard errors
        assert mix._plan(1) != mix._plan(2)
        assert mix._plan(1) == mixed(sampling=sampling, temperature=temperature, epoch=4000)._plan(1)


@pytest.mark.parametrize("sampling", ["all", "round_robin", "proportional", "temperature"])
def test_from_any_step_on_it_is_the_same(sampling: str) -> None:
    whole = plain(list(mixed(sampling=sampling, epoch=11).batches(2)))
    for start in range(12):
        torch.rand(3)  # nothing is drawn from the generator that training draws from
        mix = mixed(sampling=sampling, epoch=11)
        assert plain(list(mix.batches(2, start=start))) == whole[start:]
        if start < 11:
            named = mix.samples(2, start)
            for task, values in whole[start].items():
                source = mix.tasks[task]
                assert [number + (100 if source == "b" else 0) for number in named[source]] == values
    progress = mixed(sampling=sampling, epoch=11).progress(2, 5)
    done = Counter(task for step in whole[:5] for task in step)
    assert {task: its["batches"] for task, its in progress.items()} == {t: done[t] for t in ("one", "two", "three")}


def test_a_loader_that_stops_early_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> dict[str, int]:
            return {"x": index}

    import multiprocessing

    loaders = {name: Loader(Slow(), batch_size=4, num_workers=1) for name in "ab"}
    batches = Mix(loaders, {"one": "a", "two": "b"}).batches(1)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_what_is_drawn_anew() -> None:
    def draw(generator: torch.Generator, count: int) -> dict[str, torch.Tensor]:
        return {"x": torch.rand(count, 2, generator=generator)}

    state = torch.get_rng_state()
    loader = Loader(Drawn(draw, num_samples=10), batch_size=4, seed=1)
    first = list(loader.batches(1))
    assert [len(batch["x"]) for batch in first] == [4, 4, 2]
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(first[1:], loader.batches(1, start=1), strict=True))
    values = torch.cat([batch["x"] for epoch in (1, 2) for batch in loader.batches(epoch)])
    assert len(values.unique()) == values.numel()  # no point comes twice
    other = next(Loader(Drawn(draw, num_samples=10), batch_size=4, seed=2).batches(1))
    assert not torch.equal(other["x"], first[0]["x"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_point_comes_twice_however_often_a_source_is_gone_through(seed: int) -> None:
    def draw(generator: torch.Generator, count: int) -> dict[str, torch.Tensor]:
        return {"x": torch.rand(count, dtype=torch.float64, generator=generator)}

    mix = Mix({"a": Loader(Drawn(draw, num_samples=10), batch_size=4, seed=seed)}, {"one": "a"}, epoch=20)
    values = torch.cat([step["one"]["x"] for epoch in (0, 1, 2) for step in mix.batches(epoch)])
    assert len(values.unique()) == len(values)


@pytest.mark.parametrize("sampling", ["all", "round_robin", "proportional", "temperature"])
def test_micro_batches_and_sizes_of_several_sources(sampling: str) -> None:
    def mix(**options: int) -> Mix:
        loaders = {"a": Loader(numbers(5), batch_size=2, **options), "b": Loader(numbers(7), batch_size=3, **options)}
        return Mix(loaders, {"one": "a", "two": "a", "three": "b"}, sampling=sampling, epoch=11, seed=1)

    whole, micro = mix(), mix(micro_batch_size=1)
    for epoch in (0, 3):
        sizes = list(whole.sizes(epoch))
        batches = list(whole.batches(epoch))
        for size, batch, pieces in zip(sizes, batches, micro.batches(epoch), strict=True):
            assert size == sum(len(each["x"]) for each in {id(each): each for each in batch.values()}.values())
            assert len(pieces) == size
            for task, each in batch.items():
                assert torch.equal(torch.cat([piece[task]["x"] for piece in pieces if task in piece]), each["x"])
        assert list(whole.sizes(epoch, start=4)) == sizes[4:]


def test_a_batch_that_is_drawn_is_drawn_whole() -> None:
    def draw(generator: torch.Generator, count: int) -> dict[str, torch.Tensor]:
        return {"x": torch.rand(count, 2, generator=generator), "ends": torch.rand(3, generator=generator)}

    whole = Loader(Drawn(draw, num_samples=10), batch_size=4, seed=1)
    micro = Loader(Drawn(lambda g, n: {"x": draw(g, n)["x"]}, num_samples=10), batch_size=4, seed=1, micro_batch_size=3)
    for batch, pieces in zip(whole.batches(1), micro.batches(1), strict=True):
        assert torch.equal(torch.cat([piece["x"] for piece in pieces]), batch["x"])
    with pytest.raises(
        mtl.UserError, match=r"its field 'ends' is a tensor of shape \(3,\), and the batch has 4 samples"
    ):
        next(Loader(Drawn(draw, num_samples=10), batch_size=4, seed=1, micro_batch_size=3).batches(1))


def test_facts_are_each_sources_own() -> None:
    first = Splits(numbers(5), facts={"columns": {"age": 1}, "classes": 3})
    second = Splits(numbers(5), facts={"columns": {"age": 2}, "classes": 3})
    sources = Sources({"a": first, "b": second})
    assert sources.fact("columns", "b") == {"age": 2}
    assert sources.fact("classes", None) == 3
    with pytest.raises(mtl.UserError, match="the sources a, b have different facts 'columns'"):
        sources.fact("columns", None)
    with pytest.raises(mtl.UserError, match="the data have no fact 'rows'; they have: classes, columns"):
        sources.fact("rows", None)


def test_facts_are_plain() -> None:
    import numpy as np

    splits = Splits(numbers(5), facts={"a": np.int64(3), "b": {"c": np.arange(2.0)}, "d": ("x", None)})
    assert splits.facts == {"a": 3, "b": {"c": [0.0, 1.0]}, "d": ["x", None]}
    assert type(splits.facts["a"]) is int
    with pytest.raises(mtl.UserError, match="the data's fact 'e.f' is a Tensor; it must consist of numbers, texts"):
        Splits(numbers(5), facts={"e": {"f": torch.ones(1)}})


def test_mappings_become_dicts() -> None:
    """Tokenizers give UserDicts, into which neither a move nor a cut would look."""
    from collections import UserDict

    from mtl.batch import cut

    def collate(samples: list[dict[str, int]]) -> dict[str, Any]:
        return {"text": UserDict({"tokens": torch.tensor([sample["x"] for sample in samples])})}

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, int]:
            return {"x": index}

    (batch,) = Loader(Samples(), batch_size=4, collate=collate).batches()
    assert type(batch["text"]) is dict
    assert [len(part["text"]["tokens"]) for part in cut(batch, size=2)] == [2, 2]


def test_mistakes() -> None:
    splits = Splits(numbers(5))
    for options, message in (
        ({"sources": {}}, "name at least one"),
        ({"sources": {"a": 3}}, "data.sources.a is a int"),
        ({"sources": {"a": splits}, "sampling": "random"}, "data.sampling: 'random' is not one of all, round_robin"),
        ({"sources": {"a": splits}, "temperature": 0.5}, "data.temperature is 0.5"),
        ({"sources": {"a": splits}, "epoch": "mean"}, "data.epoch is 'mean'; it must be one of min, max, sum, or"),
        ({"sources": {"a": splits}, "epoch": 0}, "data.epoch is 0"),
    ):
        with pytest.raises(mtl.UserError, match=message):
            Sources(**options)
    sources = Sources({"a": splits})
    with pytest.raises(mtl.UserError, match=r"tasks.t.source: the task names no source; the sources are: a"):
        sources.of_task("t", None)
    with pytest.raises(mtl.UserError, match=r"tasks.t.source: the task names the source 'b'; the sources are: a"):
        sources.of_task("t", "b")
    with pytest.raises(mtl.UserError, match=r"tasks.t.source is 'a', but the data have only one source"):
        splits.of_task("t", "a")
