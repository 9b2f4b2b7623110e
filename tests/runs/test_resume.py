"""Resumed runs equal uninterrupted ones: from every step, after kills, and with damaged or changed files."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, command, slow_but, stopping
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_readme import HANGS, environment
from test_trainer import Remembers, make
from torch.utils.data import Dataset

import mtl
from mtl.data import Loader
from mtl.files import Folder
from mtl.loggers import Loggers
from mtl.process.signals import Stopped
from mtl.runs.resume import differences, locked
from mtl.training import checkpoint
from mtl.training.hooks import Hooks
from mtl.training.trainer import Trainer
from mtl.training.writer import Writer

SMALL = ["task=mnist_two_head", "trainer.max_epochs=3", "data.batch_size=500", "log.every=3"]  # 8 steps an epoch


class Lasting(Remembers):
    """A logger that can return to an earlier state."""

    def state_dict(self) -> int:
        return len(self.lines)

    def load_state_dict(self, state: int) -> None:
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
        "best": (trainer.selection.best, trainer.selection.best_epoch, trainer.selection.figures),
        "losses": trainer.readings.epoch_losses,
        "readings": trainer.readings.state_dict(),
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
    trainer, _ = make(folder, loggers=Loggers([logger]), **options)
    step = trainer.step
    kind = getattr(mtl.balancers, balancer)()
    trainer.step = mtl.Step(
        step.model,
        step.tasks,
        step.optimizer,
        balancer=kind,
        update=mtl.Update(scheduler=step.descent.scheduler),
        micro_batch_size=3,
    )
    return trainer, logger


@pytest.mark.parametrize(
    "balancer", slow_but(["Equal", "MoCo", "DWA"], ["Equal", "PCGrad", "MoCo", "FAMO", "DWA", "STCH"])
)
def test_stopping_at_any_step_and_going_on_is_never_having_stopped(tmp_path: Path, balancer: str) -> None:
    """Three epochs of four steps, with dropout, a scheduler and patience; in micro-batches with a ragged last batch."""
    whole = built(tmp_path / "whole", balancer, patience=2, every=5)
    whole[0].fit()
    expected = ended(*whole)
    for stop in range(1, expected["steps"]):
        folder = tmp_path / str(stop)

        def interrupt(trainer: Trainer, _: object, stop: int = stop) -> None:
            if trainer.global_step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        first, logger = built(folder, balancer, patience=2, every=5, callbacks=[interrupt])
        with pytest.raises(Stopped) as stopped:
            first.fit()
        assert stopped.value.signal == signal.SIGTERM
        torch.manual_seed(123)
        second, other = built(folder, balancer, patience=2, every=5, seed=7)
        other.lines = logger.lines  # as a file would be there
        second.load_state_dict(checkpoint.load(folder / "last.pt"))
        second.fit()
        assert_same(ended(second, other), expected, f"stopped at {stop}")


def same_runs(mine: Path, its: Path) -> None:
    """Checks that two runs have the same parameters, logs and figures, except for times."""
    for name in ("last", "best"):
        states = [checkpoint.load(run / f"checkpoints/{name}.pt") for run in (mine, its)]
        for key in ("model", "step", "random", "global_step", "epoch", "best", "figures", "readings"):
            assert_same(*(state[key] for state in states), where=f"{name}.{key}")
    logs = [
        [row for row in csv.reader((run / "metrics.csv").read_text().splitlines()) if "speed" not in row[2]]
        for run in (mine, its)
    ]
    assert logs[0] == logs[1]
    scalars = []
    for run in (mine, its):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if "speed" not in tag]
        scalars.append({tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags})
    assert scalars[0] == scalars[1]
    figures = [json.loads((run / "metrics.json").read_text()) for run in (mine, its)]
    for figure in figures:
        del figure["arguments"], figure["seconds_per_step"], figure["memory_per_step"]
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
    """Runs a training that SIGTERM stops at this step."""
    return command("train", *stopping(at), *SMALL, "balancer=moco", *more)


@pytest.mark.parametrize("at", slow_but([1, 8], [1, 7, 8, 11, 23]))
def test_sigterm_saves_and_says_how_to_go_on(here: Path, undisturbed: Path, at: int) -> None:
    run = interrupted(at)
    assert run.code == 128 + signal.SIGTERM
    assert f"Stopped at step {at}" in run.out
    (line,) = [line for line in run.out.splitlines() if line.startswith("resume    python")]
    assert "resume=outputs/mnist_two_head/" in line
    again = command("train", *SMALL, "balancer=moco", "resume=auto")
    assert again.code == 0, again.err
    assert f"resume   from step {at}" in again.out
    assert len(list(Path("outputs/mnist_two_head").iterdir())) == 1
    same_runs(run.run or next(Path("outputs/mnist_two_head").iterdir()), undisturbed)
    fresh = command("train", *SMALL, "balancer=moco", "resume=auto", "trainer.max_epochs=1")
    assert fresh.code == 0
    assert len(list(Path("outputs/mnist_two_head").iterdir())) == 2  # the first is finished


@pytest.mark.parametrize("end", slow_but(["epochs"], ["epochs", "patience"]))
def test_killed_between_the_last_checkpoint_and_the_end(here: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Nothing is left to train, and what is written is all that a run writes that was never killed."""
    from mtl.cli.conclusion import write_status

    class Killed(BaseException):
        pass

    own = [*SMALL, "balancer=moco", *(["trainer.patience=1", "optimizer.lr=0.0"] if end == "patience" else [])]
    whole = command("train", *own)
    assert whole.code == 0, whole.err
    assert whole.metrics["epochs"] == (2 if end == "patience" else 3)

    def killed(folder: Folder, status: str, **more: Any) -> None:
        if status == "finished":
            raise Killed
        write_status(folder, status, **more)

    with monkeypatch.context() as patch:
        patch.setattr("mtl.cli.conclusion.write_status", killed)
        with pytest.raises(Killed):
            command("train", *own)
    (run,) = {path.parent for path in here.glob("outputs/*/*/config.yaml")} - {whole.run.resolve()}
    assert json.loads((run / "metrics.json").read_text())["status"] == "running"
    again = command("train", *own, f"resume={run}")
    assert again.code == 0, again.err
    same_runs(run, whole.run)
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["best"]["monitor"] == "mean of digit/accuracy, parity/accuracy (max)"
    assert figures["best"]["mode"] == "max"
    assert figures["memory_per_step"] == whole.metrics["memory_per_step"]


