"""Which checkpoints exist, and that none is lost if a process is killed at any point."""

import json
import math
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, command, stopping
from test_trainer import make

import mtl
from mtl.process.signals import Stopped
from mtl.training import checkpoint
from mtl.training.trainer import Trainer
from mtl.training.writer import Job, Writer


class Killed(BaseException):
    pass


def higher(value: float, other: float) -> bool:
    return not math.isnan(value) and (math.isnan(other) or value > other)


def kept(folder: Path, name: str) -> list[Any]:
    """Returns the epochs of name.pt, name-1.pt, …, and checks that each can be loaded and there is no gap."""
    found = [(number, checkpoint.load(path)["epoch"]) for path, number in checkpoint.numbered(folder / f"{name}.pt")]
    assert [number for number, _ in found] == list(range(len(found)))
    return [epoch for _, epoch in found]


def state(epoch: int, value: float) -> dict[str, Any]:
    return {"epoch": epoch, "value": value, "weight": torch.full((3,), float(epoch))}


def after(values: list[float], best: int) -> list[int]:
    """Returns the best epochs, the best one first; of equal values, the earlier epoch comes first."""
    order = sorted(range(1, len(values) + 1), key=lambda epoch: (math.isnan(values[epoch - 1]), -values[epoch - 1]))
    return order[:best]


@pytest.mark.parametrize("best", [2, 3, 5])
def test_the_best_in_the_order_of_their_values(tmp_path: Path, best: int) -> None:
    draws = random.Random(best)
    writer = Writer(tmp_path / "checkpoints", keep=1, best=best, report=pytest.fail)
    values: list[float] = []
    for epoch in range(1, 25):
        values.append(draws.choice([math.nan, *(n / 8 for n in range(9))]))
        if writer.ranks(values[-1], higher):
            writer.save("best", state(epoch, values[-1]), higher)
            writer.wait()
        assert kept(writer.folder, "best") == after(values, best)
        assert [epoch for _, epoch in writer.ranked] == after(values, best)
    assert {path.name for path in writer.folder.glob("*.tmp")} == set()


def test_values_of_which_less_is_better_and_none(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "checkpoints", keep=1, best=2, report=pytest.fail)
    for epoch, value in enumerate([0.5, 0.2, 0.9, 0.3], start=1):
        writer.save("best", state(epoch, value), lambda value, other: value < other)
    writer.wait()
    assert kept(writer.folder, "best") == [2, 4]
    writer = Writer(tmp_path / "others", keep=1, best=2, report=pytest.fail)
    for epoch in range(1, 5):  # without validation a later one is better
        writer.save("best", {"epoch": epoch, "value": None}, lambda *_: True)
    writer.wait()
    assert kept(writer.folder, "best") == [4, 3]


