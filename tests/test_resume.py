"""Runs that go on are those that never stopped: from every step, after kills, and with what is damaged or changed."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_readme import environment
from test_trainer import Remembers, make
from torch.utils.data import Dataset

import mtl
from mtl import checkpoint, cli
from mtl.data import Loader
from mtl.trainer import Stopped, Trainer

SMALL = ["task=mnist_two_head", "trainer.max_epochs=3", "data.batch_size=500", "log.every=3"]  # 8 steps an epoch


class Lasting(Remembers):
    """A logger that can go back."""

    def state(self) -> int:
        return len(self.lines)

    def resume(self, state: int) -> None:
        del self.lines[state:]

    def without_speed(self) -> list[tuple[int, int, dict[str, float]]]:
        return [
            (step, epoch, {tag: value for tag, value in scalars.items() if not tag.startswith("speed")})
            for step, epoch, scalars in self.lines
        ]


def ended(trainer: Trainer, logger: Lasting) -> dict[str, Any]:
    return {
        "model": trainer.step.model.state_dict(),
        "optimizer": trainer.step.optimizer.state_dict(),
        "balancing": trainer.step.balancing.state_dict(),
        "lines": logger.without_speed(),
        "best": (trainer.best, trainer.best_epoch, trainer.figures),
        "losses": trainer.train_losses,
        "measured": trainer.measured,
        "draws": torch.get_rng_state(),
        "steps": trainer.global_step,
    }


def assert_same(mine: Any, its: Any, where: str = "") -> None:
    if isinstance(mine, torch.Tensor):
        assert mine.dtype == its.dtype, where
        torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(mine, Mapping):
        assert list(mine) == list(its), where
        for key in mine:
            assert_same(mine[key], its[key], f"{where}.{key}")
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(its), where
        for index, pair in enumerate(zip(mine, its, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert mine == its or (mine != mine and its != its), (where, mine, its)


def built(folder: Path, balancer: str, **options: Any) -> tuple[Trainer, Lasting]:
    logger = Lasting()
    trainer, _ = make(folder, loggers=[logger], **options)
    step = trainer.step
    kind = getattr(mtl.balancers, balancer)()
    trainer.step = mtl.Step(
        step.model, step.tasks, step.optimizer, balancer=kind, scheduler=step.scheduler, micro_batch_size=3
    )
    return trainer, logger


@pytest.mark.parametrize("balancer", ["Equal", "PCGrad", "MoCo", "FAMO", "DWA", "STCH"])
def test_stopping_at_any_step_and_going_on_is_never_having_stopped(tmp_path: Path, balancer: str) -> None:
    """Three epochs of four steps, with dropout, a scheduler and patience; in micro-batches with a ragged last batch."""
    whole = built(tmp_path / "whole", balancer, patience=2, log_every=5)
    whole[0].fit()
    expected = ended(*whole)
    for stop in range(1, expected["steps"]):
        folder = tmp_path / str(stop)

        def interrupt(trainer: Trainer, _: object, stop: int = stop) -> None:
            if trainer.global_step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        first, logger = built(folder, balancer, patience=2, log_every=5, callbacks=[interrupt])
        with pytest.raises(Stopped) as stopped:
            first.fit()
        assert stopped.value.signal == signal.SIGTERM
        torch.manual_seed(123)
        second, other = built(folder, balancer, patience=2, log_every=5, seed=7)
        other.lines = logger.lines  # as a file would be there
        second.load_state_dict(checkpoint.load(folder / "last.pt"))
        second.fit()
        assert_same(ended(second, other), expected, f"stopped at {stop}")


def same_runs(mine: Path, its: Path) -> None:
    """The same parameters, logs and figures, but for times."""
    for name in ("last", "best"):
        states = [checkpoint.load(run / f"checkpoints/{name}.pt") for run in (mine, its)]
        for key in ("model", "step", "random", "global_step", "epoch", "best", "figures", "measured"):
            figures = [
                [{t: v for t, v in m.items() if not t.startswith("speed")} for m in s[key]]
                if key == "measured"
                else s[key]
                for s in states
            ]
            assert_same(*figures, where=f"{name}.{key}")
    logs = [
        [row for row in csv.reader((run / "metrics.csv").read_text().splitlines()) if "speed" not in row[2]]
        for run in (mine, its)
    ]
    assert logs[0] == logs[1]
    scalars = []
    for run in (mine, its):
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if "speed" not in tag]
        scalars.append({tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags})
    assert scalars[0] == scalars[1]
    figures = [json.loads((run / "metrics.json").read_text()) for run in (mine, its)]
    for figure in figures:
        del figure["arguments"], figure["seconds_per_step"]
    assert figures[0] == figures[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = command("train", *SMALL, "balancer=moco")
        assert run.code == 0, run.err
        return run.run.resolve()


def interrupted(at: int, *more: str) -> Ended:
    """A run that SIGTERM stops at this step."""
    Path("code").mkdir(exist_ok=True)
    Path("code/stops.py").write_text(
        "import os, signal\n"
        "class At:\n"
        "    def __init__(self, step): self.step = step\n"
        "    def __call__(self, trainer, result):\n"
        "        if trainer.global_step == self.step: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    stop = ["+callbacks.stop._target_=stops.At", f"+callbacks.stop.step={at}"]
    return command("train", "--config-dir", "code", *SMALL, "balancer=moco", *stop, *more)


@pytest.mark.parametrize("at", [1, 7, 8, 11, 23])
def test_sigterm_saves_and_says_how_to_go_on(here: Path, undisturbed: Path, at: int) -> None:
    run = interrupted(at)
    assert run.code == 128 + signal.SIGTERM
    assert f"Stopped at step {at}" in run.out
    (line,) = [line for line in run.out.splitlines() if line.startswith("go on")]
    assert "resume=outputs/mnist_two_head/" in line
    again = command("train", *SMALL, "balancer=moco", "resume=auto")
    assert again.code == 0, again.err
    assert f"resume   from step {at}" in again.out
    assert len(list(Path("outputs/mnist_two_head").iterdir())) == 1
    same_runs(run.run or next(Path("outputs/mnist_two_head").iterdir()), undisturbed)
    fresh = command("train", *SMALL, "balancer=moco", "resume=auto", "trainer.max_epochs=1")
    assert fresh.code == 0
    assert len(list(Path("outputs/mnist_two_head").iterdir())) == 2  # the first is finished


def only_run() -> Path:
    (run,) = Path("outputs/mnist_two_head").iterdir()
    return run


def test_a_config_that_changes_what_matters_is_refused(here: Path) -> None:
    assert interrupted(5).code == 143
    before = {path: path.read_bytes() for path in only_run().rglob("*") if path.is_file() and path.suffix != ".log"}
    run = f"resume={only_run()}"
    other = command("train", *SMALL, "balancer=mgda", "seed=3", "optimizer.lr=1e-4", run)
    assert other.code == 1
    for line in ("seed: 0 there, 3 here", "optimizer.lr: 0.005 there, 0.0001 here", "mtl.balancers.MoCo' there"):
        assert line in other.err
    assert {path: path.read_bytes() for path in before} == before
    longer = command("train", *SMALL, "balancer=moco", "trainer.max_epochs=5", run)
    assert longer.code == 1
    assert "The learning rate's schedule is laid out for that number of epochs" in longer.err
    allowed = command("train", *SMALL, "balancer=moco", "optimizer.lr=1e-4", "resume_allow=[optimizer.lr]", run)
    assert allowed.code == 0, allowed.err
    assert allowed.metrics["steps"] == 24 if allowed.run else True


def test_more_epochs_where_the_schedule_has_no_horizon(here: Path) -> None:
    whole = command("train", *SMALL, "scheduler=none", "trainer.max_epochs=4")
    short = command("train", *SMALL, "scheduler=none", "trainer.max_epochs=2")
    longer = command("train", *SMALL, "scheduler=none", "trainer.max_epochs=4", f"resume={short.run}")
    assert longer.code == 0, longer.err
    same_runs(short.run, whole.run)


def test_a_new_learning_rate_is_the_one_that_is_used(here: Path) -> None:
    short = command("train", *SMALL, "scheduler=none", "trainer.max_epochs=1")
    start = checkpoint.load(short.run / "checkpoints/last.pt")["model"]
    options = ["scheduler=none", "trainer.max_epochs=2", "optimizer.lr=0.0", "resume_allow=[optimizer.lr]"]
    again = command("train", *SMALL, *options, f"resume={short.run}")
    assert again.code == 0, again.err
    assert_same(checkpoint.load(short.run / "checkpoints/last.pt")["model"], start)  # at a rate of 0 nothing moves


def test_a_sweep_says_that_it_cannot(here: Path) -> None:
    ended = command("train", "-m", *SMALL, "seed=0,1", "resume=auto")
    assert ended.code == 1
    assert "a sweep's jobs can't be taken up again" in ended.err


def test_what_is_not_there_is_an_error_and_makes_nothing(here: Path) -> None:
    ended = command("train", *SMALL, "resume=outputs/mnist_two_head/nowhere")
    assert ended.code == 1
    assert "'outputs/mnist_two_head/nowhere' is not the folder of a run" in ended.err
    assert not Path("outputs").exists()


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "gone"])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(
    here: Path, undisturbed: Path, damage: str
) -> None:
    assert interrupted(13, "checkpoint.every_steps=4").code == 143
    newest = only_run() / "checkpoints/last.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        newest.unlink()
    else:
        newest.write_bytes({"truncated": content[:-100], "bit": content, "empty": b""}[damage])
    again = command("train", *SMALL, "balancer=moco", "resume=auto")
    assert again.code == 0, again.err
    assert ("there is no checkpoint" if damage == "gone" else "is damaged: its checksum") in again.out
    assert "resume   from step 12" in again.out
    same_runs(only_run(), undisturbed)


def test_two_processes_on_one_run(here: Path) -> None:
    assert interrupted(5).code == 143
    with cli.locked(only_run()) as free:
        assert free
        code = (
            "from pathlib import Path\nfrom mtl import cli\n"
            f"with cli.locked(Path({str(only_run().resolve())!r})) as free: print(free)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert done.stdout.strip() == "False", done.stderr
        second = command("train", *SMALL, "balancer=moco", f"resume={only_run()}")
        assert second.code == 1
        assert "another process is at work in" in second.err


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    trainer, _ = make(tmp_path, tell=told.append)
    fsync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) in (3, 4, 5):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr("mtl.checkpoint.os.fsync", full)
    trainer.fit()
    assert trainer.epoch == 3
    assert any("could not be written: [Errno 28] No space left on device. Training goes on" in line for line in told)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 3


def test_saving_holds_training_up_for_a_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written is what was there when it was asked for."""
    original = checkpoint.save

    def slow(*given: Any, **options: Any) -> None:
        time.sleep(0.5)
        original(*given, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = checkpoint.Writer(tmp_path, keep=1, tell=print)
    value = torch.zeros(3)
    start = time.perf_counter()
    writer.save("last", {"value": value, "nested": [{"value": value}]})
    assert time.perf_counter() - start < 0.25
    value += 1
    writer.wait()
    state = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(state["value"], torch.zeros(3))
    assert torch.equal(state["nested"][0]["value"], torch.zeros(3))


def test_saves_that_come_faster_than_the_disk_hold_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one is written, those between are passed over, and order is kept between the kinds."""
    original, written = checkpoint.save, []

    def slow(path: Path, state: dict[str, Any], **options: Any) -> None:
        time.sleep(0.1)
        original(path, state, **options)
        written.append((path.stem, state["number"]))

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = checkpoint.Writer(tmp_path, keep=2, tell=print)
    start = time.perf_counter()
    writer.save("last", {"number": 0})
    time.sleep(0.02)  # that one is being written
    for number in range(1, 6):
        writer.save("last", {"number": number})
    writer.save("best", {"number": 5})
    for number in range(6, 9):
        writer.save("last", {"number": number})
    assert time.perf_counter() - start < 0.09
    writer.wait()
    assert written == [("last", 0), ("last", 5), ("best", 5), ("last", 8)]


def test_how_many_are_kept_and_the_manifest(tmp_path: Path) -> None:
    for number in range(6):
        checkpoint.save(tmp_path / "last.pt", {"number": number}, keep=3)
    kept = {path.name: checkpoint.load(path)["number"] for path in tmp_path.glob("*.pt")}
    assert kept == {"last.pt": 5, "last-1.pt": 4, "last-2.pt": 3}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == checkpoint.FORMAT
    assert len(manifest["sha256"]["last.pt"]) == 4
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_each_time(tmp_path: Path) -> None:
    """SIGKILL, saving included: after each step a checkpoint is written."""
    arguments = ["task=mnist_two_head", "trainer.max_epochs=25", "data.batch_size=100", "log.every=7"]
    arguments += ["balancer=pcgrad", "checkpoint.every_steps=1"]
    line = [sys.executable, "-m", "mtl.train", *arguments]
    env = environment() | {"OMP_NUM_THREADS": "1"}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run(line, cwd=tmp_path / "whole", env=env, check=True, capture_output=True)
    (whole,) = (tmp_path / "whole").glob("outputs/*/*")
    draws = random.Random(int(os.environ.get("MTL_KILLS", "0")))
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            [*line, "resume=auto"],
            cwd=tmp_path / "killed",
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started = time.monotonic()
        before = len(list((tmp_path / "killed").glob("outputs/*/*/checkpoints/last*.pt")))
        while not before and not list((tmp_path / "killed").glob("outputs/*/*/checkpoints/last*.pt")):
            assert time.monotonic() - started < 60
            assert process.poll() is None
            time.sleep(0.01)
        try:
            process.wait((2.0 if before else 0.0) + draws.random())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            break
    assert kills == 20
    done = subprocess.run([*line, "resume=auto"], cwd=tmp_path / "killed", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "killed").glob("outputs/*/*"))
    same_runs(runs[0], whole)


class Augmented(Dataset):
    """Samples that draw from all generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        import numpy as np

        return {"x": torch.rand(2) + np.random.rand() + random.random(), "index": index}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores
@pytest.mark.parametrize("num_workers", [1, 4])
def test_what_samples_draw_does_not_depend_on_workers_or_where_one_begins(num_workers: int) -> None:
    torch.manual_seed(0)
    draws = torch.get_rng_state(), random.getstate()
    plain = [list(Loader(Augmented(), batch_size=5, seed=3, shuffle=True).batches(epoch)) for epoch in (1, 2)]
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1] == random.getstate()
    loader = Loader(Augmented(), batch_size=5, seed=3, shuffle=True, num_workers=num_workers)
    for epoch, expected in zip((1, 2), plain, strict=True):
        assert_same(list(loader.batches(epoch)), expected)
        assert_same(list(loader.batches(epoch, start=1)), expected[1:])
    assert not torch.equal(plain[0][0]["x"].sort()[0], plain[1][0]["x"].sort()[0])


def test_tail() -> None:
    from mtl.data import Fields

    fields = Fields({"x": torch.arange(11)})
    kept, dropped = (Loader(fields, batch_size=4, drop_last=drop) for drop in (False, True))
    assert [len(batch["x"]) for batch in kept.batches(1)] == [4, 4, 3]
    assert [len(batch["x"]) for batch in dropped.batches(1)] == [4, 4]
    assert (len(kept), len(dropped)) == (3, 2)
    shuffled = Loader(fields, batch_size=4, shuffle=True, drop_last=True)
    seen = {int(x) for epoch in range(20) for batch in shuffled.batches(epoch) for x in batch["x"]}
    assert len(seen) == 11  # what is left out isn't always the same
    with pytest.raises(mtl.UserError, match="tail=drop leaves no batch"):
        Loader(fields, batch_size=12, drop_last=True)
