"""Torchvision's classifiers as trunks: their features and weights."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

import mtl
from mtl.trunks import Torchvision

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Provides torchvision's model without the classifier, and a file with its weights."""
    torch.manual_seed(0)
    model = models.resnet18(num_classes=7).eval()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    model.fc = nn.Identity()
    return model, path


def test_features_are_torchvisions_own(resnet: tuple[nn.Module, Path]) -> None:
    model, path = resnet
    trunk = Torchvision("resnet18", weights=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(trunk(IMAGE), model(IMAGE))
    assert trunk.num_features == 512
    assert list(trunk.model.state_dict()) == list(model.state_dict())


def test_maps_are_what_is_averaged(resnet: tuple[nn.Module, Path]) -> None:
    model, path = resnet
    maps = Torchvision("resnet18", weights=str(path), pooled=False).eval()
    with torch.no_grad():
        given = maps(IMAGE)
        assert given.shape == (2, 512, 2, 2)
        torch.testing.assert_close(given.mean((2, 3)), model(IMAGE))
    assert maps.num_features == 512


def test_a_node_by_name(resnet: tuple[nn.Module, Path]) -> None:
    model, path = resnet
    with torch.no_grad():
        x = model.maxpool(model.relu(model.bn1(model.conv1(IMAGE))))
        wanted = model.layer2(model.layer1(x))
        maps = Torchvision("resnet18", weights=str(path), features="layer2", pooled=False).eval()
        pooled = Torchvision("resnet18", weights=str(path), features="layer2").eval()
        assert torch.equal(maps(IMAGE), wanted)
        torch.testing.assert_close(pooled(IMAGE), wanted.mean((2, 3)))
    assert maps.num_features == pooled.num_features == 128
    assert not any("layer3" in name for name, _ in maps.named_parameters())  # nothing is left that no task reaches


@pytest.mark.parametrize(
    ("name", "width", "maps"),
    [("mobilenet_v3_small", 1024, (576, 2, 2)), ("swin_t", 768, (768, 2, 2)), ("densenet121", 1024, (1024, 2, 2))],
)
def test_other_families(name: str, width: int, maps: tuple[int, ...]) -> None:
    trunk = Torchvision(name).eval()
    with torch.no_grad():
        assert trunk(IMAGE).shape == (2, trunk.num_features) == (2, width)
        unpooled = Torchvision(name, pooled=False).eval()
        assert unpooled(IMAGE).shape[1:] == maps
        assert unpooled.num_features == maps[0]


@pytest.mark.parametrize(("node", "dims"), [("features.1", (1, 2)), ("features.0.0", (2, 3)), ("norm", (1, 2))])
def test_maps_of_swin_are_averaged_over_height_and_width(node: str, dims: tuple[int, int]) -> None:
    torch.manual_seed(0)
    pooled = Torchvision("swin_t", features=node).eval()
    torch.manual_seed(0)
    maps = Torchvision("swin_t", features=node, pooled=False).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        output = pooled.model(image)[node]
        torch.testing.assert_close(pooled(image), output.mean(dims))
        assert pooled.num_features == maps.num_features == (768 if node == "norm" else 96)
        assert maps(image).shape == ((2, 768, 2, 3) if node == "norm" else (2, 96, 16, 24))


def test_tokens() -> None:
    trunk = Torchvision("vit_b_16", features="encoder.layers.encoder_layer_0", pooled=False).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = trunk(image)
        assert tokens.shape == (1, 197, 768)
        trunk.pooled = True
        torch.testing.assert_close(trunk(image), tokens.mean(1))


@pytest.mark.parametrize("arguments", [{}, {"features": "layer3"}, {"pooled": False}])
def test_training_reaches_all_parameters(arguments: dict[str, object]) -> None:
    trunk = Torchvision("resnet18", **arguments)
    before = trunk.model.bn1.running_mean.clone()
    assert trunk.training
    assert torch.equal(before, torch.zeros(64))  # looking for the width leaves no trace
    trunk(IMAGE).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trunk.parameters())
    assert not torch.equal(before, trunk.model.bn1.running_mean)
    moved = trunk.model.bn1.running_mean.clone()
    trunk.eval()(IMAGE)
    assert torch.equal(moved, trunk.model.bn1.running_mean)