def only_run() -> Path:
    (run,) = Path("outputs/mnist_two_head").iterdir()
    return run


def test_a_config_that_changes_what_matters_is_refused(here: Path) -> None:
    assert interrupted(5).code == 143
    before = {path: path.read_bytes() for path in only_run().rglob("*") if path.is_file() and path.suffix != ".log"}
    run = f"resume={only_run()}"
    other = command("train", *SMALL, "balancer=mgda", "seed=3", "optimizer.lr=1e-4", run)
    assert other.code == 1
    for line in ("seed: was 0, is 3", "optimizer.lr: was 0.005, is 0.0001", "was 'mtl.balancers.MoCo'"):
        assert line in other.err
    assert {path: path.read_bytes() for path in before} == before
    longer = command("train", *SMALL, "balancer=moco", "trainer.max_epochs=5", run)
    assert longer.code == 1
    assert "The learning rate's schedule depends on the number of epochs" in longer.err
    allowed = command("train", *SMALL, "balancer=moco", "optimizer.lr=1e-4", "resume_allow=[optimizer.lr]", run)
    assert allowed.code == 0, allowed.err
    assert json.loads((only_run() / "metrics.json").read_text())["steps"] == 24


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


def rates(run: Path) -> list[float]:
    rows = csv.reader((run / "metrics.csv").read_text().splitlines())
    return [float(value) for _, _, tag, value in rows if tag == "lr/default"]


