"""From _target_ to object, and the messages if this fails."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import mtl
from mtl.config.targets import make


def test_make() -> None:
    layer = make({"_target_": "torch.nn.Linear", "in_features": 2, "_args_": []}, "here", out_features=3)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (2, 3)
    both = make(
        {"a": {"_target_": "torch.nn.ReLU"}, "b": [{"_target_": "builtins.complex", "_args_": [1, 2]}, 5]}, "here"
    )
    assert isinstance(both["a"], nn.ReLU)
    assert both["b"] == [1 + 2j, 5]
    later = make({"_target_": "torch.nn.Linear", "_partial_": True, "in_features": 2}, "here")
    assert isinstance(later, partial)
    assert later(out_features=4).out_features == 4
    nested = make({"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Flatten"}]}, "here")
    assert isinstance(nested[0], nn.Flatten)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "Linear"}, "here._target_: 'Linear' is not a dotted name"),
        ({"_target_": 3}, "here._target_: 3 is not a dotted name"),
        ({"_target_": "trch.nn.Linear"}, "there is no module 'trch'"),
        ({"_target_": "torch.nn.Linar"}, "'torch.nn' has no 'Linar'; did you mean 'Linear'?"),
        ({"_target_": "torch.nn.modules.linea.Linear"}, "'torch.nn.modules' has no 'linea'; did you mean 'linear'?"),
        ({"_target_": "torch.__version__"}, "which can't be called"),
        ({"_target_": "torch.nn.Linear", "in_featres": 2}, "it takes: in_features, out_features, bias, device, dtype"),
        (
            {"_target_": "torch.nn.Linear", "in_features": "a", "out_features": 1},
            "here: torch.nn.Linear(in_features='a', out_features=1) failed: TypeError",
        ),
        ({"a": [{"_target_": "torch.no"}]}, "here.a[0]._target_: 'torch' has no 'no'"),
    ],
)
def test_messages(node: dict, message: str) -> None:
    with pytest.raises(mtl.UserError) as error:
        make(node, "here")
    assert message in str(error.value)


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "is_broken.py").write_text("1 / 0\n")
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").touch()
    (tmp_path / "a_package" / "inner.py").write_text("import a_module_that_is_not_there\n")
    for target, message in {
        "needs_more.Head": "'needs_more' can't be imported: No module named 'a_module_that_is_not_there'",
        "is_broken.Head": "importing 'is_broken' failed: ZeroDivisionError",
        "a_package.inner.Head": "'a_package.inner' can't be imported: No module named 'a_module_that_is_not_there'",
    }.items():
        with pytest.raises(mtl.UserError, match=message):
            make({"_target_": target}, "here")
    assert "is_broken" not in sys.modules


def test_a_function_that_is_called_later_says_so() -> None:
    node = {"_target_": "torch.nn.functional.l1_loss"}
    advice = "add _partial_: true"
    with pytest.raises(mtl.UserError, match="missing a required argument: 'input'.*" + advice):
        make(node, "here")
    later = make({**node, "_partial_": True}, "here")
    assert later(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 1
    for call in (lambda: later(torch.zeros(2)), lambda: make({"_target_": "torch.nn.Linear"}, "here")):
        with pytest.raises(mtl.UserError, match="missing a required argument") as error:
            call()
        assert advice not in str(error.value)


def test_arguments_of_any_name() -> None:
    node = {"_target_": "builtins.dict", "name": "a", "where": "b", "target": "c", "node": "d"}
    expected = {"name": "a", "where": "b", "target": "c", "node": "d"}
    assert make(node, "x") == expected
    assert make({**node, "_partial_": True}, "x")() == expected
