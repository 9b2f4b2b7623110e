"""What holds for every architecture."""

import copy
import csv
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, stopping
from every import ARCHITECTURES, NAMES, batches, cnn, mlp, problem
from test_resume import same_runs
from torch import nn

import mtl
from mtl.architectures.mixing import check_channels
from mtl.batch import take
from mtl.errors import UserError
from mtl.gradients.reach import Reach
from mtl.step.passes import Recorders

NORMED = partial(cnn, batch_norm=True)
DROPPED = partial(mlp, dropout=0.3)
every_architecture = pytest.mark.parametrize("name", list(ARCHITECTURES))


def kinds(model: mtl.MultiTaskModel) -> list[str]:
    return ["joint", "sequential"] if model.shared is None else ["joint", "sequential", "shared"]


def after_steps(name: str, trunk: Callable[[], nn.Module], kind: str, **options: Any) -> tuple[dict, torch.Tensor]:
    model, tasks = problem(name, trunk)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = mtl.Step(model, tasks, optimizer, passes=kind, **options)
    torch.manual_seed(5)
    for batch in batches(3, missing=True):
        step(batch)
    return model.state_dict(), torch.get_rng_state()


def test_every_config_has_an_entry() -> None:
    configs = {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")}
    assert configs - {"hard_sharing"} == set(ARCHITECTURES)


@every_architecture
@pytest.mark.parametrize("trunk", [NORMED, DROPPED], ids=["batch norm", "dropout"])
def test_all_kinds_of_passes_leave_the_same_state(name: str, trunk: Callable[[], nn.Module]) -> None:
    expected, draws = after_steps(name, trunk, "joint")
    for kind in kinds(problem(name)[0])[1:]:
        state, kind_draws = after_steps(name, trunk, kind)
        assert torch.equal(draws, kind_draws)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-12, msg=key)


def noisy() -> nn.Module:
    """Returns a trunk of three stages with batch norm and dropout."""
    widths = [64, 7, 8, 6]
    stages = [
        nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(0.3)) for a, b in pairwise(widths)
    ]
    stages[0].insert(0, nn.Flatten())
    trunk = nn.Sequential(*stages)
    trunk.num_features = 6
    return trunk


@every_architecture
def test_batch_norm_and_dropout_run_once_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each kind of passes, but for modules that are defined to run with an input of each task's own."""
    options = {"aitm": {"transfer_dropout": 0.2}, "mtan": {"batch_norm": True}}.get(name, {})
    architecture = ARCHITECTURES[name]
    monkeypatch.setitem(ARCHITECTURES, name, lambda *args, **kw: architecture(*args, **kw, **options))
    (batch,) = batches(1)
    for kind in kinds(problem(name, noisy)[0]):
        model, tasks = problem(name, noisy)
        for head in model.heads.values():
            head.register_forward_pre_hook(lambda head, inputs: (head.noise(inputs[0]),))
            head.noise = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.1)).double()
        of_shared = set() if model.shared is None else set(model.shared.modules())
        calls: Counter[str] = Counter()
        expected: dict[str, int] = {}
        for path, module in model.named_modules(remove_duplicate=True):
            if isinstance(module, nn.Dropout | nn.modules.batchnorm._BatchNorm):
                module.register_forward_hook(lambda *_, path=path, calls=calls: calls.update([path]))
                of_each_task = path.startswith(("after", "before")) if name == "mtan" else False
                if name == "adapters":
                    of_each_task = path.startswith(("trunk.1", "trunk.2"))
                repeated = kind == "sequential" and module in of_shared
                expected[path] = 3 if of_each_task or repeated else 1
        assert len(expected) > 6
        statistics = {path: m.num_batches_tracked for path, m in model.named_modules() if hasattr(m, "running_mean")}
        before = {path: int(number) for path, number in statistics.items()}
        mtl.Step(model, tasks, passes=kind).backward(batch)
        assert calls == expected, kind
        for path, number in statistics.items():
            moved = 3 if expected[path] == 3 and model.get_submodule(path) not in of_shared else 1
            assert int(number) - before[path] == moved, (kind, path)