def filesystem(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Calls `before` before every change of a folder."""

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            before()
            return original(*given, **options)

        return call

    for place, name in ((os, "link"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "fsync"), (Path, "open")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))


@pytest.mark.parametrize("links", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_taken_up_the_ranking_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """At each change of the folder in turn: every file is whole, nothing that was best is lost, and the end is alike."""
    values, best = [0.3, 0.5, 0.1, 0.4, 0.45], 2
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    moment, tried = 0, 0
    while True:
        moment += 1
        folder = tmp_path / str(moment) / "checkpoints"
        count = 0

        def dies(at: int = moment) -> None:
            nonlocal count
            count += 1
            if count == at:
                raise Killed

        done = 0  # epochs that last.pt is after
        with monkeypatch.context() as patch:
            filesystem(patch, dies)
            try:
                done = write(folder, values, best, after_epoch=0)
            except Killed:
                tried += 1
        if done == len(values):
            break
        done = checkpoint.load(folder / "last.pt")["epoch"] if (folder / "last.pt").exists() else 0
        there = {checkpoint.load(path)["epoch"] for path, _ in checkpoint.numbered(folder / "best.pt")}
        assert there >= set(after(values[:done], best)) or there >= set(after(values[: done + 1], best))
        write(folder, values, best, after_epoch=done)
        assert kept(folder, "best") == after(values, best)
        assert kept(folder, "last")[:3] == [5, 4, 3]  # one more may be there until the next save
        assert not list(folder.glob("*.tmp"))
    assert tried > 100


def write(folder: Path, values: list[float], best: int, *, after_epoch: int) -> int:
    """Saves states as a training does, in this thread, from one epoch on."""
    writer = Writer(folder, keep=3, best=best, report=pytest.fail)
    writer._begin = lambda job: writer._write(job)  # type: ignore[method-assign]
    if after_epoch:
        writer.continue_after(after_epoch)
    for epoch, value in list(enumerate(values, start=1))[after_epoch:]:
        if writer.ranks(value, higher):
            writer.save("best", state(epoch, value), higher)
        writer.save("last", state(epoch, value))
    return len(values)


def test_a_write_into_a_folder_that_is_gone_promises_nothing(tmp_path: Path) -> None:
    """The training ends at its next save, so it neither goes on nor is what was saved still there."""
    lines: list[str] = []
    writer = Writer(tmp_path / "run" / "checkpoints", keep=1, report=lines.append)
    writer.save("last", state(1, 0.5))
    writer.wait()
    (tmp_path / "run").rename(tmp_path / "moved")
    writer._begin(Job("last", state(2, 0.5)))  # what was found to be there when it was saved, and is gone by now
    writer.wait()
    assert "last" in writer.failed
    assert lines == []
    with pytest.raises(mtl.UserError, match=r"run no longer exists: it was deleted or moved while the run trained"):
        writer.check()


def test_a_better_one_that_could_not_be_written_comes_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    writer = Writer(tmp_path / "checkpoints", keep=1, best=2, report=lines.append)
    original = checkpoint.save
    full = True

    def save(*given: Any, **options: Any) -> None:
        if full:
            raise OSError(28, "No space left on device", str(given[0]))
        original(*given, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    for epoch, value in ((1, 0.4), (2, 0.9), (3, 0.5)):
        writer.save("best", state(epoch, value), higher)
        writer.save("last", state(epoch, value))
    writer.wait()
    assert writer.failed["best"].state["epoch"] == 2
    assert len(lines) == 1  # one reason, one sentence
    assert "best.pt could not be written: [Errno 28] No space left on device. Training goes on" in lines[0]
    full = False
    writer.save("best", state(4, 0.7), higher)
    writer.wait()
    assert kept(writer.folder, "best") == [2, 4]
    assert not writer.failed


def test_what_is_kept_costs_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not what may be: with a million, as with all, a save looks at the few files that there are."""
    for keep in (1_000_000, None):
        folder = tmp_path / str(keep)
        folder.mkdir()
        asked = 0
        with monkeypatch.context() as patch:
            exists = Path.exists

            def counted(self: Path, exists: Callable[[Path], bool] = exists) -> bool:
                nonlocal asked
                asked += 1
                return exists(self)

            patch.setattr(Path, "exists", counted)
            for epoch in range(1, 8):
                checkpoint.save(folder / "last.pt", {"epoch": epoch}, keep=keep)
        assert asked < 100
        assert kept(folder, "last") == [7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("keep", [None, 2])
def test_the_manifest_knows_what_is_there_and_little_more(tmp_path: Path, keep: int | None) -> None:
    """Also where the files that are there were written long ago, as the best may be."""
    path = tmp_path / "best.pt"
    checkpoint.save(path, {"epoch": 0})
    for epoch in range(1, 150):
        checkpoint.save(path, {"epoch": epoch}, keep=keep, number=1)
    noted = json.loads((tmp_path / "manifest.json").read_text())["sha256"]["best.pt"]
    if keep is None:
        assert len(noted) == 150
    else:
        assert 50 < len(noted) <= 102
    assert kept(tmp_path, "best") == [0, *range(149, 148 if keep else 0, -1)]


def run(folder: Path, values: list[float], **options: Any) -> Trainer:
    """Returns a trainer whose validations have the given values."""
    trainer, _ = make(folder / "checkpoints", report=lambda line: None, max_epochs=len(values), best=3, **options)
    prepare = trainer.selection.prepare

    def prepared(step: mtl.Step) -> None:
        prepare(step)
        if trainer.selection.val is not None:
            trainer.selection.monitor.__class__ = type("Given", (type(trainer.selection.monitor),), {})
            type(trainer.selection.monitor).__call__ = lambda self, figures: values[trainer.epoch - 1]

    trainer.selection.prepare = prepared  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("every", [None, 3])
def test_a_training_that_goes_on_keeps_the_same_ranking(tmp_path: Path, every: int | None) -> None:
    values = [0.3, 0.7, 0.5, 0.6, 0.7, 0.65, 0.1]
    whole = run(tmp_path / "whole", values, every_steps=every)
    whole.fit()
    assert kept(tmp_path / "whole/checkpoints", "best") == [2, 5, 6]

    def stops(trainer: Trainer, result: object) -> None:
        if trainer.global_step == 14:
            trainer._agree.stop.signal = 15

    first = run(tmp_path / "first", values, every_steps=every, callbacks=[stops])
    with pytest.raises(Stopped):
        first.fit()
    assert kept(tmp_path / "first/checkpoints", "best") == [2, 3, 1]
    second = run(tmp_path / "first", values, every_steps=every)
    second.load_state_dict(checkpoint.load(tmp_path / "first/checkpoints/last.pt"))
    second.fit()
    assert kept(tmp_path / "first/checkpoints", "best") == [2, 5, 6]
    for name in ("best.pt", "best-1.pt", "best-2.pt", "last.pt"):
        mine, its = (checkpoint.load(tmp_path / part / "checkpoints" / name) for part in ("first", "whole"))
        assert all(torch.equal(mine["model"][n], its["model"][n]) for n in its["model"])
        assert mine.get("value") == its.get("value")


def test_a_run_that_kept_one_goes_on_with_several(tmp_path: Path) -> None:
    values = [0.3, 0.7, 0.5, 0.6, 0.9]
    first = run(tmp_path, values)
    first.writer.best = 1
    first.max_epochs = 3
    first.fit()
    assert kept(tmp_path / "checkpoints", "best") == [2]
    assert "value" not in checkpoint.load(tmp_path / "checkpoints/best.pt")
    second = run(tmp_path, values)
    second.load_state_dict(checkpoint.load(tmp_path / "checkpoints/last.pt"))
    second.fit()
    assert kept(tmp_path / "checkpoints", "best") == [5, 2, 4]
    assert second.writer.ranked == [(0.9, 5), (0.7, 2), (0.6, 4)]


def test_several_are_kept_evaluated_and_loaded(here: Path) -> None:
    options = ["task=mnist_two_head", "trainer.max_epochs=4", "data.batch_size=500", "optimizer.lr=0.02"]
    ended: Ended = command("train", *options, "checkpoint.best=2", "checkpoint.keep=all")
    assert ended.code == 0, ended.err
    folder = ended.run / "checkpoints"
    states = [checkpoint.load(path) for path, _ in checkpoint.numbered(folder / "best.pt")]
    values = [each["value"] for each in states]
    assert len(values) == 2
    assert values == sorted(values, reverse=True)
    assert ended.metrics["best"]["value"] == values[0]
    assert kept(folder, "last") == [4, 3, 2, 1]
    assert "checkpoints/best-1.pt" in ended.out.replace("\n", "")
    second = command("evaluate", f"run={ended.run}", "checkpoint=best-1", "split=val")
    assert second.code == 0, second.err
    assert "best-1.pt" in second.out
    model = mtl.load(ended.run, checkpoint="best-1")
    assert torch.equal(model.state_dict()["trunk.conv1.weight"], states[1]["model"]["trunk.conv1.weight"])
    none = command("evaluate", f"run={ended.run}", "checkpoint=best-2")
    assert none.code == 1
    assert "has no checkpoint 'best-2'; it has: best, best-1, last, last-1, last-2, last-3" in none.err
    wrong = command("evaluate", f"run={ended.run}", "checkpoint=first")
    assert "checkpoint: 'first' is not one of best, last, best-1, last-1 and so on" in wrong.err
    plain = command("train", *options)
    assert plain.code == 0, plain.err
    first, only = (checkpoint.load(each.run / "checkpoints/best.pt") for each in (ended, plain))
    assert all(torch.equal(first["model"][name], only["model"][name]) for name in only["model"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("checkpoint.keep=0", "checkpoint.keep is 0; it must be a whole number of at least 1, and below 2^63, or all"),
        ("checkpoint.keep=some", "checkpoint.keep is 'some'; it must be a whole number"),
        ("checkpoint.best=0", "checkpoint.best is 0; it must be a whole number of at least 1"),
        ("checkpoint.best=all", "checkpoint.best is 'all'; it must be a whole number of at least 1"),
    ],
)
def test_how_many_can_be_kept(here: Path, given: str, message: str) -> None:
    assert message in command("train", "task=mnist_two_head", given).err


def test_a_run_with_several_that_is_stopped_goes_on(here: Path) -> None:
    options = [*["task=mnist_two_head", "trainer.max_epochs=3", "data.batch_size=500", "checkpoint.best=3"]]
    whole = command("train", *options)
    stopped = command("train", *options, *stopping(13))
    assert stopped.code == 143
    again = command("train", *options, f"resume={stopped.run}")
    assert again.code == 0, again.err
    for name in ("best", "best-1", "best-2"):
        mine, its = (checkpoint.load(each / f"checkpoints/{name}.pt") for each in (stopped.run, whole.run))
        assert (mine["epoch"], mine["value"]) == (its["epoch"], its["value"])


def test_what_is_written_meanwhile_does_not_disturb_the_check(tmp_path: Path) -> None:
    """The training asks what is there while the other thread adds to what was written."""
    writer = Writer(tmp_path / "checkpoints", keep=1, report=print)
    names = [f"name{number}" for number in range(50)]
    (tmp_path / "checkpoints").mkdir()
    for name in names:
        (tmp_path / "checkpoints" / f"{name}.pt").touch()
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            for name in names:
                writer.written[name] = 1
            writer.written.clear()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            writer.check()
    finally:
        ended.set()
        thread.join()
