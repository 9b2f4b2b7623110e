"""Losses and gradients that aren't finite: skipped tasks and steps have no effect, and are reported."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batches, problem
from test_balancing import NAMES, made
from test_resume import assert_same
from test_trainer import make

import mtl
from mtl.choices import PASSES
from mtl.training import checkpoint
from mtl.training.hooks import Hooks


class Infinite(torch.autograd.Function):
    """A function with a finite value and an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * math.inf


class Faulty:
    """A task's loss that is invalid while `now` is set."""

    def __init__(self, loss: Any, what: str) -> None:
        self.loss, self.what, self.now = loss, what, False

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = self.loss(prediction, target)
        if not self.now:
            return loss
        return Infinite.apply(loss) if self.what == "gradient" else loss * math.nan


def built(kind: str, mode: str, *, balancer: str = "equal", what: str = "loss", **options: Any):
    made_one = made(balancer)
    model, tasks = problem(3)
    faulty = Faulty(tasks[1].loss, what)
    tasks[1].loss = faulty
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return mtl.Step(model, tasks, optimizer, balancer=made_one, passes=kind, on_nonfinite=mode, **options), faulty


def everything(step: mtl.Step) -> dict[str, Any]:
    return copy.deepcopy({"model": step.model.state_dict(), "step": step.state_dict(), "draws": torch.get_rng_state()})


@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 3}])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("name", [name for name in NAMES if name != "torchjd"])
def test_a_skipped_step_leaves_everything_as_it_was(name: str, kind: str, what: str, how: dict[str, int]) -> None:
    """Batch norm and other buffers, the optimizer, the balancer, the random state."""
    step, faulty = built(kind, "skip_step", balancer=name, what=what, **how)
    given = batches(3)
    step(given[0])
    before = everything(step)
    faulty.now = True
    result = step(given[1], measure=True)
    assert (result.taken, result.losses, list(result.nonfinite)) == (False, {}, ["t1"])
    assert_same(everything(step), before)
    faulty.now = False
    result = step(given[2])
    assert result.taken
    assert not result.nonfinite


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("name", [name for name in NAMES if name != "torchjd"])
def test_a_skipped_task_is_as_one_without_labels(name: str, kind: str, what: str) -> None:
    step, faulty = built(kind, "skip_task", balancer=name, what=what)
    other, _ = built(kind, "error", balancer=name)
    given = batches(4)
    for mine in (step, other):
        torch.manual_seed(0)
        mine(given[0])
        if mine is step:
            faulty.now = True
            result = mine(given[1])
            assert result.taken
            assert list(result.nonfinite) == ["t1"]
            assert list(result.losses) == ["t0", "t2"]
            faulty.now = False
        else:
            mine({"t0": given[1], "t2": given[1]})
        mine(given[2])
    states = [everything(mine) for mine in (step, other)]
    assert_same(states[0], states[1])


def test_all_tasks_spoilt_skip_the_step() -> None:
    step, _ = built("shared", "skip_task")
    batch = batches(1)[0]
    before = everything(step)
    result = step({**batch, "x": batch["x"] * math.nan})
    assert list(result.nonfinite) == ["t0", "t1", "t2"]
    assert not result.taken
    assert_same(everything(step), before)


def test_gradients_that_overflow_in_half_precision_are_left_to_the_scaler() -> None:
    step, faulty = built("shared", "skip_step", what="gradient", precision="fp16")
    step.model.float()
    given = batches(2, dtype=torch.float32)
    faulty.now = True
    result = step(given[0])
    assert (result.taken, result.nonfinite) == (False, {})


def test_an_unknown_word() -> None:
    with pytest.raises(mtl.UserError, match="on_nonfinite: 'ignore' is not one of error, skip_task, skip_step"):
        built("shared", "ignore")


def spoilt(trainer: Any, *, steps: set[int]) -> None:
    """Makes the loss of task b NaN in these steps, counted with the skipped ones."""
    loss = trainer.step.tasks[1].loss

    def turns_nan(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        bad = prediction.requires_grad and trainer.tried + 1 in steps
        return loss(prediction, target) * (math.nan if bad else 1.0)

    trainer.step.tasks[1].loss = turns_nan


@pytest.mark.parametrize("mode", ["skip_task", "skip_step"])
def test_what_was_skipped_is_told_and_written_down(tmp_path: Path, mode: str) -> None:
    told: list[str] = []
    trainer, logger = make(tmp_path, report=told.append, nonfinite=tmp_path / "nonfinite.jsonl")
    trainer.step.on_nonfinite = mode
    spoilt(trainer, steps={2, 7})
    seen: list[list[float]] = []
    trainer.hooks = Hooks(callbacks=[lambda t, r: seen.append(sorted(r.losses))])
    trainer.fit()
    done = "left out of the step" if mode == "skip_task" else "the step was skipped"
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["tasks"], line["done"]) for line in lines] == [
        (1, {"b": "its loss is nan"}, done),
        (2, {"b": "its loss is nan"}, done),
    ]
    # The samples are those of the second batch of the first epoch, and of the third of the second.
    for line, (epoch, position) in zip(lines, [(1, 1), (2, 2)], strict=True):
        batch = list(trainer.train.batches(epoch))[position]
        x = trainer.train.dataset.fields["x"][line["samples"]]
        assert torch.equal(x, batch["x"])
    assert len(told) == 2
    assert all(line.startswith("warning  task 'b': its loss is nan at step") and line.endswith(done) for line in told)
    assert trainer.global_step == (12 if mode == "skip_task" else 10)
    assert trainer.tried == 12
    assert seen.count(["a"] if mode == "skip_task" else []) == 2
    assert all(math.isfinite(value) for _, _, scalars in logger.lines for value in scalars.values())
    assert all(value.isfinite().all() for value in trainer.step.model.state_dict().values())


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, max_epochs=10, report=lambda line: None)
    trainer.step.on_nonfinite = "skip_step"
    spoilt(trainer, steps=set(range(6, 100)))
    with pytest.raises(mtl.UserError, match="10 steps in a row: task 'b': its loss is nan at step 6"):
        trainer.fit()
    assert checkpoint.load(tmp_path / "last.pt")["global_step"] == 5  # what was done is saved


def test_in_a_run_that_ends_the_batch_is_named_too(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, nonfinite=tmp_path / "nonfinite.jsonl")
    spoilt(trainer, steps={6})
    with pytest.raises(mtl.UserError, match=r"task 'b': its loss is nan at step 6 \(epoch 2, samples \d+, \d+"):
        trainer.fit()
    (line,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert (line["step"], line["epoch"], line["tasks"]) == (6, 2, {"b": "its loss is nan"})
    assert line["samples"] == trainer.train.samples(2, 1)
    assert len(line["samples"]) == 8


def test_parameters_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """A finite loss with an infinite gradient: it shows in the next loss, and a save may come first."""
    trainer, _ = make(tmp_path, every_steps=1)
    trainer.step.model.trunk.register_forward_hook(
        lambda module, inputs, output: Infinite.apply(output) if trainer.tried == 5 and output.requires_grad else output
    )
    with pytest.raises(
        mtl.UserError, match=r"parameters aren't finite after step 6, and are not saved: trunk.0.weight"
    ):
        trainer.fit()
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["global_step"] == 5
    assert all(value.isfinite().all() for value in state["model"].values())