@every_architecture
@pytest.mark.parametrize("trunk", [cnn, mlp])
def test_shared_parameters_are_those_that_several_tasks_depend_on(name: str, trunk: Callable[[], nn.Module]) -> None:
    """Against a gradient of each prediction, from a forward pass for it alone."""
    model, tasks = problem(name, trunk)
    (batch,) = batches(1)
    named = dict(model.named_parameters())
    depends: dict[str, set[str]] = {each: set() for each in named}
    for task in tasks:
        features = model.features(batch)
        value = model.predict(task.name, features).sum()
        if (penalty := model.penalty(task.name, features)) is not None:
            value = value + penalty.sum()
        for each, gradient in zip(
            named, torch.autograd.grad(value, list(named.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:
                depends[each].add(task.name)
    shared = {each for each, of in depends.items() if len(of) > 1}
    assert all(depends.values())
    for kind in kinds(model):
        step = mtl.Step(model, tasks, passes=kind, balancer=mtl.balancers.MGDA())
        reach = Reach(named, NAMES)
        step.passes(tasks, batch, [1.0] * 3, Recorders(reach=reach))
        of_several = reach.shared()
        assert {each for each, p in named.items() if any(p is other for other in of_several)} == shared, kind


@every_architecture
@pytest.mark.parametrize("balancer", ["Equal", "UW", "MGDA", "UPGrad", "GradDrop", "FAMO"])
def test_balancers_take_steps(name: str, balancer: str) -> None:
    model, tasks = problem(name)
    before = copy.deepcopy(model.state_dict())
    made = getattr(mtl.balancers, balancer)()
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=made)
    if name == "separate" and balancer in ("MGDA", "UPGrad", "GradDrop"):
        with pytest.raises(UserError, match="the tasks share no parameter"):
            step(batches(1)[0])
        return
    for batch in batches(2, missing=True):
        result = step(batch)
    assert all(torch.isfinite(loss) for loss in result.losses.values())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {f"heads.{each}.weight" for each in NAMES} <= changed
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@every_architecture
@pytest.mark.parametrize("balancer", ["Equal", "MGDA"])
def test_micro_batches_are_the_whole_batch(name: str, balancer: str) -> None:
    if name == "separate":
        balancer = "Equal"
    (batch,) = batches(1, missing=True)
    states = []
    for pieces in (batch, [take(batch, 8, slice(0, 3)), take(batch, 8, slice(3, 8))]):
        model, tasks = problem(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        result = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)())(pieces)
        states.append({**model.state_dict(), **result.losses})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key].to(value.dtype), value, rtol=1e-9, atol=1e-11, msg=key)


@every_architecture
def test_a_state_dict_and_a_copy_are_the_whole_model(name: str) -> None:
    model, tasks = problem(name, NORMED)
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))
    step(batches(1)[0])
    other, _ = problem(name, NORMED, seed=7)
    (batch,) = batches(1, seed=3)
    assert not torch.equal(other.eval()(batch)["sale"], model.eval()(batch)["sale"])
    other.load_state_dict(model.state_dict())
    for copied in (other.eval(), copy.deepcopy(model)):
        for each, prediction in model(batch).items():
            assert torch.equal(copied(batch)[each], prediction)


@every_architecture
def test_one_task_has_only_its_branches(name: str) -> None:
    whole, _ = problem(name)
    model, tasks = problem(name, names=("sale",))
    keys = set(model.state_dict())
    assert keys <= set(whole.state_dict())
    assert not any(part in ("click", "cart") for key in keys for part in key.split("."))
    result = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))(batches(1)[0])
    assert torch.isfinite(result.losses["sale"])


@every_architecture
def test_passes_that_auto_chooses(name: str) -> None:
    model, tasks = problem(name)
    assert mtl.Step(model, tasks).passes.kind == ("sequential" if model.shared is None else "shared")


@every_architecture
def test_the_graph_is_drawn_from_the_command_line(name: str, here: Path) -> None:
    """Every parameter is in the table; those that several tasks reach are marked as shared."""
    of_chains = name in ("aitm", "esmm")
    done = command("graph", "task=made_ctr_chain" if of_chains else "task=multi_mnist", f"model={name}")
    assert done.code == 0, done.err
    assert done.run is not None
    with (done.run / "leaves.csv").open(encoding="utf-8") as file:
        leaves = list(csv.DictReader(file))
    assert all(leaf["tasks"] for leaf in leaves)
    assert any(leaf["shared"] == "true" for leaf in leaves) == (name != "separate")
    assert all((leaf["shared"] == "true") == (" " in leaf["tasks"]) for leaf in leaves)


@every_architecture
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name: str, here: Path) -> None:
    images = ["task=multi_mnist", "model/trunk=cnn", "model.trunk.in_channels=1", "model.trunk.widths=[4,5,6]"]
    of_images = [*images, "model.trunk.batch_norm=true", "data.batch_size=800"]
    of_chains = ["task=made_ctr_chain", "data.num_samples=4000", "model.trunk.dropout=0.2", "data.batch_size=500"]
    options = [*(of_chains if name in ("aitm", "esmm") else of_images), f"model={name}", "balancer=famo"]
    options += ["trainer.max_epochs=2", "log.every=2", "threads=1"]
    whole = command("train", *options)
    assert whole.code == 0, whole.err
    stopped = command("train", *stopping(3), *options, "output_root=stopped")
    assert stopped.code == 143, stopped.err
    again = command("train", *options, "resume=auto", "output_root=stopped")
    assert "resume   from step 3" in again.out, again.err
    assert again.code == 0, again.err
    same_runs(max(Path("stopped").glob("*/*/")), whole.run)


