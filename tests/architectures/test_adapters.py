"""One trunk with FiLM layers or adapters for each task, against forward passes written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtl
from mtl.architectures import Adapters
from mtl.errors import UserError
from mtl.trunks import CNN, MLP

WIDTHS = [4, 5, 6]
KINDS = ["film", "adapter"]


def tasks_of(count: int = 2) -> list[mtl.Task]:
    return [mtl.Task(f"t{n}", head=nn.Linear(6, 3), loss=nn.CrossEntropyLoss(), target=f"y{n}") for n in range(count)]


def cnn() -> nn.Module:
    return CNN(1, widths=WIDTHS, batch_norm=True)


def mlp() -> nn.Module:
    return MLP(64, widths=WIDTHS, dropout=0.3)


def batch_of() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = {f"y{n}": torch.randint(3, (6,), generator=generator) for n in range(2)}
    return {"x": torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64), **labels}


def model_of(kind: str, trunk=cnn, *, scattered: bool = False, width: int = 7) -> tuple[Adapters, list[mtl.Task]]:  # type: ignore[no-untyped-def]
    """Returns a model; with `scattered`, the parameters of the adapters have random values."""
    torch.manual_seed(0)
    tasks = tasks_of()
    model = Adapters(trunk, tasks, inputs=["x"], kind=kind, width=width).double()
    model.eval()(batch_of())
    if scattered:
        for parameter in model.adapters.parameters():
            nn.init.normal_(parameter)
    return model.train(), tasks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", [cnn, mlp])
@pytest.mark.parametrize("training", [False, True])
def test_starts_as_hard_sharing(kind: str, trunk, training: bool) -> None:  # type: ignore[no-untyped-def]
    """Predictions and gradients are equal bit for bit, task by task from the same random state."""
    model, tasks = model_of(kind, trunk)
    hard = mtl.MultiTaskModel(copy.deepcopy(model.trunk), copy.deepcopy(tasks), inputs=["x"]).double()
    for task in tasks:
        predictions = []
        for each in (model.train(training), hard.train(training)):
            torch.manual_seed(3)
            predictions.append(each.predict(task.name, each.features(batch_of())))
            F.cross_entropy(predictions[-1], batch_of()[task.target]).backward()
        assert torch.equal(*predictions)
    for name, parameter in hard.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_on_maps_is_written_by_hand(kind: str) -> None:
    model, tasks = model_of(kind, scattered=True)
    layers = list(copy.deepcopy(model.trunk).eval())
    for task in tasks:
        x = batch_of()["x"]
        for stage, adapter in enumerate(model.adapters[task.name]):
            for layer in layers[4 * stage : 4 * stage + 4]:
                x = layer(x)
            if stage == 2:
                x = x.mean((2, 3), keepdim=True)  # the last stage ends with it
            if kind == "film":
                x = x * adapter.scale[None, :, None, None] + adapter.shift[None, :, None, None]
            else:  # as two convolutions of size 1
                hidden = F.conv2d(x, adapter.down[:, :, None, None], adapter.down_bias)
                x = x + F.conv2d(hidden.relu(), adapter.up[:, :, None, None], adapter.up_bias)
        expected = task.head(x.flatten(1))
        torch.testing.assert_close(model.eval()(batch_of())[task.name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_number_of_parameters(kind: str) -> None:
    model, _ = model_of(kind, width=7)
    of_trunk = sum(p.numel() for p in cnn().parameters())
    each = 2 * sum(WIDTHS) if kind == "film" else sum(2 * 7 * c + 7 + c for c in WIDTHS)
    assert sum(p.numel() for p in model.parameters()) == of_trunk + 2 * (6 * 3 + 3) + 2 * each


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_trunk_keeps_its_state(kind: str) -> None:
    model, tasks = model_of(kind)
    model.freeze(["trunk"])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step = mtl.Step(model, tasks, optimizer)
    for _ in range(2):
        result = step(batch_of(), measure=True)
    assert not any(len(of) > 1 for of in result.reach.values())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("trunk."), name
    with pytest.raises(UserError, match="the tasks share no parameter, so there is nothing to balance"):
        mtl.Step(model, tasks, balancer=mtl.balancers.MGDA()).backward(batch_of())


@pytest.mark.parametrize("kind", KINDS)
def test_the_trunk_is_shared_and_the_adapters_are_not(kind: str) -> None:
    model, tasks = model_of(kind, scattered=True)
    (result, by_rows) = (
        mtl.Step(model, tasks, passes=passes, balancer=mtl.balancers.Equal()).backward(batch_of(), measure=True)
        for passes in ("shared", "joint")
    )
    for name, of in result.reach.items():
        assert len(of) == (2 if name.startswith("trunk.") else 1), name
    assert result.reach == by_rows.reach


def test_trunk_keeps_the_names_and_the_first_stage_is_called_once() -> None:
    model, tasks = model_of("film")
    names = {name for name in model.state_dict() if name.startswith("trunk.")}
    assert names == {f"trunk.{name}" for name in cnn().state_dict()}
    calls = {0: 0, 4: 0}
    for layer in calls:
        model.trunk[layer].register_forward_hook(lambda *_, layer=layer: calls.update({layer: calls[layer] + 1}))  # type: ignore[misc]
    mtl.Step(model, tasks).backward(batch_of())
    assert calls == {0: 1, 4: 2}


def test_synchronised_batch_norm_reaches_the_stages() -> None:
    from mtl.distributed import sync_batchnorm
    from mtl.distributed.batch_norm import BatchNorm

    model, _ = model_of("film")
    sync_batchnorm(model)
    norms = [
        module
        for stage in model._stages
        for module in stage.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert len(norms) == 3
    assert all(isinstance(norm, BatchNorm) for norm in norms)


def test_errors() -> None:
    with pytest.raises(UserError, match="'lora' is not one of film, adapter"):
        Adapters(cnn, tasks_of(), inputs=["x"], kind="lora")
    with pytest.raises(UserError, match="width is 0"):
        Adapters(cnn, tasks_of(), inputs=["x"], width=0)
