"""A class that replaces another gets only the arguments that fit; and messages that name the origin of keys."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, command
from torch import nn

import mtl
from mtl.cli.exchanged import Origin, decided
from mtl.config.targets import takes

TWO = "task=mnist_two_head"
FAST = ["trainer.max_epochs=1", "data.batch_size=500", "logger=[]"]
LATER = """
from torch import nn


class Anything(nn.Linear):
    def __init__(self, **kwargs):
        super().__init__(kwargs["in_features"], kwargs["out_features"])


class Head(nn.Linear):
    def __init__(self, in_features, classes=10):
        super().__init__(in_features, classes)


class SGD(__import__("torch").optim.SGD):
    def __init__(self, params):
        super().__init__(params, lr=0.1)
"""


def config(*overrides: str) -> dict[str, Any]:
    """Returns the composed config."""
    ended = command("train", "--cfg", "job", *overrides)
    assert ended.code == 0, ended.err
    return yaml.safe_load(ended.out)


def node(where: str, *overrides: str) -> Any:
    found = config(*overrides)
    for key in where.split("."):
        found = found[key]
    return found


def own(name: str, text: str, code: str = LATER) -> list[str]:
    """Writes a user's config file and some code, and returns the arguments to use them."""
    path = Path("mine") / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    Path("mine/later.py").write_text(code)
    return ["--config-dir", "mine"]


@pytest.mark.parametrize(
    ("where", "target", "more", "kept"),
    [
        ("tasks.digit.head", "torch.nn.Sequential", [], {}),
        ("tasks.digit.head", "torch.nn.LazyLinear", [], {"out_features": "${..num_outputs}"}),
        ("tasks.digit.head", "mtl.heads.Decoder", ["+{}.channels=1", "+{}.size=4"], {"in_features": "from_trunk", "channels": 1, "size": 4}),
        ("tasks.digit.loss", "torch.nn.MultiMarginLoss", [], {}),
        ("model.trunk", "torch.nn.Flatten", [], {}),
        ("model.trunk", "torch.nn.GRU", ["+{}.input_size=3"], {"dropout": 0.2, "input_size": 3}),
        ("model.trunk", "mtl.trunks.MLP", ["+{}.in_features=784", "+{}.widths=[3]"], {"dropout": 0.2, "in_features": 784, "widths": [3]}),
        ("optimizer", "torch.optim.Rprop", [], {"lr": 5e-3, "groups": None, "then": None}),
        ("optimizer", "torch.optim.SGD", [], {"lr": 5e-3, "weight_decay": 0.01, "groups": None, "then": None}),
        ("scheduler", "torch.optim.lr_scheduler.StepLR", ["+{}.step_size=5"], {"step_size": 5}),
        ("tasks.digit.metrics.accuracy", "torchmetrics.classification.BinaryF1Score", [], {}),
        ("tasks.digit.metrics.accuracy", "torchmetrics.classification.MulticlassF1Score", [], {"num_classes": "${...num_outputs}", "average": "micro"}),
        ("tasks.digit.metrics.accuracy", "torchmetrics.MeanAbsoluteError", [], {}),
    ],
)  # fmt: skip
def test_what_fits_stays_and_the_rest_goes(
    here: Path, where: str, target: str, more: list[str], kept: dict[str, Any]
) -> None:
    assert node(where, TWO, f"{where}._target_={target}", *[m.format(where) for m in more]) == {
        "_target_": target,
        **kept,
    }
    as_one = f"{where}={{_target_: {target}}}"
    assert node(where, TWO, as_one, *[m.format(where) for m in more]) == {"_target_": target, **kept}


def test_groups_that_are_exchanged(here: Path) -> None:
    """The keys that a problem gives for the trunk or optimizer that it chose."""
    source = "task=mnist_two_source"
    assert "num_features" not in node("model.trunk", source, "model/trunk=cnn")
    assert node("model.trunk", source, "model/trunk=table")["num_features"] == 50  # which fits
    assert node("model.trunk", source)["num_features"] == 50
    assert node("optimizer", TWO, "optimizer=sgd") == {
        **{"_target_": "torch.optim.SGD", "lr": 5e-3, "momentum": 0.9, "weight_decay": 0.0},
        **{"groups": None, "then": None},
    }
    balancer = ["balancer=cagrad", "balancer.c=0.3"]
    assert node("balancer", TWO, *balancer)["c"] == 0.3
    mine = own(
        "task/fair",
        "# @package _global_\ndefaults: [mnist_two_head, _self_, override /balancer: cagrad]\nbalancer: {c: 0.3}\n",
    )
    assert node("balancer", *mine, "task=fair")["c"] == 0.3
    assert "c" not in node("balancer", *mine, "task=fair", "balancer=mgda")


DERIVED = """# @package _global_
defaults: [mnist_two_source, _self_, override /model/trunk: cnn]
model: {trunk: {in_channels: 1, widths: [4, 8]}}
"""