@every_architecture
def test_the_representation_is_refused_where_it_would_miss_conflicts(name: str) -> None:
    model, tasks = problem(name)
    of_features = mtl.Gradients(source="representation")
    if name in ("cgc", "dselect_k", "mmoe"):
        mtl.Step(model, tasks, gradients=of_features, balancer=mtl.balancers.MGDA()).backward(batches(1)[0])
        return
    with pytest.raises(UserError, match="'representation' needs"):
        mtl.Step(model, tasks, gradients=of_features, balancer=mtl.balancers.MGDA())


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def sequential(kind: str) -> nn.Module:
    """Returns a trunk of two stages for inputs (N, 1, 8, 8), taken as sequences of eight tokens with eight channels.

    In "patches", a convolution makes four tokens of these, as trunks of words and images do before a transformer.
    """
    if kind == "convolutions":
        stages = [nn.Sequential(nn.Flatten(1, 2), nn.Conv1d(8, 6, 3, padding=1)), nn.Conv1d(6, 6, 3, padding=1)]
    elif kind == "patches":
        layer = nn.TransformerEncoderLayer(6, 2, 7, batch_first=True)
        stages = [nn.Sequential(nn.Flatten(1, 2), nn.Conv1d(8, 6, 2, stride=2), Turned(), layer), nn.Linear(6, 6)]
    else:
        stages = [
            nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 6)),
            nn.TransformerEncoderLayer(6, 2, 7, batch_first=True),
        ]
    return nn.Sequential(*stages, nn.Sequential(nn.Identity() if kind == "convolutions" else Turned(), Positions()))


class Positions(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(2)


@pytest.mark.parametrize("kind", ["tokens", "patches"])
@pytest.mark.parametrize("name", ["adapters", "cross_stitch", "mtan"])
def test_channels_of_sequences(name: str, kind: str) -> None:
    """Those of tokens are the last dimension; one-dimensional convolutions, where they aren't, are refused."""
    with pytest.raises(UserError, match="one-dimensional convolution"):
        problem(name, partial(sequential, "convolutions"))
    model, tasks = problem(name, partial(sequential, kind))
    if name == "mtan":
        assert model.attention["click"][0].g.weight.shape == (6, 6)
    elif name == "adapters":
        assert model.adapters["click"][0].down.shape == (5, 6)
    else:
        assert model.trunk.units[0].weight.shape == (3, 3, 6)
    assert torch.isfinite(mtl.Step(model, tasks).backward(batches(1)[0]).losses["sale"])


@pytest.mark.parametrize(
    ("stages", "shape", "is_refused"),
    [
        ([nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6), nn.ReLU()], (2, 6, 9), True),
        ([nn.Linear(8, 6), Turned(), nn.Conv1d(6, 6, 1)], (2, 6, 6), True),
        ([nn.Conv1d(8, 6, 3), Turned()], (2, 9, 6), False),
        ([nn.Conv1d(8, 6, 3), Turned(), nn.Linear(6, 6)], (2, 6, 6), False),
        ([nn.Conv1d(8, 6, 3), Turned(), nn.Linear(6, 12), nn.Linear(12, 6), Turned()], (2, 6, 9), True),
        ([nn.Conv1d(8, 12, 3), nn.GLU(1)], (2, 6, 9), True),
        ([nn.Conv1d(8, 6, 3), Turned(), nn.LSTM(6, 5, bidirectional=True)], (2, 9, 10), False),
        ([nn.Conv1d(8, 6, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()], (2, 6), False),
        ([nn.Linear(8, 6), Turned()], (2, 6, 9), False),
    ],
)
def test_outputs_of_one_dimensional_convolutions(
    stages: list[nn.Module], shape: tuple[int, ...], is_refused: bool
) -> None:
    refused = pytest.raises(UserError, match=r"has the dimensions \(N, C, L\)")
    with refused if is_refused else nullcontext():
        check_channels(torch.zeros(shape), *stages)


@pytest.mark.parametrize("where", ["bottom", "tower"])
def test_information_of_one_dimensional_convolutions_is_not_transferred(where: str) -> None:
    """The mean over positions would be one over channels, even if their numbers are equal."""

    class Convolutions(nn.Sequential):
        num_features = 8

    first = nn.Sequential(nn.Flatten(1, 2), nn.Conv1d(8, 8, 3, padding=1) if where == "bottom" else nn.Identity())
    tower = nn.BatchNorm1d(8) if where == "bottom" else nn.Conv1d(8, 8, 3, padding=1)
    with pytest.raises(UserError, match="one-dimensional convolution"):
        problem("aitm", lambda: Convolutions(copy.deepcopy(first), copy.deepcopy(tower)))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mtan"])
def test_a_module_in_place_of_a_function_that_makes_trunks_is_refused(name: str) -> None:
    _, tasks = problem(name, mlp)
    with pytest.raises(UserError, match="trunk is a MLP; this architecture needs a function that makes one"):
        ARCHITECTURES[name](mlp(), tasks, inputs=["image"])
