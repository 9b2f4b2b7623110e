"""Stages, called one after the other, compute what the trunk computes."""

import pytest
import torch
from torch import Tensor, nn

import mtl
from mtl.trunks.stages import run_stages, stages_of

COLUMNS = {
    "age": {"kind": "number", "mean": 40.0, "std": 10.0},
    "city": {"kind": "category", "vocabulary": ["Bonn", "Rome"]},
}


def table() -> tuple[nn.Module, list[object]]:
    trunk = mtl.trunks.Table(COLUMNS, ["age", "city"], num_features=5, hidden=[7, 6], dropout=0.3)
    return trunk, [[31.0, None, 52.0], ["Rome", "Bonn", "Oslo"]]


CASES = {
    "cnn": (lambda: (mtl.trunks.CNN(3, widths=[4, 6], batch_norm=True), [torch.randn(3, 3, 9, 8)]), 2),
    "cnn maps": (lambda: (mtl.trunks.CNN(3, widths=[4, 6, 8], pooled=False), [torch.randn(3, 3, 9, 8)]), 3),
    "lenet": (lambda: (mtl.trunks.LeNet(), [torch.randn(3, 1, 28, 28)]), 3),
    "mlp": (lambda: (mtl.trunks.MLP(12, widths=[5, 4, 3], dropout=0.5), [torch.randn(3, 3, 4)]), 3),
    "table": (table, 4),
    "sequential": (lambda: (nn.Sequential(nn.Linear(4, 3), nn.Tanh()), [torch.randn(3, 4)]), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_stages_compute_what_the_trunk_computes(case: str) -> None:
    make, count = CASES[case]
    trunk, inputs = make()
    stages = stages_of(trunk)
    assert len(stages) == count
    for training in (False, True):
        trunk.train(training)
        nn.ModuleList(stages).train(training)
        torch.manual_seed(1)
        wanted = trunk(*inputs)
        torch.manual_seed(1)
        assert torch.equal(run_stages(stages, *inputs), wanted)
    in_trunk = {id(parameter) for parameter in trunk.parameters()}
    in_stages = [id(parameter) for stage in stages for parameter in stage.parameters()]
    assert in_trunk == set(in_stages)
    assert len(in_stages) == len(in_trunk)


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("resnet18", {}, 5),
        ("resnet18", {"pooled": False}, 5),
        ("resnet18", {"features": "layer3"}, 4),
        ("vgg11", {}, 6),
        ("efficientnet_b0", {}, 10),
        ("mobilenet_v3_small", {}, 14),
        ("densenet121", {}, 8),
        ("convnext_tiny", {}, 8),
        ("swin_t", {}, 8),
        ("swin_t", {"features": "features.3"}, 4),
        pytest.param("swin_t", {"features": "features.3", "pooled": False}, 4, marks=pytest.mark.slow),
        ("regnet_y_400mf", {}, 2),
        ("shufflenet_v2_x0_5", {}, 6),
    ],
)
def test_stages_of_torchvision(name: str, arguments: dict[str, object], count: int) -> None:
    torch.manual_seed(0)
    trunk = mtl.trunks.Torchvision(name, **arguments)
    stages = stages_of(trunk)
    assert len(stages) == count
    image = torch.randn(2, 1, 64, 96)
    for training in (False, True):
        trunk.train(training)
        nn.ModuleList(stages).train(training)
        torch.manual_seed(1)
        wanted = trunk(image)
        torch.manual_seed(1)
        torch.testing.assert_close(run_stages(stages, image), wanted)
    in_stages = {id(parameter) for stage in stages for parameter in stage.parameters()}
    assert in_stages == {id(parameter) for parameter in trunk.parameters()}


def test_values_that_go_past_the_stages() -> None:
    class Embed(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * x, mask

    class Sum(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x * mask).sum(1)

    x, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    stages = stages_of(nn.Sequential(Embed(), Sum()))
    assert run_stages(stages, x, mask).tolist() == [2.0, 14.0]
    assert run_stages([], x) is x


def test_trunks_without_stages() -> None:
    transformer = mtl.trunks.Transformer(in_features=3, max_length=4, num_features=8)
    assert stages_of(transformer) == [transformer]
    with pytest.raises(mtl.UserError, match="at least 2 stages, and Transformer has 1"):
        stages_of(transformer, least=2)
    with pytest.raises(mtl.UserError, match="isn't a sequence of its parts"):
        stages_of(mtl.trunks.Torchvision("vit_b_16", pooled=True))


def test_maps_between_the_stages_of_swin_have_their_channels_first() -> None:
    stages = stages_of(mtl.trunks.Torchvision("swin_t"))
    value, channels = torch.randn(1, 3, 64, 64), []
    for stage in stages[:-1]:
        value = stage(value)
        channels.append(value.shape[1])
    assert channels == [96, 96, 192, 192, 384, 384, 768]
