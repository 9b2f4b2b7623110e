"""Numbers and lists of a config become tensors if a class of torch.nn or mtl.losses takes a tensor."""

import inspect
from typing import Any

import pytest
import torch
from conftest import command
from test_schema import composed
from torch import nn

import mtl
from mtl import schema
from mtl.batch import cut
from mtl.choices import PASSES
from mtl.config.model import build_model
from mtl.config.targets import make
from mtl.config.tasks import build_tasks
from mtl.step.forward import loss_of

CLASSES = torch.tensor([2, 0, 1, 1, 0, 2, 2, -100])
YES = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
LOSSES = [  # the loss, its weights, predictions, targets
    ("torch.nn.CrossEntropyLoss", {"weight": [2, 2, 0.5]}, torch.randn(8, 3), CLASSES),
    ("torch.nn.CrossEntropyLoss", {"weight": [2, 2, 0.5], "label_smoothing": 0.1}, torch.randn(8, 3), CLASSES),
    ("torch.nn.NLLLoss", {"weight": [2, 2, 0.5]}, torch.randn(8, 3).log_softmax(1), CLASSES),
    ("torch.nn.MultiMarginLoss", {"weight": [2, 2, 0.5]}, torch.randn(7, 3), CLASSES[:7]),
    ("torch.nn.BCELoss", {"weight": [2, 1, 0.5]}, torch.rand(4, 3), YES),
    ("torch.nn.BCELoss", {"weight": 3}, torch.rand(4, 3), YES),
    ("torch.nn.BCEWithLogitsLoss", {"pos_weight": 8}, torch.randn(4, 3), YES),
    ("torch.nn.BCEWithLogitsLoss", {"pos_weight": [8]}, torch.randn(4), YES[:, 0]),
    ("torch.nn.BCEWithLogitsLoss", {"pos_weight": [8, 1, 2], "weight": [1, 2.5, 1]}, torch.randn(4, 3), YES),
    ("torch.nn.MultiLabelSoftMarginLoss", {"weight": [2, 1, 0.5]}, torch.randn(4, 3), YES),
    ("mtl.losses.BinaryCrossEntropy", {"pos_weight": 8, "weight": [1, 2, 1]}, torch.randn(4, 3), YES.long()),
]


@pytest.mark.parametrize(("name", "weights", "prediction", "target"), LOSSES)
def test_a_loss_of_a_config_is_the_one_with_tensors(
    name: str, weights: dict[str, Any], prediction: torch.Tensor, target: torch.Tensor
) -> None:
    made = make({"_target_": name, **weights}, "tasks.a.loss")
    tensors = {k: torch.tensor(v, dtype=torch.float32) if k.endswith("weight") else v for k, v in weights.items()}
    by_hand = type(made)(**tensors)
    for key in tensors:
        if key.endswith("weight"):
            assert getattr(made, key).dtype == torch.float32
    assert torch.equal(made(prediction, target), by_hand(prediction, target))
    task = mtl.Task("a", head=nn.Identity(), loss=made, target="y")
    assert torch.equal(loss_of(task, prediction, {"y": target}), made(prediction, target))


def test_these_are_all_losses_of_torch_that_take_tensors() -> None:
    takes = {
        name
        for name, each in vars(nn).items()
        if inspect.isclass(each) and issubclass(each, nn.modules.loss._Loss)
        if {"weight", "pos_weight"} & set(inspect.signature(each).parameters)
    }
    takes.discard(
        "LinearCrossEntropyLoss"
    )  # takes features and a layer's weights beside the target, so it is no loss here
    assert {f"torch.nn.{name}" for name in takes} == {name for name, *_ in LOSSES if name.startswith("torch.")}


