"""MTAN on trunks of several kinds: masks, parameters, passes, and the case that is hard parameter sharing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import command
from torch import Tensor, nn

import mtl
from mtl.architectures import MTAN
from mtl.architectures.mtan import Attention, resized
from mtl.build import build
from mtl.distributed.batch_norm import BatchNorm
from mtl.errors import UserError

COLUMNS = {
    "age": {"kind": "number", "mean": 40.0, "std": 10.0},
    "city": {"kind": "category", "vocabulary": ["Bonn", "Rome"]},
}


class Tokens(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), nn.Linear(4, 6), nn.Linear(6, 6))


# By name: the trunk, its inputs, and the shape of each mask.
TRUNKS: dict[str, tuple[Any, dict[str, Any], list[tuple[int, ...]]]] = {
    "lenet": (mtl.trunks.LeNet, {"x": torch.randn(4, 1, 28, 28)}, [(4, 5, 12, 12), (4, 16, 4, 4), (4, 20)]),
    "cnn": (
        lambda: mtl.trunks.CNN(3, widths=[4, 6], batch_norm=True),
        {"x": torch.randn(4, 3, 9, 8)},
        [(4, 4, 9, 8), (4, 6, 4, 4)],
    ),
    "mlp": (lambda: mtl.trunks.MLP(12, widths=[5, 4, 3]), {"x": torch.randn(4, 3, 4)}, [(4, 5), (4, 4), (4, 3)]),
    "table": (
        lambda: mtl.trunks.Table(COLUMNS, ["age", "city"], num_features=5, hidden=[7]),
        {"age": torch.tensor([31.0, 40, 52, 3]), "city": torch.tensor([1, 0, 2, 1])},
        [(4, 5), (4, 7), (4, 5)],
    ),
    "tokens": (Tokens, {"x": torch.randn(4, 7, 3)}, [(4, 7, 4), (4, 7, 6), (4, 7, 6)]),
    "one stage": (
        lambda: mtl.trunks.Transformer(in_features=3, max_length=7, num_features=8),
        {"x": torch.randn(4, 7, 3)},
        [(4, 8)],
    ),
    "segnet": (
        lambda: mtl.trunks.SegNet(widths=[4, 5, 6], depths=[2, 2, 3]),
        {"x": torch.randn(4, 3, 21, 18)},
        [(4, 4, 21, 18), (4, 5, 10, 9), (4, 6, 5, 4), (4, 5, 5, 4), (4, 4, 10, 9), (4, 4, 21, 18)],
    ),
}


def tasks(count: int = 3) -> list[mtl.Task]:
    return [
        mtl.Task(
            f"task{t}",
            head=nn.Sequential(nn.Flatten(), nn.LazyLinear(2)),
            loss=nn.CrossEntropyLoss(),
            target=f"task{t}",
        )
        for t in range(count)
    ]


def made(name: str, count: int = 3, **options: Any) -> tuple[MTAN, list[mtl.Task], dict[str, Any]]:
    torch.manual_seed(0)
    trunk, inputs, _ = TRUNKS[name]
    made_tasks = tasks(count)
    batch = dict(inputs)
    for t, task in enumerate(made_tasks):
        batch[task.name] = torch.arange(4).add(t).remainder(2)
    model = MTAN(trunk, made_tasks, inputs=list(inputs), **options)
    model.eval()(batch)
    model.double().train()
    return model, made_tasks, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def masks_of(model: MTAN, batch: dict[str, Any]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {task: [] for task in model.heads}
    for task, masks in found.items():
        for each in model.attention[task]:  # type: ignore[union-attr]
            each.register_forward_hook(lambda *values, masks=masks: masks.append(values[2]))
    model(batch)
    return found


@pytest.mark.parametrize("name", TRUNKS)
def test_masks(name: str) -> None:
    model, _, batch = made(name)
    for masks in masks_of(model, batch).values():
        assert [tuple(mask.shape) for mask in masks] == TRUNKS[name][2]
        assert all(mask.min() > 0 and mask.max() < 1 for mask in masks)


@pytest.mark.parametrize("name", TRUNKS)
def test_masks_of_one_are_hard_sharing(name: str) -> None:
    model, its_tasks, batch = made(name)
    for mask in model.attention.modules():
        if isinstance(mask, Attention):
            nn.init.zeros_(mask.h_norm.weight)  # type: ignore[arg-type]
            nn.init.constant_(mask.h_norm.bias, 1e3)  # type: ignore[arg-type]
    trunk = TRUNKS[name][0]().double()
    trunk.load_state_dict(dict(zip(trunk.state_dict(), _in_order(trunk, model), strict=True)))
    hard = mtl.MultiTaskModel(trunk, its_tasks, inputs=list(model.inputs))
    model.eval(), hard.eval()
    for task, prediction in hard(batch).items():
        assert torch.equal(model(batch)[task], prediction)


def _in_order(trunk: nn.Module, model: MTAN) -> list[Tensor]:
    """Returns the values of the model's trunk in the order of a trunk of the same kind."""
    numbered = {name: torch.full_like(value, n) for n, (name, value) in enumerate(trunk.state_dict().items())}
    probe = copy.deepcopy(trunk)
    probe.load_state_dict(numbered)
    order = [int(value.flatten()[0]) for value in MTAN(probe, tasks(1), inputs=["x"]).trunk.state_dict().values()]
    values = list(model.trunk.state_dict().values())
    return [values[order.index(n)] for n in range(len(order))]