def test_a_file_that_inherits_a_problem_and_takes_another_trunk(here: Path) -> None:
    found = node("model.trunk", *own("task/mine", DERIVED), "task=mine")
    assert found["_target_"] == "mtl.trunks.CNN"
    assert found["widths"] == [4, 8]
    assert "num_features" not in found
    ended = command("train", *own("task/mine", DERIVED), "task=mine", *FAST)
    assert ended.code == 0, ended.err
    line = (
        "model.trunk is now mtl.trunks.CNN, without the previous class's arguments that it doesn't accept: num_features "
        "(from configs/task/mnist_two_source.yaml)"
    )
    assert f"note     {line}" in ended.out
    assert line in (ended.run / "train.log").read_text()
    assert "num_features" not in yaml.safe_load((ended.run / "config.yaml").read_text())["model"]["trunk"]


def test_an_experiment_that_takes_another_trunk_and_an_objective_that_is_exchanged(here: Path) -> None:
    mine = own(
        "experiment/wide",
        "# @package _global_\ndefaults: [override /model/trunk: cnn]\nmodel: {trunk: {in_channels: 1}}\n",
    )
    found = node("model.trunk", *mine, "task=mnist_two_source", "experiment=wide")
    assert (found["in_channels"], found.get("num_features")) == (1, None)
    text = "# @package _global_\ndefaults: [mnist_two_head, _self_]\ntasks: {digit: {loss: {label_smoothing: 0.1}}}\n"
    own("task/smooth", text)
    own(
        "task/numbers", "# @package _global_\ndefaults: [smooth, _self_, override /objective@tasks.digit: regression]\n"
    )
    assert node("tasks.digit.loss", *mine, "task=smooth")["label_smoothing"] == 0.1
    assert node("tasks.digit.loss", *mine, "task=numbers") == {"_target_": "torch.nn.MSELoss"}


def test_keys_of_the_file_or_the_line_that_names_the_class_stay_and_are_refused(here: Path) -> None:
    text = "# @package _global_\ndefaults: [mnist_two_head, _self_]\ntasks: {digit: {head: {_target_: later.Head, width: 3}}}\n"
    ended = command("train", *own("task/wrong", text), "task=wrong", *FAST)
    assert ended.code == 1
    assert ended.err.startswith(
        "error: tasks.digit.head: later.Head got an unexpected keyword argument 'width'; it takes: in_features, classes. "
        "The config has _target_, width from mine/task/wrong.yaml; in_features from configs/objective/classification.yaml; "
        "~tasks.digit.head.width leaves it out"
    )
    assert command("train", *own("task/wrong", text), "task=wrong", "~tasks.digit.head.width", *FAST).code == 0
    typed = ["tasks.digit.head._target_=torch.nn.Sequential", "tasks.digit.head.in_features=3"]
    ended = command("train", TWO, *typed, *FAST)
    assert ended.code == 1
    assert "'in_features'; it takes: nothing. The config has _target_, in_features from the command line" in ended.err
    assert "leaves it out" not in ended.err
    ended = command("train", TWO, "+optimizer.nothing=3", *FAST)
    assert "optimizer: torch.optim.AdamW got an unexpected keyword argument 'nothing'" in ended.err
    assert (
        "_target_, weight_decay, groups, then from configs/optimizer/adamw.yaml; lr from configs/task/mnist_two_head.yaml"
        in ended.err
    )
    ended = command("train", TWO, "+tasks.digit.loss.reduction=3", "tasks.digit.loss.label_smoothing=a", *FAST)
    assert ended.code == 1


def test_a_class_that_may_take_any_argument_keeps_all(here: Path) -> None:
    mine = own("nothing", "")
    found = node("tasks.digit.head", *mine, TWO, "tasks.digit.head._target_=later.Anything")
    assert found == {"_target_": "later.Anything", "in_features": "from_trunk", "out_features": "${..num_outputs}"}
    assert node("optimizer", *mine, TWO, "optimizer._target_=later.SGD") == {
        **{"_target_": "later.SGD", "groups": None, "then": None}
    }
    ended = command("train", *mine, TWO, "optimizer._target_=later.SGD", *FAST)
    assert ended.code == 0, ended.err


def test_positions(here: Path) -> None:
    linear = "++tasks.digit.head={_target_: torch.nn.Linear, _args_: [20, 10]}"
    assert node("tasks.digit.head", TWO, linear) == {"_target_": "torch.nn.Linear", "_args_": [20, 10]}
    text = "# @package _global_\ndefaults: [mnist_two_head, _self_]\n"
    layers = "tasks: {digit: {head: {_target_: torch.nn.Sequential, _args_: [{_target_: torch.nn.Linear, _args_: [20, 10]}]}}}\n"
    mine = own("task/layers", text + layers)
    assert "_args_" in node("tasks.digit.head", *mine, "task=layers")
    found = node("tasks.digit.head", *mine, "task=layers", "tasks.digit.head._target_=mtl.heads.Linear")
    assert "_args_" not in found
    inner = "tasks.digit.head._args_.0._target_=torch.nn.Identity"
    assert node("tasks.digit.head", *mine, "task=layers", inner)["_args_"] == [{"_target_": "torch.nn.Identity"}]


