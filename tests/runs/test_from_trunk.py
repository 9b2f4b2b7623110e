"""Heads whose width is that of the trunk: from the trunk's config or the trunk, for one trunk and for several."""

from pathlib import Path

import pytest
import torch
from conftest import command
from test_schema import composed

import mtl
from mtl import schema
from mtl.config.model import build_model
from mtl.config.tasks import build_tasks
from mtl.runs import loading as runs

FAST = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=500"]


def built(*overrides: str) -> mtl.MultiTaskModel:
    config = schema.check(composed("task=mnist_two_head", *overrides))
    return build_model(config, build_tasks(config))


def widths(model: mtl.MultiTaskModel) -> list[int]:
    return [head.in_features for head in model.heads.values()]


@pytest.mark.parametrize(
    ("overrides", "width"),
    [
        (["model.trunk.num_features=33"], 33),
        (["model/trunk=cnn", "model.trunk.in_channels=1", "model.trunk.widths=[4,6]"], 6),
        (["model/trunk=mlp", "model.trunk.in_features=784", "model.trunk.widths=[9]"], 9),
        (["model/trunk=torchvision", "model.trunk.name=resnet18", "model.trunk.features=layer1"], 64),
    ],
)
@pytest.mark.parametrize("model", ["hard_sharing", "separate"])
def test_width_is_the_trunks(overrides: list[str], width: int, model: str) -> None:
    made = built(f"model={model}", *overrides)
    assert widths(made) == [width, width]
    assert made.eval()({"image": torch.randn(2, 1, 28, 28)})["digit"].shape == (2, 10)


def test_first_values_do_not_depend_on_where_the_width_is_known_from() -> None:
    models = []
    cnn = ["model/trunk=cnn", "model.trunk.in_channels=1", "model.trunk.widths=[4,6]"]
    for heads in ([], ["tasks.digit.head.in_features=6", "tasks.parity.head.in_features=6"]):
        torch.manual_seed(0)
        models.append(built(*cnn, *heads).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


def test_a_trunk_that_says_nothing() -> None:
    with pytest.raises(
        mtl.UserError, match=r"model\.trunk: heads use from_trunk, .* but torch\.nn\.Flatten has neither"
    ):
        built("model/trunk=custom", "model.trunk._target_=torch.nn.Flatten")
    heads = ["tasks.digit.head.in_features=784", "tasks.parity.head.in_features=784"]
    assert widths(built("model/trunk=custom", "model.trunk._target_=torch.nn.Flatten", *heads)) == [784, 784]


def test_separate_trunks_share_no_module_inside_them() -> None:
    model = built(
        "model=separate",
        "model/trunk=picked",
        "model.trunk.module._target_=mtl.trunks.LeNet",
        "model.trunk.output=real",  # a tensor's real part: itself
        "model.trunk.num_features=20",
    )
    digit, parity = (set(trunk.parameters()) for trunk in model.trunk.values())
    assert digit
    assert not digit & parity


@pytest.mark.parametrize("model", ["hard_sharing", "separate"])
def test_torchvisions_weights_from_a_file_that_is_gone_afterwards(here: Path, model: str) -> None:
    torch.manual_seed(3)
    weights = mtl.trunks.Torchvision("mobilenet_v3_small", features="features.3").model.state_dict()
    whole = mtl.trunks.Torchvision("mobilenet_v3_small").model.state_dict() | weights
    torch.save(whole, "mobile.pth")
    trunk = ["model/trunk=torchvision", "model.trunk.name=mobilenet_v3_small", "model.trunk.weights=mobile.pth"]
    frozen = "model.freeze=[trunk]"
    ended = command(
        "train", *FAST, f"model={model}", *trunk, "model.trunk.features=features.3", frozen, "data.source=bundled"
    )
    assert ended.code == 0, ended.err
    Path("mobile.pth").unlink()
    loaded = mtl.load(ended.run)
    assert widths(loaded) == [24, 24]
    state = runs.read(ended.run)["model"]
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    prefix = "trunk.model." if model == "hard_sharing" else "trunk.parity.model."
    assert all(torch.equal(state[prefix + name], value) for name, value in weights.items())
    assert command("evaluate", f"run={ended.run}").code == 0


def test_wrong_trunks_are_told_in_a_sentence(here: Path) -> None:
    vision = ["model/trunk=torchvision", "model.trunk.name=resnet18"]
    for overrides, message in (
        (["model/trunk=torchvision"], "model.trunk.name: a value is required"),
        ([*vision, "model.trunk.name=resnet"], "model.trunk.name: torchvision has no 'resnet'"),
        ([*vision, "model.trunk.weights=gone.pth"], "model.trunk.weights: there is no file 'gone.pth'"),
        ([*vision, "model.trunk.depth=3"], "no key 'model.trunk.depth'"),
        (["model/trunk=cnn"], "model.trunk.in_channels: a value is required"),
        (["model/trunk=cnn", "model.trunk.in_channels=3"], "the trunk can't take its inputs image, of shape (500, 1, 28, 28)"),
        (["model/trunk=transformer", "model.trunk.max_length=4"], "model.trunk: set either vocabulary"),
        (
            ["model/trunk=picked", "model.trunk.module._target_=torch.nn.Flatten", "model.trunk.output=out", "model.trunk.num_features=3"],
            "model.trunk.output is 'out', and a Tensor of the module's output has no 'out'",
        ),
    ):  # fmt: skip
        ended = command("train", *FAST, *overrides)
        assert ended.code == 1, overrides
        assert message in ended.err
        assert "Traceback" not in ended.err