def test_forward_by_hand() -> None:
    """Two linear stages and two tasks; the second task's prediction is computed from the formula."""
    trunk = nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), nn.Sequential(nn.Linear(4, 6)))
    two = [mtl.Task(n, head=nn.Linear(6, 1), loss=nn.MSELoss(), target=n) for n in ("a", "b")]
    model = MTAN(trunk, two, inputs=["x"], batch_norm=False)
    x = torch.randn(5, 3)
    model({"x": x})
    first, g1, h1 = model.trunk[0], model.attention["b"][0].g, model.attention["b"][0].h  # type: ignore[index,union-attr]
    g2, h2, f = model.attention["b"][1].g, model.attention["b"][1].h, model.after["0"].f  # type: ignore[index,union-attr]
    u1 = (x @ trunk[0][0].weight.T + trunk[0][0].bias).tanh()  # type: ignore[index]
    p1 = first(x)
    p2 = trunk[1](p1)
    # u1 has 5 channels and p1 has 4, which the layers of the mask take from the first batch.
    mask = ((u1 @ g1.weight.T + g1.bias).relu() @ h1.weight.T + h1.bias).sigmoid()
    r = ((mask * p1) @ f.weight.T + f.bias).relu()
    inner = (torch.cat([p2, r], 1) @ g2.weight.T + g2.bias).relu()
    wanted = ((inner @ h2.weight.T + h2.bias).sigmoid() * p2) @ two[1].head.weight.T + two[1].head.bias
    assert torch.allclose(model({"x": x})["b"], wanted, atol=1e-6)


def test_number_of_parameters() -> None:
    model, _, _ = made("mlp", count=2)
    attention = model.attention["task0"]
    inputs, widths = [5, 4 + 4, 3 + 3], [5, 4, 3]  # u is p, and later stages also get the task's features
    wanted = sum(i * w + w + 2 * w + w * w + w + 2 * w for i, w in zip(inputs, widths, strict=True))
    assert sum(p.numel() for p in attention.parameters()) == wanted
    assert sum(p.numel() for p in model.after.parameters()) == (5 * 4 + 4 + 8) + (4 * 3 + 3 + 6)
    assert len(model.before) == 0


def test_layers_of_resnet() -> None:
    """u and p are the outputs of the last but one and of the last block, as in LibMTL, if the first stage is left."""
    torch.manual_seed(0)
    trunk = mtl.trunks.Torchvision("resnet18", pooled=False).eval()
    net = trunk._whole[0]
    model = MTAN(trunk, tasks(1), inputs=["x"], skip=1).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for layer, (u, p) in zip(
            (net.layer1, net.layer2, net.layer3, net.layer4), model.features({"x": x}), strict=True
        ):
            assert u is not None
            assert torch.equal(u, layer[0](y))
            y = layer(y)
            assert torch.equal(p, y)