def test_a_name_that_is_wrong_is_told_as_ever(here: Path) -> None:
    ended = command("train", TWO, "tasks.digit.head._target_=torch.nn.Sequentail", *FAST)
    assert "tasks.digit.head._target_: 'torch.nn' has no 'Sequentail'; did you mean 'Sequential'?" in ended.err


def test_such_a_run_goes_on_is_loaded_and_shown(here: Path) -> None:
    exchanged = [
        "++tasks.digit.head={_target_: torch.nn.Linear, _args_: [20, 10]}",
        "tasks.parity.metrics.accuracy._target_=torchmetrics.classification.MulticlassRecall",
    ]
    run = [TWO, *exchanged, "trainer.monitor={digit/loss: min}", *FAST]
    ended = command("train", *run)
    assert ended.code == 0, ended.err
    assert type(mtl.load(ended.run).heads["digit"]) is nn.Linear
    longer = [*run[:-3], "trainer.max_epochs=2", *run[-2:], "scheduler=none"]
    first = command("train", *run, "scheduler=none")
    whole = command("train", *longer)
    again = command("train", *longer, f"resume={first.run}")
    assert again.code == 0, again.err
    mine, its = mtl.load(first.run, checkpoint="last").state_dict(), mtl.load(whole.run, checkpoint="last").state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in its)
    (first.run / "metrics.json").write_text('{"status": "stopped"}')
    (whole.run / "metrics.json").write_text('{"status": "finished"}')
    (ended.run / "metrics.json").write_text('{"status": "finished"}')
    auto = command("train", *longer, "resume=auto")
    assert "resume   from step 16, epoch 2" in auto.out
    shown = command("graph", *run)
    assert "note     tasks.digit.head is now torch.nn.Linear, without the previous class's arguments" in shown.out


def test_an_option_whose_class_a_file_replaces_is_told_of(here: Path) -> None:
    """The file of a problem comes after the options of groups, whoever chose them."""
    flat = "# @package _global_\ndefaults: [mnist_two_head, _self_]\nmodel: {trunk: {_target_: flat.Flat}}\n"
    code = "from torch import nn\nclass Flat(nn.Flatten):\n    num_features = 784\n"
    mine = own("task/flat", flat, code)
    Path("mine/flat.py").write_text(code)
    run = [*mine, "task=flat", *FAST]
    typed = "model/trunk=mlp", "model.trunk.in_features=784"
    note = "model/trunk=mlp doesn't replace the class, because mine/task/flat.yaml names flat.Flat; add"
    without = command("train", *run)
    assert "doesn't replace" not in without.out
    ignored = command("train", *run, typed[0])
    assert f"note     {note} model.trunk._target_=mtl.trunks.MLP to replace it" in ignored.out, ignored.err
    assert config(*run, typed[0])["model"]["trunk"]["_target_"] == "flat.Flat"
    besides = command("train", *run, *typed, "model.trunk._target_=mtl.trunks.MLP")
    assert besides.code == 0, besides.err
    assert "doesn't replace" not in besides.out
    assert isinstance(mtl.load(besides.run).trunk, mtl.trunks.MLP)
    assert "doesn't replace" not in command("train", TWO, *FAST, *typed).out  # no file is in its way


def test_torch_is_imported_only_where_a_class_was_exchanged() -> None:
    code = (
        "import sys\n"
        "from mtl import cli, train\n"
        "try: cli.launch(train.train, 'train')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", code, "--cfg", "job", TWO, "optimizer=sgd", "balancer=mgda", *more],
            **{"capture_output": True, "text": True, "check": True, "cwd": ROOT},
        ).stdout.splitlines()[-1]
        for more in ([], ["optimizer._target_=torch.optim.Rprop"])
    ]
    assert done == ["False", "True"]


def test_takes() -> None:
    assert takes(nn.Linear) == ["in_features", "out_features", "bias", "device", "dtype"]
    assert takes(nn.Sequential) == []
    assert {"input_size", "hidden_size", "batch_first"} <= set(takes(nn.LSTM))
    assert takes(dict) is None

    def anything(**kwargs: int) -> None: ...

    assert takes(anything) is None


def test_origins() -> None:
    root = Origin()
    root.put({"a": {"_target_": "X", "k": 1, "l": [{"_target_": "Y"}]}}, 0)
    root.put({"a": {"_target_": "X", "k": 2}}, 1)
    root.put({"a": {"_target_": "Z", "k": "???", "m": {"n": 1}}}, 2)
    assert root.at(["a", "k"]).sources == [0, 1]
    assert decided(root.at(["a"]).targets) == 2
    assert [path for path, _ in root.nodes()] == [("a",), ("a", "l", "0")]
    root.put({"a": {"l": 3, "m": None}}, 3)
    assert root.at(["a", "l", "0"]) is None
    assert root.at(["a", "m", "n"]) is None
    root.remove(["a", "k"])
    assert root.at(["a", "k"]) is None
    assert decided([(0, "X"), (1, "Y"), (2, "Y")]) == 1
    assert decided([(0, "X"), (1, "X")]) is None
    assert decided([]) is None
