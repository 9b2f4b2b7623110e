"""The training loop: counters, logs, checkpoints, and when it stops."""

import os
import random
import signal
import time
from collections.abc import Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import mtl
from mtl.data import Fields, Loader
from mtl.loggers import Logger, Loggers
from mtl.process.signals import Stopped
from mtl.training import checkpoint
from mtl.training.hooks import Hooks
from mtl.training.options import Checkpoints, Logs
from mtl.training.selection import Criterion
from mtl.training.trainer import Trainer


class Remembers(Logger):
    """A logger that records its calls."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, int, dict[str, float]]] = []

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        self.lines.append((step, epoch, dict(scalars)))

    def of(self, tag: str) -> list[tuple[int, float]]:
        return [(step, scalars[tag]) for step, _, scalars in self.lines if tag in scalars]


def grouped(folder: Path, **options: Any) -> dict[str, Any]:
    """Returns the arguments of a trainer that saves into the folder, with each option in its group."""
    kinds = {"checkpoints": partial(Checkpoints, folder), "criterion": Criterion, "hooks": Hooks, "logs": Logs}
    arguments = {}
    for name, kind in kinds.items():
        names = signature(kind).parameters
        arguments[name] = kind(**{key: options.pop(key) for key in list(options) if key in names})
    return {**options, **arguments}


def make(
    folder: Path,
    *,
    count: int = 30,
    val: bool = True,
    seed: int = 0,
    optimizer: Any = torch.optim.AdamW,
    precision: str = "fp32",
    **options: Any,
) -> tuple[Trainer, Remembers]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(count + 20, 6, generator=generator)
    fields = {"x": x, "a": (x[:, 0] > 0).long(), "b": (x[:, 1] > 0).long()}
    train, held_out = ({n: f[part] for n, f in fields.items()} for part in (slice(count), slice(count, None)))
    metrics = {"accuracy": partial(MulticlassAccuracy, num_classes=2, average="micro")}
    tasks = [mtl.Task(n, head=nn.Linear(8, 2), loss=nn.CrossEntropyLoss(), target=n, metrics=metrics) for n in "ab"]
    trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2))
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    chosen = optimizer(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(chosen, 0.9)
    step = mtl.Step(model, tasks, chosen, update=mtl.Update(scheduler=scheduler), precision=precision)
    logger = Remembers()
    defaults = {"max_epochs": 3, "every": 4, "loggers": Loggers([logger])}
    trainer = Trainer(
        step,
        Loader(Fields(train), batch_size=8, shuffle=True),
        Loader(Fields(held_out), batch_size=100) if val else None,
        **grouped(folder, **{**defaults, **options}),
    )
    return trainer, logger


def test_a_run(tmp_path: Path) -> None:
    losses: list[dict[str, float]] = []
    trainer, logger = make(tmp_path, callbacks=[lambda t, r: losses.append({n: v.item() for n, v in r.losses.items()})])
    trainer.fit()
    assert (trainer.global_step, trainer.epoch, len(losses)) == (12, 3, 12)
    # Measured in the first step and in every fourth; the rest of an epoch is logged at its end.
    assert [step for step, _ in logger.of("grad_norm/a")] == [1, 4, 8, 12]
    assert [step for step, _ in logger.of("loss/a/train")] == [1, 4, 8, 12]
    assert [step for step, _ in logger.of("metric/a/accuracy/val")] == [4, 8, 12]
    windows = [(0, 1), (1, 4), (4, 8), (8, 12)]
    for (_, logged), (start, end) in zip(logger.of("loss/b/train"), windows, strict=True):
        assert logged == pytest.approx(sum(loss["b"] for loss in losses[start:end]) / (end - start), rel=1e-6)
    assert trainer.readings.epoch_losses["a"] == pytest.approx(sum(loss["a"] for loss in losses[8:]) / 4, rel=1e-6)
    # The rate that the step was taken with: n steps earlier the scheduler hadn't moved.
    assert dict(logger.of("lr/default")) == {n: pytest.approx(0.05 * 0.9 ** (n - 1)) for n in (1, 4, 8, 12)}
    assert all(speed > 0 for _, speed in logger.of("speed/samples_per_second"))
    values = [value for _, value in logger.of("monitor/val")]
    assert trainer.selection.best == max(values)
    assert trainer.selection.best_epoch == values.index(max(values)) + 1

    state = checkpoint.load(tmp_path / "last.pt")
    assert (state["global_step"], state["epoch"], state["best_epoch"]) == (12, 3, trainer.selection.best_epoch)
    for name, value in trainer.step.model.state_dict().items():
        assert torch.equal(state["model"][name], value)
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == trainer.selection.best_epoch


def test_what_is_logged_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for log_every in (1, 5, 1000):
        trainer, _ = make(tmp_path, every=log_every)
        trainer.fit()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.step.model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_without_validation_the_last_parameters_are_the_best(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, val=False)
    trainer.fit()
    assert trainer.selection.best is None
    assert trainer.epoch == 3
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == 3
    for option in ({"patience": 1}, {"last_epochs": 1}, {"monitor": {"a/accuracy": "max"}}):
        with pytest.raises(mtl.UserError, match="need validation data, and data.val is null"):
            make(tmp_path, val=False, **option)


def test_means_over_the_last_epochs(tmp_path: Path) -> None:
    trainer, logger = make(tmp_path / "whole", max_epochs=4, last_epochs=3)
    trainer.fit()
    logged = [value for _, value in logger.of("loss/a/val")]
    assert trainer.selection.mean()["a"]["loss"] == pytest.approx(sum(logged[1:]) / 3, rel=1e-12)
    first, _ = make(tmp_path / "parts", max_epochs=2, last_epochs=3)
    first.fit()
    assert first.selection.mean()["a"]["loss"] == pytest.approx(sum(logged[:2]) / 2, rel=1e-12)
    second, _ = make(tmp_path / "parts", max_epochs=4, last_epochs=3)
    second.load_state_dict(checkpoint.load(tmp_path / "parts/last.pt"))
    second.fit()
    assert second.selection.mean() == trainer.selection.mean()
    plain, _ = make(tmp_path / "plain")
    plain.fit()
    assert plain.selection.mean() == {}


def test_patience(tmp_path: Path) -> None:
    trainer, logger = make(tmp_path, max_epochs=50, patience=2)
    trainer.fit()
    values = [value for _, value in logger.of("monitor/val")]
    assert trainer.epoch < 50
    best_epoch = trainer.selection.best_epoch
    assert trainer.epoch == best_epoch + 2
    assert max(values[:best_epoch]) == trainer.selection.best >= max(values[best_epoch:])


def test_nan_is_named_with_task_and_step(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path)
    loss = trainer.step.tasks[1].loss
    calls = []

    def turns_nan(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.extend([1] * prediction.requires_grad)  # validation has no gradients
        return loss(prediction, target) * (float("nan") if len(calls) == 7 else 1.0)

    trainer.step.tasks[1].loss = turns_nan
    with pytest.raises(mtl.UserError, match=r"task 'b': its loss is nan at step 7 \(epoch 2, samples "):
        trainer.fit()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize("seed", [0, 1])
def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path, seed: int) -> None:
    def interrupt(trainer: Trainer, _: object) -> None:
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    trainer, logger = make(tmp_path, seed=seed, callbacks=[interrupt])
    with pytest.raises(Stopped):
        trainer.fit()
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["global_step"] == 6
    assert torch.equal(state["model"]["trunk.0.weight"], trainer.step.model.trunk[0].weight)
    assert (
        logger.of("loss/a/train")[-1][0] == 4
    )  # the rest is logged when the run goes on, at the step that it would be
    assert len(state["readings"]["pending"]) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_no_tensor_is_read_between_logging_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading one would make the CPU wait for a GPU."""
    reads: list[int] = []
    # SGD, since AdamW reads step counters of its own, which are on the CPU.
    trainer, _ = make(tmp_path, every=10, val=False, max_epochs=4, optimizer=torch.optim.SGD)
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *a: Any, original: Any = original, **k: Any) -> Any:
            reads.append(trainer.global_step)
            return original(self, *a, **k)

        monkeypatch.setattr(torch.Tensor, name, counted)
    trainer.fit()
    # Read while step 1, step 10 or the ends of epochs (4, 8, 12, 16) are logged, and never else.
    assert set(reads) <= {0, 1, 4, 8, 10, 12, 16}
    assert {1, 4, 8, 10, 12, 16} <= set(reads)


