"""Learning rates over a run, against formulas and loops by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command
from test_trainer import make
from torch.optim import lr_scheduler

import mtl
from mtl import schedulers
from mtl.config.scheduler import build_scheduler, interval_of

SCHEDULER = "torch.optim.lr_scheduler"


def optimizer(rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def rates(scheduler: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [4, 0.2, 0, 20, 1.0])
def test_warm_up(warmup: float) -> None:
    steps = warmup if isinstance(warmup, int) else 20 * warmup
    then = {
        "warmup": lambda share: 1.0,
        "warmup_cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
        "warmup_linear": lambda share: 1 - share,
    }
    for name, after in then.items():
        given = optimizer()
        found = rates(getattr(schedulers, name)(given, warmup=warmup, total=20), given, 20)
        for number, rate in enumerate(found):
            share = number / steps if number < steps else after((number - steps) / (20 - steps))
            assert rate == pytest.approx(0.1 * share, abs=1e-15)


def test_warm_ups_that_are_refused() -> None:
    for warmup in (-1, 21, 1.5, math.nan, True, "0.1"):
        with pytest.raises(mtl.UserError, match="it must be a whole number of steps up to 20, or a share"):
            schedulers.warmup(optimizer(), warmup=warmup, total=20)


@pytest.mark.parametrize(
    "name",
    [
        *("StepLR", "MultiStepLR", "ExponentialLR", "ReduceLROnPlateau", "CosineAnnealingWarmRestarts"),
        *(
            "CosineAnnealingLR",
            "LinearLR",
            "ConstantLR",
            "PolynomialLR",
            "LambdaLR",
            "SequentialLR",
            "ChainedScheduler",
        ),
    ],
)
def test_what_counts_says_what(name: str) -> None:
    with pytest.raises(mtl.UserError) as error:
        interval_of({"_target_": f"{SCHEDULER}.{name}", "step_size": 100})
    assert f"set what {name} counts" in str(error.value)
    assert "scheduler.interval=step" in str(error.value)
    assert "scheduler.interval=epoch" in str(error.value)
    for interval in ("step", "epoch"):
        assert interval_of({"_target_": f"{SCHEDULER}.{name}", "interval": interval}) == interval


def test_what_needs_not_say_it() -> None:
    assert interval_of(None) == "step"
    assert interval_of({"_target_": f"{SCHEDULER}.OneCycleLR", "max_lr": 0.1, "total_steps": "total_steps"}) == "step"
    assert interval_of({"_target_": f"{SCHEDULER}.CosineAnnealingLR", "T_max": "total_steps"}) == "step"
    for interval, word in (("epoch", "total_steps"), ("step", "total_epochs")):
        node = {"_target_": f"{SCHEDULER}.CosineAnnealingLR", "T_max": word, "interval": interval}
        with pytest.raises(mtl.UserError, match=f"it counts {interval}s .*use total_{interval}s"):
            interval_of(node)


def built(node: dict[str, Any], given: torch.optim.Optimizer, total_steps: int = 30) -> Any:
    return build_scheduler({"scheduler": node, "trainer": {"max_epochs": 5}}, given, total_steps)


def test_schedulers_of_schedulers() -> None:
    warm = {"_target_": f"{SCHEDULER}.LinearLR", "start_factor": 0.1, "total_iters": 5}
    down = {"_target_": f"{SCHEDULER}.CosineAnnealingLR", "T_max": "total_steps"}
    first, second = optimizer(), optimizer()
    node = {"_target_": f"{SCHEDULER}.SequentialLR", "interval": "step", "schedulers": [warm, down], "milestones": [5]}
    by_hand = lr_scheduler.SequentialLR(
        second, [lr_scheduler.LinearLR(second, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(second, 30)], [5]
    )
    found = rates(built(node, first), first, 30)
    assert found == rates(by_hand, second, 30)
    assert found[0] == pytest.approx(0.01)
    assert found[5] == pytest.approx(0.1)

    first, second = optimizer(), optimizer()
    shrink = {"_target_": f"{SCHEDULER}.ExponentialLR", "gamma": 0.9}
    node = {"_target_": f"{SCHEDULER}.ChainedScheduler", "interval": "step", "schedulers": [warm, shrink]}
    by_hand = lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(second, 0.1, total_iters=5), lr_scheduler.ExponentialLR(second, 0.9)]
    )
    found = rates(built(node, first), first, 12)
    assert found == rates(by_hand, second, 12)
    assert found[10] == pytest.approx(0.1 * 0.9**10)


def test_what_schedulers_of_schedulers_refuse() -> None:
    outer = {"_target_": f"{SCHEDULER}.SequentialLR", "interval": "step", "milestones": [5]}
    inner = {"_target_": f"{SCHEDULER}.ExponentialLR", "gamma": 0.9}
    for schedulers_, message in (
        (
            [inner, {**inner, "interval": "step"}],
            r"scheduler\.schedulers\[1\]\.interval: all inner schedulers have the same interval",
        ),
        ([inner, 3], r"scheduler\.schedulers\[1\] is 3; it must be a mapping"),
        ([], r"scheduler\.schedulers is \[\]; it must be a list"),
        (
            [inner, {"_target_": f"{SCHEDULER}.ReduceLROnPlateau"}],
            r"scheduler\.schedulers\[1\]: ReduceLROnPlateau follows a validation metric",
        ),
    ):
        with pytest.raises(mtl.UserError, match=message):
            built({**outer, "schedulers": schedulers_}, optimizer())


def test_a_scheduler_that_counts_epochs(tmp_path: Path) -> None:
    trainer, logger = make(tmp_path, max_epochs=5, every=1)
    step = trainer.step
    step.descent.scheduler = lr_scheduler.StepLR(step.optimizer, 2, 0.1)
    step.descent.interval = "epoch"
    for group in step.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.05
    trainer.fit()
    expected = {number: 0.05 * 0.1 ** ((number - 1) // 4 // 2) for number in range(1, 21)}  # four steps an epoch
    assert dict(logger.of("lr/default")) == pytest.approx(expected)


def test_a_plateau_follows_what_is_monitored(tmp_path: Path) -> None:
    def planned(monitor: str | None, mode: str, **options: Any) -> Any:
        trainer, logger = make(tmp_path, max_epochs=6, monitor=None if monitor is None else {monitor: "min"}, **options)
        trainer.step.descent.scheduler = lr_scheduler.ReduceLROnPlateau(
            trainer.step.optimizer, mode, factor=0.5, patience=0, threshold=10.0, threshold_mode="abs"
        )
        trainer.step.descent.interval = "epoch"
        return trainer, logger

    trainer, logger = planned("a/loss", "min")  # by a threshold that no epoch reaches, each of them is a plateau
    start = trainer.step.optimizer.param_groups[0]["lr"]
    trainer.fit()
    rate = dict(logger.of("lr/default"))
    assert [rate[4 * epoch] for epoch in range(1, 7)] == [start * 0.5 ** max(0, epoch - 2) for epoch in range(1, 7)]
    with pytest.raises(mtl.UserError, match=r"scheduler\.mode is 'min'.*set scheduler\.mode=max"):
        planned(None, "min")[0].fit()
    model = trainer.step.model
    plateau = lr_scheduler.ReduceLROnPlateau(trainer.step.optimizer)
    with pytest.raises(mtl.UserError, match="set its interval to epoch"):
        mtl.Step(model, trainer.step.tasks, trainer.step.optimizer, update=mtl.Update(scheduler=plateau))
    with pytest.raises(mtl.UserError, match="'batch' is not one of step, epoch"):
        mtl.Step(model, trainer.step.tasks, trainer.step.optimizer, update=mtl.Update(interval="batch"))


FAST = ["task=mnist_two_head", "data.batch_size=1000", "logger=[csv]", "log.every=1", "log.pictures=null"]


def rates_of(run: Path) -> list[float]:
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return [float(row[3]) for row in rows if row[2] == "lr/default"]


def test_from_the_command_line(here: Path) -> None:
    node = f"scheduler={{_target_: {SCHEDULER}.StepLR, step_size: 2, gamma: 0.1}}"
    ended = command("train", *FAST, "trainer.max_epochs=4", "~scheduler", f"+{node}")
    assert ended.code == 1
    assert "scheduler.interval: set what StepLR counts" in ended.err + ended.out
    node = f"scheduler={{_target_: {SCHEDULER}.StepLR, step_size: 2, gamma: 0.1, interval: epoch}}"
    ended = command("train", *FAST, "trainer.max_epochs=4", "~scheduler", f"+{node}")
    assert ended.code == 0, ended.err
    assert rates_of(ended.run) == pytest.approx([5e-3] * 8 + [5e-4] * 8)  # 4,000 images are four steps an epoch
    ended = command("train", *FAST, "trainer.max_epochs=5", "scheduler=warmup_linear", "scheduler.warmup=0.2")
    assert ended.code == 0, ended.err
    expected = [0, 0.25, 0.5, 0.75, *[1 - k / 16 for k in range(16)]]
    assert rates_of(ended.run) == pytest.approx([5e-3 * share for share in expected])