FUNCTIONS = {
    **{"CrossEntropyLoss": "cross_entropy", "NLLLoss": "nll_loss", "MultiMarginLoss": "multi_margin_loss"},
    **{"BCELoss": "binary_cross_entropy", "BCEWithLogitsLoss": "binary_cross_entropy_with_logits"},
    "MultiLabelSoftMarginLoss": "multilabel_soft_margin_loss",
}


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "weights", "prediction", "target"), [case for case in LOSSES if "torch" in case[0]])
def test_a_function_is_given_the_same(
    name: str, weights: dict[str, Any], prediction: torch.Tensor, target: torch.Tensor, kind: torch.dtype
) -> None:
    by_class = make({"_target_": name, **weights}, "tasks.a.loss").to(kind)
    function = FUNCTIONS[name.split(".")[-1]]
    node = {"_target_": f"torch.nn.functional.{function}", "_partial_": True, **weights}
    prediction, target = prediction.to(kind), target.to(kind) if target.is_floating_point() else target
    assert torch.equal(make(node, "tasks.a.loss")(prediction, target), by_class(prediction, target))
    on_another_device = make(node, "tasks.a.loss")(prediction.to("meta"), target.to("meta"))
    assert on_another_device.device.type == "meta"


def test_other_arguments_of_functions_stay_as_they_are() -> None:
    node = {"_target_": "torch.nn.functional.cross_entropy", "_partial_": True, "label_smoothing": 0.1}
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.equal(make(node, "x")(x, y), nn.functional.cross_entropy(x, y, label_smoothing=0.1))
    with pytest.raises(mtl.UserError, match=r"x\.weight is \['a'\]; it must be a number, or a list of numbers"):
        make({**node, "weight": ["a"]}, "x")(x, y)


def test_positions_subclasses_and_tensors() -> None:
    class Own(nn.CrossEntropyLoss):
        pass

    positional = make({"_target_": "torch.nn.CrossEntropyLoss", "_args_": [[1, 2]]}, "here")
    assert torch.equal(positional.weight, torch.tensor([1.0, 2.0]))
    node = {"_target_": "torch.nn.CrossEntropyLoss", "weight": {"_target_": "torch.tensor", "data": [1.0, 2.0]}}
    assert torch.equal(make(node, "here").weight, torch.tensor([1.0, 2.0]))
    from mtl.config.targets import call

    assert torch.equal(call(Own, "Own", "here", weight=[1, 2]).weight, torch.tensor([1.0, 2.0]))
    assert make({"_target_": "torch.nn.LayerNorm", "normalized_shape": [2, 3]}, "here").normalized_shape == (2, 3)
    assert isinstance(make({"_target_": "torch.nn.CrossEntropyLoss", "ignore_index": 3}, "here").ignore_index, int)


@pytest.mark.parametrize("weight", [["a"], [1, [2]], True, [None]])
def test_what_is_no_list_of_numbers_is_refused(weight: Any) -> None:
    with pytest.raises(mtl.UserError, match=r"tasks\.a\.loss\.weight is .*; it must be a number, or a list of numbers"):
        make({"_target_": "torch.nn.CrossEntropyLoss", "weight": weight}, "tasks.a.loss")


def test_the_weights_go_where_the_model_goes() -> None:
    loss = make({"_target_": "torch.nn.CrossEntropyLoss", "weight": [2, 2, 0.5]}, "here")
    task = mtl.Task("a", head=nn.Linear(2, 3), loss=loss, target="y")
    model = mtl.MultiTaskModel(nn.Linear(2, 2), [task], inputs=["x"]).to("meta")
    assert model.losses["a"].weight.device.type == "meta"


