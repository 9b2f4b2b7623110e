"""Schedule-free optimizers, which train other parameters than they evaluate, against a loop by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, stopping
from test_trainer import Remembers, grouped
from torch import nn

import mtl
from mtl.data import Fields, Loader
from mtl.loggers import Loggers
from mtl.runs import loading as runs
from mtl.training import checkpoint
from mtl.training.hooks import Hooks
from mtl.training.trainer import Trainer

CODE = '''
import torch


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Algorithm 1 of arXiv 2405.15682, as the authors' package writes it: the parameters are y, and x in evaluation."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum, "k": 0, "weight_sum": 0.0, "train_mode": False})

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(end=self.state[p]["z"], weight=1 - 1 / group["momentum"])
                group["train_mode"] = False

    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            if not group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(end=self.state[p]["z"], weight=1 - group["momentum"])
                group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure=None):
        if not self.param_groups[0]["train_mode"]:
            raise Exception("Optimizer was not in train mode when step is called.")
        for group in self.param_groups:
            group["weight_sum"] += group["lr"] ** 2
            c = group["lr"] ** 2 / group["weight_sum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "z" not in self.state[p]:
                    self.state[p]["z"] = torch.clone(p)
                z = self.state[p]["z"]
                p.lerp_(end=z, weight=c)
                p.add_(p.grad, alpha=group["lr"] * (group["momentum"] * (1 - c) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1
'''
names: dict[str, Any] = {}
exec(CODE, names)
ScheduleFreeSGD = names["ScheduleFreeSGD"]

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(50, 6, generator=GENERATOR)
Y = (X[:, 0] + 0.3 * torch.randn(50, generator=GENERATOR) > 0).long()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def trainer_of(folder: Path, **options: Any) -> tuple[Trainer, Remembers]:
    net = network()
    task = mtl.Task("a", head=net[2], loss=nn.CrossEntropyLoss(), target="y", missing=False)
    model = mtl.MultiTaskModel(net[:2], [task], inputs=["x"])
    step = mtl.Step(model, [task], ScheduleFreeSGD(model.parameters(), lr=0.5), **options.pop("step", {}))
    logger = Remembers()
    defaults = {"max_epochs": 3, "loggers": Loggers([logger]), "monitor": {"a/loss": "min"}}
    train = Loader(Fields({"x": X[:30], "y": Y[:30]}), batch_size=8, shuffle=True)
    val = Loader(Fields({"x": X[30:], "y": Y[30:]}), batch_size=20)
    return Trainer(step, train, val, **grouped(folder, **{**defaults, **options})), logger


def by_hand(epochs: int) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Returns, after each epoch, the evaluated parameters and their validation loss."""
    net = network()
    optimizer = ScheduleFreeSGD(net.parameters(), lr=0.5)
    loss = nn.CrossEntropyLoss()
    parameters, losses = [], []
    for epoch in range(1, epochs + 1):
        for batch in Loader(Fields({"x": X[:30], "y": Y[:30]}), batch_size=8, shuffle=True).batches(epoch):
            optimizer.train()
            optimizer.zero_grad()
            loss(net(batch["x"]), batch["y"]).backward()
            optimizer.step()
        optimizer.eval()
        with torch.no_grad():
            losses.append(loss(net(X[30:]), Y[30:]).item())
        parameters.append(copy.deepcopy(net.state_dict()))
    return parameters, losses


