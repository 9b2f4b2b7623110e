"""Every kind of objective: composes, trains with missing labels, and measures as torchmetrics does."""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torchmetrics.classification as classification
from conftest import ROOT, Ended, command
from test_schema import composed
from torchmetrics import MeanAbsoluteError

import mtl
from mtl import schema
from mtl.config.model import build_model
from mtl.config.targets import make
from mtl.config.tasks import build_tasks
from mtl.data import Fields, Loader
from mtl.runs import loading as runs
from mtl.training.validation import Validation

MADE = """
import torch
from mtl.data import Fields, Splits


def made(missing=0.3, size=12):
    return Splits(*(split(count, seed, missing, size) for seed, count in enumerate((160, 50, 50))))


def split(count, seed, missing, size):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 2, size, size, generator=g)
    image[:, 0] += torch.randn(count, 1, 1, generator=g)
    image[:, 1] += 2 * torch.randn(count, 1, 1, generator=g)
    first, second = image.mean((2, 3)).unbind(1)
    gone = lambda *shape: torch.rand(*shape, generator=g) < missing
    nan = lambda values: values.float().masked_fill(gone(*values.shape), float("nan"))
    classes = lambda values: values.masked_fill(gone(*values.shape), -100)
    return Fields({
        "image": image,
        "kind": classes((first > 0).long() + (second > 1).long()),
        "positive": nan(first > 0),
        "whole": (first > 0).long(),
        "labels": nan(torch.stack([first > 0, second > 0, second > 1], 1)),
        "number": nan(3 * first),
        "numbers": nan(torch.stack([first, second], 1)),
        "picture": nan(image),
        "classes": classes((image[:, 0] > 0).long() + (image[:, 1] > 0).long()),
        "depth": nan(image[:, 1]),
        "normals": nan(image),
    })
"""
TASK = """# @package _global_
defaults:
  - /objective@tasks.kind: classification
  - /objective@tasks.positive: binary
  - /objective@tasks.whole: binary
  - /objective@tasks.labels: multilabel
  - /objective@tasks.number: regression
  - /objective@tasks.numbers: regression
  - /objective@tasks.picture: reconstruction
  - /objective@tasks.classes: segmentation
  - /objective@tasks.depth: dense_regression
  - /objective@tasks.normals: dense_regression
  - _self_
  - override /data: made
  - override /model: hard_sharing
  - override /model/trunk: cnn
model:
  inputs: [image]
  trunk: {in_channels: 2, widths: [16, 24], pooled: false}
tasks:
  kind: {target: kind, num_outputs: 3}
  positive: {target: positive}
  whole: {target: whole}
  labels: {target: labels, num_outputs: 3}
  number: {target: number}
  numbers: {target: numbers, num_outputs: 2}
  picture: {target: picture, head: {channels: 2, size: 12}}
  classes: {target: classes, num_outputs: 3, head: {size: 12}}
  depth: {target: depth, head: {size: 12}}
  normals: {target: normals, num_outputs: 2, head: {size: [12, 12]}}
optimizer: {lr: 5e-3}
trainer: {max_epochs: 6, monitor: {kind/accuracy: max}}
"""
DATA = "_target_: made_labels.made\nbatch_size: 20\neval_batch_size: 7\nnum_workers: 0\n"
OF_MAPS = {"depth", "edges", "normals"}  # tests/data/test_dense.py trains these
KINDS = sorted({path.stem for path in (ROOT / "configs" / "objective").glob("*.yaml")} - OF_MAPS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Provides one run with all kinds of objectives, most of them with missing labels."""
    folder = tmp_path_factory.mktemp("objectives")
    for group in ("task", "data"):
        (folder / "mine" / group).mkdir(parents=True)
    (folder / "mine" / "data" / "made.yaml").write_text(DATA)
    (folder / "mine" / "made_labels.py").write_text(MADE)
    (folder / "mine" / "task" / "made.yaml").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))  # mtl.load adds the run's folders of code
        ended = command("train", "--config-dir", "mine", "task=made")
        assert ended.code == 0, ended.err
        ended.run = ended.run.resolve()
        yield ended


def predicted(run: Ended, split: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    import made_labels

    fields = getattr(made_labels.made(), split).fields
    model = mtl.load(run.run)
    with torch.no_grad():
        return model({"image": fields["image"]}), fields


def test_every_kind_is_here() -> None:
    assert {line.split(": ")[1] for line in TASK.splitlines() if "/objective@" in line} == set(KINDS)


def test_figures_are_torchmetrics_on_the_whole_split(run: Ended) -> None:
    predictions, fields = predicted(run, "test")
    shown = run.metrics["test"]

    def same(task: str, metric: str, torchs, prediction, target) -> None:
        assert shown[task][metric] == pytest.approx(torchs(prediction, target).item(), rel=1e-5), (task, metric)

    kind, found = fields["kind"], fields["kind"] != -100
    accuracy = classification.MulticlassAccuracy(3, average="micro")
    same("kind", "accuracy", accuracy, predictions["kind"][found], kind[found])
    for task in ("positive", "whole"):
        found = ~fields[task].isnan()
        probability, target = predictions[task].sigmoid()[found], fields[task][found].long()
        same(task, "f1", classification.BinaryF1Score(), probability, target)
        same(task, "accuracy", classification.BinaryAccuracy(), probability, target)
    target = fields["labels"].nan_to_num(nan=-1).long()
    for name, metric in (("f1", classification.MultilabelF1Score), ("accuracy", classification.MultilabelAccuracy)):
        same("labels", name, metric(3, ignore_index=-1), predictions["labels"].sigmoid(), target)
    for task in ("number", "numbers", "depth", "normals"):
        found = ~fields[task].isnan()
        assert predictions[task].shape == fields[task].shape
        same(task, "mae", MeanAbsoluteError(), predictions[task][found], fields[task][found])
    found = ~fields["picture"].isnan()
    error = (predictions["picture"] - fields["picture"])[found].square().mean().sqrt().item()
    assert shown["picture"]["rmse"] == pytest.approx(error, rel=1e-5)
    iou = classification.MulticlassJaccardIndex(3, ignore_index=-100)
    same("classes", "iou", iou, predictions["classes"], fields["classes"])
    found = fields["classes"] != -100
    hits = (predictions["classes"].argmax(1) == fields["classes"])[found].double().mean().item()
    assert shown["classes"]["accuracy"] == pytest.approx(hits)


def test_every_task_learns(run: Ended) -> None:
    shown = run.metrics["test"]
    assert shown["kind"]["accuracy"] > 0.6
    assert min(shown[task]["f1"] for task in ("positive", "whole", "labels")) > 0.7
    _, fields = predicted(run, "test")
    for task in ("number", "numbers", "depth", "normals"):
        known = fields[task][~fields[task].isnan()]
        assert shown[task]["mae"] < 0.85 * (known - known.mean()).abs().mean(), task


def test_the_first_metric_and_whether_up_is_better(run: Ended) -> None:
    mains = {task: next(iter(figures)) for task, figures in run.metrics["test"].items()}
    up = {"kind": "accuracy", "positive": "f1", "whole": "f1", "labels": "f1", "classes": "iou"}
    down = {"number": "mae", "numbers": "mae", "picture": "rmse", "depth": "mae", "normals": "mae"}
    assert mains == up | down
    config = runs.read(run.run)["config"]
    tasks = build_tasks(config)
    kinds = Validation(build_model(config, tasks), tasks, lambda: None).kinds()
    assert {task: kinds[f"{task}/{main}"].mode for task, main in mains.items()} == (
        dict.fromkeys(up, "max") | dict.fromkeys(down, "min")
    )


def test_a_split_of_one_class_has_figures_too() -> None:
    config = schema.check(composed("task=mnist_two_head", "+objective@tasks.yes=binary", "+tasks.yes.target=digit"))
    f1 = partial(make, config["tasks"]["yes"]["metrics"]["f1"], "here")
    for label, probability, wanted in ((0, 0.1, 1.0), (0, 0.9, 0.0), (1, 0.9, 1.0), (1, 0.1, 0.0)):
        metric = f1()
        metric.update(torch.full((4,), probability), torch.full((4,), label))
        assert metric.compute() == wanted


def test_logits_of_a_batch_that_look_like_probabilities_are_none() -> None:
    task = mtl.Task(
        "a", head=torch.nn.Identity(), loss=mtl.losses.BinaryCrossEntropy(), target="y", metrics={"accuracy": classification.BinaryAccuracy}
    )  # fmt: skip
    model = mtl.MultiTaskModel(torch.nn.Linear(1, 1), [task], inputs=["x"])
    model.trunk.weight.data.fill_(1)
    model.trunk.bias.data.zero_()
    logits = torch.tensor([[0.2], [0.3], [0.4], [-2.0]])  # all but the last are a yes
    data = Fields({"x": logits, "y": torch.tensor([[1], [1], [1], [0]])})
    for size in (1, 3, 4):
        assert Validation(model, [task], nullcontext)(Loader(data, batch_size=size))["a"]["accuracy"] == 1


@pytest.mark.slow
def test_mnist_is_reconstructed(here: Path) -> None:
    ended = command("train", "task=mnist_reconstruct", "trainer.max_epochs=3")
    assert ended.code == 0, ended.err
    assert ended.metrics["test"]["digit"]["accuracy"] > 0.93
    splits = mtl.data.mnist()
    image = splits.test.fields["image"]
    mean = (image - splits.train.fields["image"].mean(0)).square().mean().sqrt()
    assert ended.metrics["test"]["redrawn"]["rmse"] < 0.72 * mean
    drawn = mtl.load(ended.run)({"image": image})["redrawn"]
    assert drawn.shape == image.shape
    error = (drawn - image).square().mean().sqrt()
    assert error.item() == pytest.approx(ended.metrics["test"]["redrawn"]["rmse"], rel=1e-4)