def test_every_epoch_has_an_order_of_its_own_and_the_model_is_in_training_mode(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, max_epochs=2)
    seen: list[tuple[int, bool, list[float]]] = []
    trunk = trainer.step.model.trunk

    def note(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            seen.append((trainer.epoch, module.training, inputs[0][:, 0].tolist()))

    trunk.register_forward_pre_hook(note)
    trainer.step.model.eval()
    trainer.fit()
    assert all(training for _, training, _ in seen)
    first, second = ([x for epoch, _, xs in seen if epoch == e for x in xs] for e in (1, 2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_steps_that_overflow_are_counted_and_not_logged(tmp_path: Path) -> None:
    def overflow(trainer: Trainer, _: object) -> None:
        trainer.train.dataset.fields["x"][:] = original if trainer.tried != 3 else float("inf")

    trainer, logger = make(tmp_path, precision="fp16", callbacks=[overflow], max_epochs=3, val=False)
    original = trainer.train.dataset.fields["x"].clone()
    with pytest.raises(mtl.UserError, match="its loss is nan at step 4"):
        trainer.fit()

    class Overflows(torch.autograd.Function):
        """A finite loss with an infinite gradient, as in fp16 with a scale that is too large."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * (float("inf") if trainer.tried == 3 else 1.0)

    trainer, logger = make(tmp_path, precision="fp16", val=False)
    trainer.step.model.trunk.register_forward_hook(lambda module, inputs, output: Overflows.apply(output))
    trainer.fit()
    assert (trainer.tried, trainer.global_step) == (12, 11)
    assert 4 in dict(logger.of("grad_norm/a"))  # the fourth step is measured when it is taken
    assert all(torch.tensor(list(values.values())).isfinite().all() for values in trainer.readings.measured)


def test_time_per_step_is_within_that_of_the_run(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, callbacks=[lambda *_: time.sleep(0.01)])
    start = time.perf_counter()
    trainer.fit()
    elapsed = time.perf_counter() - start
    assert trainer.tried == 12
    counted = 12 - 1 - trainer.costs.weighed  # those left out may have been faster: only the sum is bounded
    assert counted > 0
    assert 0.01 < trainer.seconds_per_step < elapsed / counted
    once, _ = make(tmp_path, count=5, max_epochs=1)
    once.fit()
    assert once.seconds_per_step is None


@pytest.mark.parametrize("during", ["last epoch's validation", "first step"])
def test_ctrl_c_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str) -> None:
    trainer, _ = make(tmp_path, max_epochs=2)
    validate = trainer.selection.validate

    def interrupted(*arguments: Any) -> dict[str, float]:
        figures = validate(*arguments)
        if trainer.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return figures

    if during == "first step":
        trainer.hooks = Hooks(callbacks=[lambda *_: os.kill(os.getpid(), signal.SIGINT)])
    else:
        monkeypatch.setattr(trainer.selection, "validate", interrupted)
    with pytest.raises(Stopped):
        trainer.fit()
    assert checkpoint.load(tmp_path / "last.pt")["global_step"] == (1 if during == "first step" else 8)


def test_tasks_that_come_by_turns_are_all_measured(tmp_path: Path) -> None:
    """With a log every fourth step and two sources by turns it would be the same task each time."""
    from mtl.data import Mix

    trainer, logger = make(tmp_path, max_epochs=4, val=False)
    loaders = {name: Loader(trainer.train.dataset, batch_size=8, shuffle=True, seed=i) for i, name in enumerate("ab")}
    trainer.train = Mix(loaders, {"a": "a", "b": "b"}, sampling="round_robin", epoch=8)
    trainer.fit()
    steps = {task: [step for step, _ in logger.of(f"grad_norm/{task}")] for task in "ab"}
    assert len(steps["a"]) >= 7
    assert len(steps["b"]) >= 7


def test_a_metric_that_can_t_be_used_is_refused_before_the_first_step_without_validation_data(tmp_path: Path) -> None:
    from torchmetrics.classification import BinaryAUROC

    trainer, _ = make(tmp_path, val=False)
    trainer.step.tasks[0].metrics = {"auc": BinaryAUROC}
    with pytest.raises(mtl.UserError, match="its metric 'auc', BinaryAUROC, takes one prediction for each yes or no"):
        trainer.fit()
    assert trainer.global_step == 0


def draw(*_: Any) -> None:
    """Draws from every random generator."""
    torch.randn(3)
    np.random.rand(3)
    random.random()


class Draws(Remembers):
    """A logger that draws random numbers, and takes histograms."""

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        draw()
        super().log(step, epoch, scalars)

    def histogram(self, tag: str, step: int, values: Any) -> None:
        draw()


class Bootstrapped(MulticlassAccuracy):
    """A metric that draws random numbers when it is created and at each update."""

    def __init__(self, **options: Any) -> None:
        draw()
        super().__init__(**options)

    def update(self, *arguments: Any) -> None:
        draw()
        super().update(*arguments)


def into_eval_mode(trainer: Trainer, *_: Any) -> None:
    trainer.step.model.eval()


@pytest.mark.parametrize("what", ["callback", "after_epoch", "logger", "metric", "eval mode"])
def test_other_peoples_code_changes_no_bit_of_the_training(tmp_path: Path, what: str) -> None:
    """The model has dropout, so that every draw and every step in eval mode would show."""
    ends, generators = [], []
    for own in (False, True):
        options: dict[str, Any] = {}
        if own and what == "callback":
            options["callbacks"] = [draw]
        if own and what == "after_epoch":
            options["after_epoch"] = [draw, lambda trainer: trainer.loggers.show("histogram", "a", 1, [1.0])]
        if own and what == "logger":
            options["loggers"] = Loggers([Draws()])
        if own and what == "eval mode":
            options |= {"callbacks": [into_eval_mode], "after_epoch": [into_eval_mode]}
        trainer, _ = make(tmp_path, every=2, **options)
        if own and what == "metric":
            for task in trainer.step.tasks:
                task.metrics = {"accuracy": partial(Bootstrapped, num_classes=2, average="micro")}
        trainer.fit()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.step.model.parameters()]))
        generators.append((torch.rand(1).item(), trainer.selection.best))
        assert trainer.step.model.training
    assert torch.equal(*ends)
    assert generators[0] == generators[1]


def test_a_callback_of_ones_own_that_fails_is_named(tmp_path: Path) -> None:
    def fails(trainer: Trainer, result: Any) -> None:
        draw()
        raise ValueError("it doesn't work")

    trainer, _ = make(tmp_path, callbacks=[fails])
    with pytest.raises(mtl.UserError, match="callback fails failed at step 1: .*it doesn't work"):
        trainer.fit()


def test_parameters_that_thaw_are_not_said_to_be_unreached(tmp_path: Path) -> None:
    """Only the first step would be measured, and the trunk is frozen in it; it is trained and shared afterwards."""
    trainer, logger = make(tmp_path, every=1000)
    trainer.step.model.freeze(["trunk"], until=2)
    before = trainer.step.model.trunk[0].weight.detach().clone()
    trainer.fit()
    assert not torch.equal(trainer.step.model.trunk[0].weight, before)
    assert trainer.readings.without_gradient == set()
    assert trainer.readings.reach["trunk.0.weight"] == {"a", "b"}
    assert [step for step, _ in logger.of("grad_norm/a")] == [1, 3]  # in the third step the trunk is trained


@pytest.mark.parametrize("resumed", [False, True])
def test_a_parameter_that_had_a_gradient_in_an_unmeasured_step_was_reached(tmp_path: Path, resumed: bool) -> None:
    """`extra` takes part in the training from the second step on, and no step after the first is measured."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.extra, self.never = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += self.training
            return self.linear(x) + (self.extra(x) if self.calls == 2 else 0)

    trainer, _ = make(tmp_path, max_epochs=1, every=1000)
    trunk = Trunk()
    tasks = trainer.step.tasks
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    trainer, _ = make(tmp_path, max_epochs=1, every=1000)
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = Trainer(step, trainer.train, trainer.selection.val, **grouped(tmp_path, max_epochs=1, every=1000))
    trainer.fit()
    if resumed:
        other = Trainer(step, trainer.train, trainer.selection.val, **grouped(tmp_path, max_epochs=1, every=1000))
        other.load_state_dict(checkpoint.load(tmp_path / "last.pt"))
        trainer = other
    assert trainer.readings.reach["trunk.extra.weight"] == set()  # as far as was measured
    assert trainer.readings.without_gradient == {"trunk.never.weight", "trunk.never.bias"}


def test_a_run_taken_up_after_its_last_step_knows_its_monitor(tmp_path: Path) -> None:
    whole, _ = make(tmp_path)
    whole.fit()
    again, _ = make(tmp_path)
    again.load_state_dict(checkpoint.load(tmp_path / "last.pt"))
    assert not again.goes_on
    again.fit()
    assert again.global_step == whole.global_step
    mine, its = again.selection, whole.selection
    assert str(mine.monitor) == str(its.monitor) == "mean of a/accuracy, b/accuracy (max)"
    assert (mine.monitor.mode, mine.best, mine.figures) == ("max", its.best, its.figures)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_stopped_around_a_thaw_measures_the_steps_that_it_would_have(tmp_path: Path, at: int) -> None:
    def stop(trainer: Trainer, _: Any) -> None:
        if trainer.global_step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    def built(**options: Any) -> tuple[Trainer, Remembers]:
        trainer, logger = make(tmp_path, every=1000, **options)
        trainer.step.model.freeze(["trunk"], until=2)
        return trainer, logger

    first, before = built(callbacks=[stop])
    with pytest.raises(Stopped):
        first.fit()
    second, after = built()
    second.load_state_dict(checkpoint.load(tmp_path / "last.pt"))
    second.fit()
    assert [step for step, _ in (*before.of("grad_norm/a"), *after.of("grad_norm/a"))] == [1, 3]
    assert second.readings.without_gradient == set()
