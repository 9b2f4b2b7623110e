"""Lazy modules get their shapes from the first training batch, before the optimizer is created."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, stopping
from torch import nn

import mtl
from mtl.data import Fields, Loader, Mix
from mtl.step.lazy import lazy, materialise
from mtl.training import checkpoint

CODE = """
import torch
from torch import nn


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_features = 6
        self.layers = nn.Sequential(
            nn.LazyConv2d(3, 5), nn.LazyBatchNorm2d(), nn.Dropout(0.3), nn.Sequential(nn.Flatten(), nn.LazyLinear(6))
        )

    def forward(self, x):
        return torch.tanh(self.layers(x))
"""
HEAD = "{_target_: torch.nn.Sequential, _args_: [{_target_: torch.nn.LazyLinear, out_features: 10}]}"
names: dict[str, Any] = {}
exec(CODE, names)


def run(*more: str) -> list[str]:
    Path("code").mkdir(exist_ok=True)
    Path("code/lazies.py").write_text(CODE)
    Path("code/task").mkdir(exist_ok=True)
    Path("code/task/lazy.yaml").write_text(
        "# @package _global_\n"
        "defaults: [/objective@tasks.parity: classification, _self_, override /data: mnist,\n"
        "  override /model: hard_sharing, override /model/trunk: custom]\n"
        "model: {inputs: [image], trunk: {_target_: lazies.Trunk}}\n"
        "tasks:\n"
        "  parity: {target: parity, num_outputs: 2}\n"
        f"  digit: {{target: digit, head: {HEAD}, loss: {{_target_: torch.nn.CrossEntropyLoss}}}}\n"
        "data: {batch_size: 500}\n"
        "trainer: {max_epochs: 2, monitor: {digit/loss: min}}\n"
    )
    return ["--config-dir", "code", "task=lazy", "logger=[csv]", *more]


def same(mine: dict[str, torch.Tensor], its: dict[str, torch.Tensor]) -> bool:
    assert mine.keys() == its.keys()
    return all(torch.equal(mine[name], its[name]) for name in its)


def test_a_run_its_continuation_and_what_is_made_of_it(here: Path) -> None:
    whole = command("train", *run())
    assert whole.code == 0, whole.err
    stopped = command("train", *stopping(11), *run()[2:])
    assert stopped.code != 0
    again = command("train", *stopping(11), *run()[2:], f"resume={stopped.run}")
    assert again.code == 0, again.err
    mine, its = (checkpoint.load(r.run / "checkpoints/last.pt") for r in (whole, stopped))
    assert same(mine["model"], its["model"])
    assert same(checkpoint.load(whole.run / "checkpoints/best.pt")["model"], mtl.load(whole.run).state_dict())
    shown = command("evaluate", f"run={whole.run}", "split=test")
    assert shown.code == 0, shown.err
    assert f"{whole.metrics['test']['digit']['loss']:.4g}" in shown.out
    batch = {"image": mtl.data.mnist().test.fields["image"][:7]}
    loaded = mtl.load(whole.run)(batch)
    assert same(loaded, mtl.load(stopped.run)(batch))
    assert loaded["digit"].shape == (7, 10)
    more = command("train", *run(f"init_from={whole.run}", "trainer.max_epochs=1"))
    assert more.code == 0, more.err
    assert "new: nothing" in more.out


def test_frozen_graph_separate_and_micro_batches(here: Path) -> None:
    graph = command("graph", *run("model.freeze=[heads.digit]"))
    assert graph.code == 0, graph.err
    leaves = (graph.run / "leaves.csv").read_text()
    assert "trunk.layers.0.weight,parameter,3×1×5×5,true" in leaves
    assert "heads.digit.0.weight,parameter,10×6,false" in leaves
    more = ["trainer.max_epochs=1", "trainer.micro_batch_size=100", "model=separate", "model.freeze=[heads.digit]"]
    ended = command("train", *run(*more))
    assert ended.code == 0, ended.err
    assert not lazy(mtl.load(ended.run))


def model_of(trunk: nn.Module, **heads: nn.Module) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    tasks = [mtl.Task(n, head=h, loss=nn.CrossEntropyLoss(), target=n) for n, h in heads.items()]
    return mtl.MultiTaskModel(trunk, tasks, inputs=["x"]), tasks


def data(width: int = 12, name: str = "a") -> Loader:
    generator = torch.Generator().manual_seed(0)
    fields = {"x": torch.randn(20, 1, width, width, generator=generator), name: torch.zeros(20, dtype=torch.long)}
    return Loader(Fields(fields), batch_size=8, shuffle=True, micro_batch_size=3)


def test_buffers_stay_and_only_first_values_are_drawn() -> None:
    torch.manual_seed(0)
    model, tasks = model_of(names["Trunk"](), a=nn.LazyLinear(4))
    materialise(model, tasks, data())
    assert not lazy(model)
    norm = model.trunk.layers[1]
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert torch.equal(norm.running_var, torch.ones(3))
    assert norm.num_batches_tracked == 0
    assert model.training
    drawn = torch.get_rng_state()
    torch.manual_seed(0)  # by hand, in the order in which they are reached
    conv, linear, head = nn.Conv2d(1, 3, 5), nn.Linear(3 * 8 * 8, 6), nn.Linear(6, 4)
    expected = [*conv.parameters(), *norm.parameters(), *linear.parameters(), *head.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_model_without_lazy_modules_is_left_alone() -> None:
    model, tasks = model_of(nn.Flatten(), a=nn.Linear(144, 2))
    before = torch.get_rng_state()
    materialise(model, tasks, None)  # no batch is asked for
    assert torch.equal(before, torch.get_rng_state())


def test_several_sources_and_objectives() -> None:
    model, tasks = model_of(nn.Flatten(), a=nn.LazyLinear(4), b=nn.LazyLinear(4))
    scale = nn.LazyLinear(1)

    def objective(model: mtl.MultiTaskModel, batch: Any) -> torch.Tensor:
        return scale(batch["x"].flatten(1)).mean()

    tasks = [*tasks, mtl.Task("c", objective=objective)]
    model = mtl.MultiTaskModel(model.trunk, tasks, inputs=["x"])
    model.scale = scale
    loaders = {"one": data(name="a"), "two": data(name="b")}
    mix = Mix(loaders, {"a": "one", "b": "two", "c": "two"}, sampling="round_robin")
    materialise(model, tasks, mix)
    assert not lazy(model)
    assert scale.weight.shape == (1, 144)


class OnlyInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.LazyLinear(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.aside(x.flatten(1)) if self.training else x.flatten(1)[:, :2]


def test_what_stays_lazy_is_named() -> None:
    model, tasks = model_of(OnlyInTraining(), a=nn.Linear(2, 2))
    with pytest.raises(mtl.UserError, match=r"trunk\.aside\.weight, trunk\.aside\.bias have no shape after a batch"):
        materialise(model, tasks, data())


def test_a_step_of_ones_own_loop_says_what_to_do() -> None:
    model, tasks = model_of(names["Trunk"](), a=nn.LazyLinear(4))
    with pytest.raises(mtl.UserError, match=r"lazy modules.*trunk\.layers\.0\.weight.*model\.eval\(\)\(batch\)"):
        mtl.Step(model, tasks)
    batch = next(iter(data().batches()))[0]
    model.eval()(batch)
    step = mtl.Step(model.train(), tasks, torch.optim.SGD(model.parameters(), lr=0.1))
    assert step(batch).taken