def test_the_order_of_groups_is_compared() -> None:
    """A parameter belongs to the first that matches it, and for Python mappings in two orders are equal."""
    two = [{"optimizer": {"groups": {"*.bias": {"lr": 1.0}, "trunk": {"lr": 2.0}}}}]
    two.append({"optimizer": {"groups": dict(reversed(two[0]["optimizer"]["groups"].items()))}})
    assert [key for key, _, _ in differences(*two)] == ["optimizer.groups"]
    assert not list(differences(two[0], two[0]))


def test_what_may_change_changes_and_nothing_else(here: Path) -> None:
    flat = [*SMALL, "scheduler=none", "balancer=moco"]
    short = command("train", *flat, "trainer.max_epochs=1", "optimizer.groups={trunk: {lr: 1e-4}}")
    run, more = f"resume={short.run}", "trainer.max_epochs=2"
    groups = "optimizer.groups={trunk: {lr: 1e-4}}"

    def lrs() -> list[float]:
        state = checkpoint.load(short.run / "checkpoints/last.pt")
        return [group["lr"] for group in state["step"]["optimizer"]["param_groups"]]

    assert command("train", *flat, more, groups, "optimizer.lr=1e-2", "resume_allow=[optimizer.lr]", run).code == 0
    assert lrs() == [1e-2, 1e-4]
    other = "optimizer.groups={trunk: {lr: 3e-4}}"
    allow = "resume_allow=[optimizer.groups]"
    ended = command("train", *flat, "trainer.max_epochs=3", other, "optimizer.lr=1e-2", allow, run)
    assert ended.code == 0, ended.err
    assert lrs() == [1e-2, 3e-4]
    for changed in ("{trunk.conv1: {lr: 3e-4}}", "{heads: {lr: 1e-4}, trunk: {lr: 1e-4}}"):
        groups = f"optimizer.groups={changed}"
        ended = command("train", *flat, "trainer.max_epochs=4", groups, "optimizer.lr=1e-2", allow, run)
        assert ended.code == 1
        assert "resume: optimizer.groups were default, trunk and are " in ended.err
    # Another class has another state, whatever is allowed.
    for change in ("optimizer=sgd", "balancer=famo"):
        ended = command(
            "train",
            *SMALL,
            "scheduler=none",
            "balancer=moco",
            "trainer.max_epochs=4",
            other,
            change,
            run,
            "resume_allow=[optimizer,balancer]",
        )
        assert ended.code == 1, change
        assert "_target_: " in ended.err
        assert "Traceback" not in ended.err
    assert json.loads((short.run / "metrics.json").read_text())["status"] == "finished"


def test_auto_takes_what_may_change_too(here: Path) -> None:
    assert interrupted(5).code == 143
    ended = command("train", *SMALL, "balancer=moco", "optimizer.lr=1e-3", "resume=auto", "resume_allow=[optimizer.lr]")
    assert "resume   from step 5" in ended.out, ended.err
    assert len(list(Path("outputs/mnist_two_head").iterdir())) == 1


def test_what_counts_is_the_config_that_the_checkpoint_was_made_with(here: Path) -> None:
    """A run that was killed after a change was allowed, and before it was saved, has the change in config.yaml alone."""
    assert interrupted(5).code == 143
    path = only_run() / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.005", "lr: 0.0001"))
    ended = command("train", *SMALL, "balancer=moco", "optimizer.lr=1e-4", f"resume={only_run()}")
    assert ended.code == 1
    assert "optimizer.lr: was 0.005, is 0.0001" in ended.err