def values(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(state.values())


def same(mine: dict[str, torch.Tensor], its: dict[str, torch.Tensor]) -> bool:
    assert len(mine) == len(its) == 4
    return all(torch.equal(a, b) for a, b in zip(values(mine), values(its), strict=True))


def test_a_run_is_the_loop_by_hand_to_the_last_bit(tmp_path: Path) -> None:
    trainer, logger = trainer_of(tmp_path, max_epochs=4)
    trainer.fit()
    parameters, losses = by_hand(4)
    assert [value for _, value in logger.of("loss/a/val")] == losses
    assert same(trainer.step.model.state_dict(), parameters[-1])
    best = min(range(4), key=lambda i: losses[i])
    assert trainer.selection.best_epoch == best + 1
    assert same(checkpoint.load(tmp_path / "best.pt")["model"], parameters[best])
    assert same(checkpoint.load(tmp_path / "last.pt")["model"], parameters[-1])
    z = trainer.step.optimizer.state[next(trainer.step.model.parameters())]["z"]
    assert not torch.equal(z, values(parameters[-1])[0])  # else the test would say nothing


@pytest.mark.parametrize("at", [1, 3, 4, 6, 8])
def test_a_run_that_goes_on_has_the_same_bits(tmp_path: Path, at: int) -> None:
    def stop(trainer: Trainer, _: Any) -> None:
        if trainer.global_step == at:
            raise KeyboardInterrupt

    stopped, _ = trainer_of(tmp_path, every_steps=1, callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    stopped._save("last")
    stopped.writer.wait()
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["global_step"] == at
    after, _ = trainer_of(tmp_path / "on")
    after.load_state_dict(state)
    after.fit()
    parameters, _ = by_hand(3)
    assert same(after.step.model.state_dict(), parameters[-1])


def test_saving_in_an_epoch_changes_no_bit_and_holds_what_is_to_be_evaluated(tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path, every_steps=1, max_epochs=1)
    seen = []

    def look(trainer: Trainer, _: Any) -> None:
        state = trainer.state_dict()
        optimizer, net = trainer.step.optimizer, trainer.step.model
        x = [p + (optimizer.state[p]["z"] - p) * (1 - 1 / 0.9) for p in net.parameters()]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(state["evaluated"].values(), x, strict=True))
        seen.append(not same(state["evaluated"], state["model"]))

    trainer.hooks = Hooks(callbacks=[look])
    trainer.fit()
    assert seen == [False, True, True, True]  # all iterates are one after the first step
    assert same(trainer.step.model.state_dict(), by_hand(1)[0][0])
    assert "evaluated" not in trainer.state_dict()


def test_what_takes_over_starts_from_what_is_evaluated(tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path, max_epochs=1)
    model = trainer.step.model
    then = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer.step = mtl.Step(model, trainer.step.tasks, trainer.step.optimizer, update=mtl.Update(then=(4, then)))
    trainer.fit()
    assert same(model.state_dict(), by_hand(1)[0][0])


def test_from_a_config(here: Path) -> None:
    (here / "code").mkdir()
    (here / "code/free.py").write_text(CODE)
    run = ["task=mnist_two_head", "trainer.max_epochs=2", "data.batch_size=500", "log.every=1", "scheduler=none"]
    run += ["optimizer._target_=free.ScheduleFreeSGD", "optimizer.lr=0.5", "logger=[csv]"]
    whole = command("train", "--config-dir", "code", *run)
    assert whole.code == 0, whole.err
    rows = [row.split(",") for row in (whole.run / "metrics.csv").read_text().splitlines()]
    best = whole.metrics["best"]["epoch"]
    [validated] = [row[3] for row in rows if row[1:3] == [str(best), "loss/digit/val"]]
    shown = command("evaluate", f"run={whole.run}", "split=val")
    assert shown.code == 0, shown.err
    assert f"{float(validated):.4g}" in shown.out
    stopped = command("train", *stopping(11), *run)
    assert stopped.code != 0
    assert "weight_decay" not in (stopped.run / "config.yaml").read_text()
    state = checkpoint.load(stopped.run / "checkpoints/last.pt")
    loaded = mtl.load(stopped.run, checkpoint="last").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state["evaluated"].items())
    assert not all(torch.equal(loaded[name], value) for name, value in state["model"].items())
    again = command("train", *stopping(11), *run, f"resume={stopped.run}")
    assert again.code == 0, again.err
    for name in ("best", "last"):
        mine, its = runs.read(whole.run, name)["model"], runs.read(stopped.run, name)["model"]
        assert all(torch.equal(mine[key], its[key]) for key in its)