@pytest.mark.parametrize(
    ("loss", "weights", "shape", "message"),
    [
        ("torch.nn.CrossEntropyLoss", {"weight": [1, 2, 3]}, (4, 10), r"3 weights, .* 10 classes\. .*loss\.weight"),
        ("torch.nn.CrossEntropyLoss", {"weight": 2}, (4, 10), r"1 weights, of shape \(\), .* 10 classes"),
        ("torch.nn.NLLLoss", {"weight": [1] * 11}, (4, 10), "11 weights, .* 10 classes"),
        ("torch.nn.MultiMarginLoss", {"weight": [1] * 11}, (4, 10), "11 weights, .* 10 classes"),
        ("torch.nn.BCEWithLogitsLoss", {"pos_weight": [1, 2]}, (4, 3), r"2 weights.*outputs of shape \(3,\).*loss\.pos_w"),
        ("torch.nn.BCEWithLogitsLoss", {"pos_weight": [1] * 4}, (4,), "4 weights.*one output a sample"),
        ("torch.nn.BCELoss", {"weight": [[1]] * 4}, (4, 3), r"4 weights, of shape \(4, 1\).*outputs of shape \(3,\)"),
        ("torch.nn.MultiLabelSoftMarginLoss", {"weight": [1, 2]}, (4, 3), "2 weights"),
        ("mtl.losses.BinaryCrossEntropy", {"pos_weight": [1, 2]}, (4, 3), "2 weights"),
    ],
)  # fmt: skip
def test_another_number_of_weights_is_refused(loss: str, weights: dict[str, Any], shape: Any, message: str) -> None:
    task = mtl.Task("a", head=nn.Identity(), loss=make({"_target_": loss, **weights}, "tasks.a.loss"), target="y")
    by_class = len(shape) == 2 and shape[1] == 10
    target = torch.tensor([0, 9, 3, 1]) if by_class else torch.ones(shape)
    with pytest.raises(mtl.UserError, match=rf"task 'a': its loss has {message}"):
        loss_of(task, torch.rand(shape), {"y": target})


def two_tasks(*overrides: str) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    torch.manual_seed(0)
    config = schema.check(composed("task=mnist_two_head", "model.trunk.dropout=0", *overrides))
    tasks = build_tasks(config)
    return build_model(config, tasks).double(), tasks


@pytest.mark.parametrize("passes", list(PASSES))
@pytest.mark.parametrize("loss", ["torch.nn.CrossEntropyLoss", "torch.nn.MultiMarginLoss"])
def test_weighted_means_in_micro_batches_are_those_of_one_batch(passes: str, loss: str) -> None:
    weights = [3, 1, 0.25, 1, 1, 1, 1, 0, 2, 5]
    model, tasks = two_tasks(
        f"++tasks.digit.loss={{_target_: {loss}, weight: {weights}}}",
        "tasks.digit.metrics=null",
        "tasks.parity.metrics=null",
    )
    batch = {k: v[:23] for k, v in mtl.data.mnist().train.fields.items()}
    batch["image"] = batch["image"].double()
    by_hand = getattr(nn, loss.split(".")[-1])(weight=torch.tensor(weights).double())
    predictions = model(batch)
    losses = [
        by_hand(predictions["digit"], batch["digit"]),
        nn.functional.cross_entropy(predictions["parity"], batch["parity"]),
    ]
    expected = torch.autograd.grad(sum(losses), list(model.parameters()))
    for given, size in ((batch, None), (batch, 5), (cut(batch, size=7), None)):
        result = mtl.Step(model, tasks, passes=passes, micro_batch_size=size).backward(given)
        torch.testing.assert_close(torch.stack(list(result.losses.values())), torch.stack(losses), rtol=1e-10, atol=0)
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("micro", ["null", "16"])
@pytest.mark.parametrize(
    ("weight", "told"),
    [("[1,2,3]", "3 weights, of shape (3,)"), ("3", "1 weights, of shape ()"), ("[]", "0 weights, of shape (0,)")],
)
def test_wrong_weights_end_a_training_before_its_first_step(here: Any, micro: str, weight: str, told: str) -> None:
    ended = command(
        "train",
        *("task=mnist_two_head", "trainer.max_epochs=1", f"trainer.micro_batch_size={micro}"),
        f"+tasks.digit.loss.weight={weight}",
    )
    assert ended.code == 1
    assert f"task 'digit': its loss has {told}, and its prediction has 10 classes" in ended.err
    assert "Traceback" not in ended.err
    assert not list(here.glob("outputs/**/*.pt"))