@pytest.mark.parametrize("content", slow_but(["a: ["], ["", "a: [", "- 1"]))
def test_runs_whose_files_are_broken_are_passed_over(here: Path, content: str) -> None:
    assert interrupted(5).code == 143
    broken = Path("outputs/mnist_two_head/9999-broken")
    broken.mkdir()
    (broken / "config.yaml").write_text(content)
    ended = command("train", *SMALL, "balancer=moco", "resume=auto")
    assert ended.code == 0, ended.err
    assert "resume   from step 5" in ended.out


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(here: Path) -> None:
    """In its folder, with logs that begin anew too."""
    whole = command("train", *SMALL)
    stopped = command("train", *SMALL, "output_root=again", "trainer.max_epochs=1")
    (run,) = Path("again/mnist_two_head").iterdir()
    assert stopped.code == 0
    config = (run / "config.yaml").read_text().replace("max_epochs: 1", "max_epochs: 3")
    (run / "config.yaml").write_text(config)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.json").write_text('{"status": "running"}')
    again = command("train", *SMALL, "output_root=again", "resume=auto")
    assert again.code == 0, again.err
    assert "has no checkpoint yet: it starts from the beginning" in again.out
    same_runs(run, whole.run)


def test_names_that_no_config_has_allow_nothing(here: Path) -> None:
    assert interrupted(5).code == 143
    ended = command("train", *SMALL, "balancer=moco", "resume=auto", "resume_allow=[optimzer.lr]")
    assert ended.code == 1
    assert "resume_allow: there is no key 'optimzer.lr'; did you mean 'optimizer.lr'?" in ended.err


def files_of(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.suffix != ".log"}


@pytest.mark.parametrize(
    "slip", ["trainer.max_epochs=0", "optimizer.lr=7", "data.batch_size=9", "device=cuda:77", "tasks.digit.target=nope"]
)
def test_whoever_is_refused_touches_nothing(here: Path, undisturbed: Path, slip: str) -> None:
    """A finished run stays a finished run."""
    run = here / "run"
    shutil.copytree(undisturbed, run)
    before = files_of(run)
    ended = command("train", *SMALL, "balancer=moco", slip, f"resume={run}")
    assert ended.code == 1
    assert files_of(run) == before


def test_a_run_that_is_being_built_is_not_forgotten_by_a_second_process(here: Path) -> None:
    run = here / "live"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "train.log").touch()
    with locked(run) as free:
        assert free
        ended = command("train", *SMALL, f"resume={run}")
    assert ended.code == 1
    assert "another process is using" in ended.err
    assert (run / "config.yaml").read_text() == "seed: 0\n"