def test_shared_parameters() -> None:
    model, its_tasks, batch = made("lenet")
    reached = {task.name: set() for task in its_tasks}
    for task in its_tasks:
        model.zero_grad()
        task.loss(model.predict(task.name, model.features(batch)), batch[task.target]).backward()
        reached[task.name] = {n for n, p in model.named_parameters() if p.grad is not None}
    everywhere = set.intersection(*reached.values())
    assert everywhere == {n for n, _ in model.named_parameters() if n.startswith(("trunk.", "after."))}
    step = mtl.Step(model, its_tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=mtl.balancers.MGDA())
    step(batch)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set.union(*reached.values())


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("balancer", ["Equal", "MGDA", "GradDrop", "UW"])
def test_passes_are_equal(name: str, balancer: str) -> None:
    states = []
    for passes in ("joint", "sequential", "shared"):
        model, its_tasks, batch = made(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = mtl.Step(model, its_tasks, optimizer, balancer=getattr(mtl.balancers, balancer)(), passes=passes)
        for _ in range(2):
            step(batch)
        states.append(model.state_dict())
    for other in states[1:]:
        for key, value in states[0].items():
            assert torch.allclose(value, other[key], rtol=1e-8, atol=1e-9), key


def test_auto_passes_run_the_trunk_once() -> None:
    model, its_tasks, batch = made("cnn")
    calls = []
    model.trunk.register_forward_hook(lambda *_: calls.append("forward"))
    model.trunk[0].rest[0].weight.register_hook(lambda _: calls.append("backward"))  # type: ignore[index,union-attr]
    mtl.Step(model, its_tasks, torch.optim.SGD(model.parameters(), lr=0.1))(batch)
    assert calls == ["forward", "backward"]


def test_micro_batches_equal_the_batch_without_batch_norm() -> None:
    states = []
    for parts in (1, 2):
        model, its_tasks, batch = made("mlp", batch_norm=False)
        step = mtl.Step(model, its_tasks, torch.optim.SGD(model.parameters(), lr=0.1))
        cut = [{k: v[i::parts] for k, v in batch.items()} for i in range(parts)]
        step(cut)
        states.append(model.state_dict())
    assert all(torch.allclose(value, states[1][key], atol=1e-12) for key, value in states[0].items())


def test_saved_sizes() -> None:
    """A model that hasn't run yet takes the values, and so the sizes, of a state dict."""
    model, _, batch = made("segnet")
    fresh = MTAN(TRUNKS["segnet"][0], [mtl.Task(**_plain(t)) for t in tasks()], inputs=["x"]).double()
    fresh.load_state_dict(model.state_dict())
    model.eval(), fresh.eval()
    assert all(torch.equal(fresh(batch)[task], value) for task, value in model(batch).items())


def _plain(task: mtl.Task) -> dict[str, Any]:
    return {"name": task.name, "head": task.head, "loss": task.loss, "target": task.target}


def test_resized() -> None:
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(resized(maps, torch.empty(1, 9, 2, 2)), torch.tensor([[[[5.0, 7], [13, 15]]]]))
    assert torch.allclose(resized(maps, torch.empty(1, 9, 2, 7))[0, 0, 1], torch.arange(12, 15.5, 0.5))
    assert torch.equal(resized(maps, torch.empty(1, 9)), torch.tensor([[7.5]]))
    assert resized(torch.ones(2, 3), torch.empty(2, 5, 4, 6)).shape == (2, 3, 4, 6)
    assert resized(torch.ones(2, 8, 3), torch.empty(2, 5, 4)).shape == (2, 5, 3)


def test_refused() -> None:
    with pytest.raises(UserError, match=r"model\.skip is 3; the trunk has 3 stages|at least 4 stages"):
        MTAN(mtl.trunks.LeNet(), tasks(), inputs=["x"], skip=3)
    residual = mtl.Task("residual", objective=lambda model, batch: model.trunk(batch["x"]).sum())
    with pytest.raises(UserError, match="'residual' has an objective without a head"):
        MTAN(mtl.trunks.LeNet(), [residual], inputs=["x"])
    with pytest.raises(UserError, match="widths has 2 numbers and depths 5"):
        mtl.trunks.SegNet(widths=[4, 4])


def test_lazy_batch_norm_is_synchronised_after_its_sizes_are_known(here: Path) -> None:
    ended = command(
        *("train", "task=multi_mnist", "model=mtan", "model.sync_batchnorm=true", "trainer.max_epochs=1"),
        *("data.batch_size=2000", "logger=[]"),
    )
    assert ended.code == 0, ended.err
    model = build(yaml.safe_load((ended.run / "config.yaml").read_text()), code_folders=[]).model
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(type(module) is BatchNorm for module in norms)