def test_grey_images_are_taken_for_coloured_ones() -> None:
    trunk = Torchvision("resnet18").eval()
    grey = IMAGE[:, :1]
    assert torch.equal(trunk(grey), trunk(grey.repeat(1, 3, 1, 1)))


def test_wrong_settings(tmp_path: Path, resnet: tuple[nn.Module, Path]) -> None:
    model, path = resnet
    with pytest.raises(
        mtl.UserError, match=r"model\.trunk\.name: torchvision has no 'resnet81'; did you mean 'resnet18'"
    ):
        Torchvision("resnet81")
    with pytest.raises(
        mtl.UserError, match=r"model\.trunk\.features: resnet18 has no node 'layr3'; did you mean 'layer\d'"
    ):
        Torchvision("resnet18", features="layr3")
    with pytest.raises(mtl.UserError, match="squeezenet1_1 has no linear layer at its end; name a node of it"):
        Torchvision("squeezenet1_1")
    with pytest.raises(mtl.UserError, match=r"model\.trunk\.weights: there is no file 'nowhere\.pth'"):
        Torchvision("resnet18", weights="nowhere.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(mtl.UserError, match=r"text\.pth' contains no state dict"):
        Torchvision("resnet18", weights=str(tmp_path / "text.pth"))
    with pytest.raises(
        mtl.UserError,
        match=r"doesn't fit resnet34; missing: layer1\.2\.conv1\.weight, .*, …$",
    ):
        Torchvision("resnet34", weights=str(path))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "nested.pth")
    with pytest.raises(mtl.UserError, match=r"doesn't fit resnet18; missing: conv1\.weight, .*; unknown: state_dict$"):
        Torchvision("resnet18", weights=str(tmp_path / "nested.pth"))
    state = model.state_dict() | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(mtl.UserError, match=r"doesn't fit resnet18; of another shape: conv1\.weight$"):
        Torchvision("resnet18", weights=str(tmp_path / "grey.pth"))


def test_further_arguments_are_passed_on_to_torchvision() -> None:
    options = {"replace_stride_with_dilation": [False, True, True], "width_per_group": 4}
    trunk = Torchvision("resnet50", pooled=False, **options).eval()
    wanted = models.resnet50(**options).eval()
    wanted.load_state_dict(trunk._whole[0].state_dict(), strict=False)
    image = IMAGE[:1, :, :32, :32]
    with torch.no_grad():
        x = wanted.maxpool(wanted.relu(wanted.bn1(wanted.conv1(image))))
        maps = wanted.layer4(wanted.layer3(wanted.layer2(wanted.layer1(x))))
        assert maps.shape == (1, 2048, 4, 4)  # an eighth, not a 32nd
        assert torch.equal(trunk(image), maps)
    tokens = Torchvision("vit_b_32", image_size=64, pooled=False)
    assert tokens(IMAGE[:1]).shape == (1, 5, 768)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet18",
            {"fetures": "layer3"},
            r"resnet18 can't be built with fetures=layer3: .*; did you mean 'features'",
        ),
        ("resnet18", {"replace_stride_with_dilation": [False, True, True]}, "Dilation > 1 not supported in BasicBlock"),
        (
            "resnet50",
            {"replace_stride_with_dilation": [True]},
            "Keys of mtl.trunks.Torchvision itself are name, weights",
        ),
    ],
)
def test_arguments_that_torchvision_refuses(name: str, options: dict, message: str) -> None:
    with pytest.raises(mtl.UserError, match=message):
        Torchvision(name, **options)