def test_a_run_that_began_at_the_same_moment_is_not_forgotten(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.train.locked", lambda folder: nullcontext(False))  # the other process has the lock
    ended = command("train", *SMALL, "hydra.run.dir=both")
    assert ended.code == 1
    assert "another process is using" in ended.err
    assert (here / "both").is_dir()


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # that is what stands in for it
@pytest.mark.parametrize("balancer", ["Equal", "GradVac", "MoCo", "FAMO"])
@pytest.mark.parametrize("where", ["before", "within", "after"])
def test_memory_that_runs_out_in_the_optimizer(tmp_path: Path, balancer: str, where: str) -> None:
    """What is saved then is a whole step's state, or nothing."""
    whole = built(tmp_path / "whole", balancer)
    whole[0].fit()
    trainer, logger = built(tmp_path / "cut", balancer, every_steps=2)
    move = trainer.step.after if where == "after" else trainer.step.optimizer.step

    def out(*given: Any, **options: Any) -> None:
        if trainer.global_step == 6:
            if where == "within":
                next(iter(trainer.step.parameters.values())).data.add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        move(*given, **options)

    if where == "after":
        trainer.step.after = out
    else:
        trainer.step.optimizer.step = out
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()
    state = checkpoint.load(tmp_path / "cut" / "last.pt")
    second, other = built(tmp_path / "cut", balancer, seed=7)
    other.lines = logger.lines
    second.load_state_dict(state)
    second.fit()
    assert_same(ended(second, other), ended(*whole))


def test_what_is_not_there_is_an_error_and_makes_nothing(here: Path) -> None:
    ended = command("train", *SMALL, "resume=outputs/mnist_two_head/nowhere")
    assert ended.code == 1
    assert "'outputs/mnist_two_head/nowhere' is not the folder of a run" in ended.err
    assert not Path("outputs").exists()


@pytest.mark.parametrize("damage", slow_but(["bit", "gone"], ["truncated", "bit", "empty", "gone"]))
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
    with locked(only_run()) as free:
        assert free
        code = (
            "from pathlib import Path\nfrom mtl.runs.resume import locked\n"
            f"with locked(Path({str(only_run().resolve())!r})) as free: print(free)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert done.stdout.strip() == "False", done.stderr
        second = command("train", *SMALL, "balancer=moco", f"resume={only_run()}")
        assert second.code == 1
        assert "another process is using" in second.err


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    trainer, _ = make(tmp_path, report=told.append)
    fsync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) in (3, 4, 5):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr("mtl.training.checkpoint.os.fsync", full)
    trainer.fit()
    assert trainer.epoch == 3
    assert any("could not be written: [Errno 28] No space left on device. Training goes on" in line for line in told)
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 3


def test_what_could_not_be_written_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best parameters too: the test's figures are theirs."""
    original, failing = checkpoint.save, []

    def full(path: Path, state: dict[str, Any], **options: Any) -> None:
        if path.stem == "best" and not failing:
            failing.append(state["epoch"])
            raise OSError(28, "No space left on device")
        original(path, state, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    trainer, _ = make(tmp_path, max_epochs=5, report=lambda line: None)
    trainer.fit()
    assert failing
    assert not trainer.writer.failed
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == trainer.selection.best_epoch
    assert trainer.saved_step == trainer.global_step

    def always(path: Path, state: dict[str, Any], **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", always)
    trainer, _ = make(tmp_path / "never", report=lambda line: None)
    trainer.fit()
    assert set(trainer.writer.failed) == {"best", "last"}
    assert trainer.saved_step == 0


def test_a_screen_that_is_gone_does_not_hang_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(line: str) -> None:
        raise BrokenPipeError

    (tmp_path / "last.pt").mkdir()
    (tmp_path / "last.pt" / "in the way").touch()
    writer = Writer(tmp_path, keep=1, report=gone)
    writer.save("last", {"global_step": 1})
    done = threading.Thread(target=writer.wait, daemon=True)
    done.start()
    done.join(HANGS)
    assert not done.is_alive()
    assert set(writer.failed) == {"last"}


def test_saving_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("mtl.training.trainer.time.monotonic", lambda: clock[0])
    saved: list[int] = []
    trainer, _ = make(tmp_path, max_epochs=1, count=80, every_minutes=1.0)
    trainer.hooks = Hooks(callbacks=[lambda t, r: clock.__setitem__(0, clock[0] + 25)])  # a step takes 25 seconds
    save = trainer._save
    monkeypatch.setattr(trainer, "_save", lambda name: (saved.append(trainer.global_step), save(name))[1])
    trainer.fit()
    assert saved == [3, 6, 9, 10, 10]  # the last two are the epoch's best and last


def test_saving_holds_training_up_for_a_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written is what was there when it was asked for."""
    original, goes_on = checkpoint.save, threading.Event()

    def slow(*given: Any, **options: Any) -> None:
        assert goes_on.wait(HANGS)
        original(*given, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = Writer(tmp_path, keep=1, report=print)
    value = torch.zeros(3)
    writer.save("last", {"value": value, "nested": [{"value": value}]})
    value += 1
    assert not (tmp_path / "last.pt").exists()
    goes_on.set()
    writer.wait()
    state = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(state["value"], torch.zeros(3))
    assert torch.equal(state["nested"][0]["value"], torch.zeros(3))


def test_saves_that_come_faster_than_the_disk_hold_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one is written, those between are passed over, and order is kept between the kinds."""
    original, written = checkpoint.save, []
    began, goes_on = threading.Event(), threading.Event()

    def slow(path: Path, state: dict[str, Any], **options: Any) -> None:
        began.set()
        assert goes_on.wait(HANGS)
        original(path, state, **options)
        written.append((path.stem, state["number"]))

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = Writer(tmp_path, keep=2, report=print)
    writer.save("last", {"number": 0})
    assert began.wait(HANGS)
    for number in range(1, 6):
        writer.save("last", {"number": number})
    writer.save("best", {"number": 5})
    for number in range(6, 9):
        writer.save("last", {"number": number})
    assert not written
    goes_on.set()
    writer.wait()
    assert written == [("last", 0), ("last", 5), ("best", 5), ("last", 8)]


def test_how_many_are_kept_and_the_manifest(tmp_path: Path) -> None:
    for number in range(6):
        checkpoint.save(tmp_path / "last.pt", {"number": number}, keep=3)
    kept = {path.name: checkpoint.load(path)["number"] for path in tmp_path.glob("*.pt")}
    assert kept == {"last.pt": 5, "last-1.pt": 4, "last-2.pt": 3}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == checkpoint.FORMAT
    assert len(manifest["sha256"]["last.pt"]) == 6  # more than there are files: a kill may leave one without
    assert not list(tmp_path.glob("*.tmp"))


def test_checkpoints_between_note_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed there again and again, the files that are in place stay good."""
    path = tmp_path / "last.pt"
    for number in range(3):
        checkpoint.save(path, {"number": number}, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr("mtl.training.checkpoint._replace_by_copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for number in range(20):
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(path, {"number": 100 + number}, keep=2)
    assert checkpoint.load(path)["number"] == 2
    assert checkpoint.load(tmp_path / "last-1.pt")["number"] == 1


def test_many_that_are_kept(tmp_path: Path) -> None:
    for number in range(14):
        checkpoint.save(tmp_path / "last.pt", {"number": number}, keep=12)
    for name in ("last.pt", "last-1.pt"):
        (tmp_path / name).write_bytes(b"")
    told: list[str] = []
    assert checkpoint.newest(tmp_path, told.append)["number"] == 11
    assert len(told) == 2
    checkpoint.save(tmp_path / "last.pt", {"number": 14}, keep=2)
    assert {path.name for path in tmp_path.glob("*.pt")} == {"last.pt", "last-1.pt"}


def test_events_that_were_being_cut_when_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl.loggers import TensorBoardLogger

    def written(folder: Path) -> list[int]:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        return [event.step for event in events.Scalars("loss/a/train")]

    first = TensorBoardLogger(tmp_path, ["a"])
    for step in range(1, 4):
        first.log(step, 1, {"loss/a/train": 0.5})
    state = first.state_dict()
    for step in range(4, 7):
        first.log(step, 1, {"loss/a/train": 0.5})
    first.close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            TensorBoardLogger(tmp_path, ["a"]).load_state_dict(state)
    second = TensorBoardLogger(tmp_path, ["a"])
    second.load_state_dict(state)
    second.log(4, 1, {"loss/a/train": 0.25})
    second.close()
    assert written(tmp_path) == [1, 2, 3, 4]


def test_data_that_are_not_the_runs(tmp_path: Path) -> None:
    trainer, _ = built(tmp_path, "Equal")
    trainer.fit()
    state = checkpoint.load(tmp_path / "last.pt")
    other, logger = built(tmp_path, "Equal", count=31)
    logger.lines = [(1, 1, {}), (2, 1, {})] * 50
    before = logger.lines.copy()
    with pytest.raises(mtl.UserError, match="the training data aren't those of the run"):
        other.load_state_dict(state)
    assert logger.lines == before


def test_versions_that_changed_are_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert interrupted(5).code == 143
    from mtl.cli import record, resuming

    now = record.versions()
    assert set(now) == {"mtl", "torch", "numpy", "python", "threads", "device"}
    monkeypatch.setattr(resuming, "versions", lambda: {**now, "threads": 99, "device": "another"})
    ended = command("train", *SMALL, "balancer=moco", "resume=auto")
    assert f"warning  threads was {now['threads']} and is 99: the numbers may differ" in ended.out
    assert "warning  device was" in ended.out
    assert ended.code == 0


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_each_time(tmp_path: Path) -> None:
    """SIGKILL, saving included: after each step a checkpoint is written."""
    arguments = ["task=mnist_two_head", "trainer.max_epochs=25", "data.batch_size=100", "log.every=7"]  # 1,000 steps
    arguments += ["balancer=pcgrad", "checkpoint.every_steps=1"]
    line = [sys.executable, "-m", "mtl.train", *arguments]
    env = environment() | {"OMP_NUM_THREADS": "1"}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    (tmp_path / "killed" / "dies.py").write_text(
        "import os, random, signal, threading\n\n"
        "class Dies:\n"
        "    def __init__(self, seed):\n"
        "        self.draws, self.left = random.Random(seed), None\n"
        "    def __call__(self, trainer, result):\n"
        "        self.left = self.draws.randrange(1, 50) if self.left is None else self.left - 1\n"
        "        if self.left == 0:\n"
        "            kill = os.getpid(), signal.SIGKILL\n"
        "            threading.Timer(self.draws.random() / 50, os.kill, kill).start()\n"
        "        if self.left == -40:\n"
        "            threading.Event().wait()\n"  # it would be 10 times 90 steps, and they are to be fewer than all
    )
    subprocess.run(line, cwd=tmp_path / "whole", env=env, check=True, capture_output=True)
    (whole,) = (tmp_path / "whole").glob("outputs/*/*")
    draws = random.Random(int(os.environ.get("MTL_KILLS", "0")))
    for _ in range(10):  # scripts/soak_resume.py does it for as long as one likes
        dies = ["+callbacks.dies._target_=dies.Dies", f"+callbacks.dies.seed={draws.randrange(10**6)}"]
        done = subprocess.run([*line, *dies, "resume=auto"], cwd=tmp_path / "killed", env=env, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = subprocess.run([*line, "resume=auto"], cwd=tmp_path / "killed", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resume   from step" in done.stdout
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


def test_samples_do_not_seed_the_generators_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those that training's dropout draws from, in this process too."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: pytest.fail("seeded"))
    assert len(list(Loader(Augmented(), batch_size=5, seed=3).batches(1))) == 3


@pytest.mark.parametrize(("count", "size", "steps"), [(12, 4, 3), (13, 4, 4), (3, 8, 1), (8, 8, 1)])
def test_steps_in_an_epoch(count: int, size: int, steps: int) -> None:
    from mtl.data import Fields

    loader = Loader(Fields({"x": torch.arange(count)}), batch_size=size)
    for epoch in (1, 2, 7):
        assert len(list(loader.batches(epoch))) == len(loader) == steps


@pytest.mark.parametrize(
    "cut", slow_but(["trainer.num_micro_batches=7"], ["trainer.micro_batch_size=60", "trainer.num_micro_batches=7"])
)
def test_micro_batches_and_tails_by_config(here: Path, cut: str) -> None:
    """270 samples a batch don't go into 4,000; neither do 60 into 270. Dropout is the exception, so it is off."""
    options = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=270", "model.trunk.dropout=0.0"]
    whole, parts = command("train", *options), command("train", *options, cut)
    assert (whole.metrics["steps"], parts.metrics["steps"]) == (15, 15)
    states = [checkpoint.load(ended.run / "checkpoints/last.pt")["model"] for ended in (whole, parts)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=2e-5)  # float32, AdamW
    assert command("train", *options, cut, "trainer.tail=drop").metrics["steps"] == 14


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
