"""Confusion matrices: computed, drawn, logged as pictures, and compared by a report."""

import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, problem
from made_runs import comparison, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from mtl.data import Fields, Loader
from mtl.errors import UserError
from mtl.loggers import pictures
from mtl.report import main
from mtl.reporting.checking import checked_metrics
from mtl.reporting.matrices import matrices
from mtl.training.monitor import Monitor
from mtl.training.validation import Validation

BY_HAND = [[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]  # rows: the true classes


class Products(Metric):
    """A metric of one's own whose value is a matrix: the sums of the products of all pairs of predictions."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.sums += prediction.T.double() @ prediction.double()

    def compute(self) -> Tensor:
        return self.sums


def validation(**metrics: object) -> Validation:
    """Returns the validation of a model whose logits are its input."""
    model, tasks = problem(1)
    model.trunk, head = nn.Identity(), nn.Linear(3, 3, bias=False, dtype=torch.float64)
    model.heads["t0"] = head
    nn.init.eye_(head.weight)
    tasks[0].metrics = metrics  # type: ignore[assignment]
    return Validation(model, tasks, nullcontext)


def loader() -> Loader:
    predicted, truth = [0, 0, 1, 1, 0], [0, 0, 0, 1, 2]
    return Loader(Fields({"x": torch.eye(3)[predicted].double(), "y0": torch.tensor(truth)}), batch_size=2)


def test_a_confusion_matrix_is_no_figure() -> None:
    confusion = partial(MulticlassConfusionMatrix, num_classes=3)
    checked = validation(confusion=confusion, accuracy=partial(MulticlassAccuracy, num_classes=3, average="micro"))
    assert list(checked.kinds()) == ["t0/accuracy", "t0/loss"]
    assert Monitor(None, checked.kinds()).factors.keys() == {"t0/accuracy"}  # although the matrix comes first
    figures = checked(loader())
    assert list(figures["t0"]) == ["accuracy", "loss"]
    assert figures["t0"]["accuracy"] == pytest.approx(3 / 5)
    assert checked.matrices["t0"]["confusion"].tolist() == BY_HAND
    checked(loader())
    assert checked.matrices["t0"]["confusion"].tolist() == BY_HAND  # not the sum of both


def test_a_matrix_of_a_metric_of_ones_own() -> None:
    checked = validation(products=Products)
    assert list(checked(loader())["t0"]) == ["loss"]
    assert checked.matrices["t0"]["products"].tolist() == [[3, 0, 0], [0, 2, 0], [0, 0, 0]]
    assert list(checked.kinds()) == ["t0/loss"]


def test_counts_are_shown_as_shares_of_each_true_class() -> None:
    shown, unit = pictures.shares(np.array([[3, 1, 0], [0, 0, 0], [1, 1, 0]], dtype=float))
    np.testing.assert_allclose(shown, [[75, 25, 0], [np.nan] * 3, [50, 50, 0]])
    assert unit == "% of each true class"
    for values in ([[0.9, 0.1], [0.5, 0.5]], [[3, -1], [2, 2]], [[1, 0], [0, 1]]):
        shown, unit = pictures.shares(np.array(values, dtype=float))
        assert shown.tolist() == values
        assert unit == ""


@pytest.mark.parametrize("count", [2, 150])
def test_a_picture_has_dark_cells_on_the_diagonal_of_a_perfect_matrix(count: int) -> None:
    picture = pictures.matrix(np.eye(count) * 5, [f"class {number}" for number in range(count)])
    wrong = pictures.matrix(np.eye(count)[::-1] * 5, [f"class {number}" for number in range(count)])
    assert picture.dtype == np.uint8
    assert picture.shape == (*picture.shape[:2], 3)
    assert max(picture.shape[:2]) < 1400
    assert picture.shape == wrong.shape
    dark = [(each[..., 2].astype(int) - each[..., 0]) > 60 for each in (picture, wrong)]
    down, across = (np.arange(side) for side in picture.shape[:2])
    slopes = [np.corrcoef(down[where[0]], across[where[1]])[0, 1] for where in map(np.nonzero, dark)]
    assert slopes[0] > 0.5 > -0.5 > slopes[1]  # from the upper left to the lower right, and the other way


def test_logged_as_pictures_and_compared_by_a_report(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = "{_target_: torchmetrics.classification.MulticlassConfusionMatrix, num_classes: 10}"
    ended = command("train", "task=mnist_two_head", "trainer.max_epochs=2", f"+tasks.digit.metrics.confusion={metric}")
    assert ended.code == 0, ended.err
    assert "warning" not in ended.err
    for split in ("val", "test"):
        matrix = np.array(ended.metrics["matrices"][split]["digit"]["confusion"])
        assert matrix.sum() == ended.metrics["samples"][split]
        accuracy = ended.metrics[split]["digit"]["accuracy"]
        assert np.trace(matrix) / matrix.sum() == pytest.approx(accuracy, abs=1e-6)
    logged = EventAccumulator(str(ended.run))
    logged.Reload()
    images = logged.Tags()["images"]
    assert {f"metric/digit/confusion/{split}" for split in ("val", "test")} <= set(images)
    assert not [tag for tag in logged.Tags()["scalars"] if "confusion" in tag]
    assert "confusion" not in (ended.run / "metrics.csv").read_text()
    monkeypatch.setattr(sys, "argv", ["python -m mtl.report", str(ended.run.parent)])
    main()
    assert "digit confusion, test split" in (ended.run.parent / "report/report.html").read_text()


def made(folder: Path, **more: object) -> None:
    for seed, values in enumerate([[[3, 1], [0, 4]], [[1, 1], [2, 0]]]):
        told = {"matrices": {"test": {"a": {"confusion": values}}}, "classes": {"a": ["cat", "dog"]}}
        run(folder / str(seed), seed=seed, **(told | more))


def test_the_report_shows_the_mean_over_seeds(tmp_path: Path) -> None:
    """The shares are 75, 25, 0 and 100 %, and 50, 50, 100 and 0 %."""
    made(tmp_path)
    (picture,) = matrices(comparison(tmp_path).methods, "test", "made-1")
    assert (picture.name, picture.title) == ("made-1-a-confusion-test-split", "a confusion, test split")
    numbers = [text for text in ("62", "38", "50") if f">{text}</text>" in picture.svg]
    assert numbers == ["62", "38", "50"]
    assert picture.svg.count(">50</text>") == 2
    assert picture.svg.count(">dog</text>") == 2
    assert matrices(comparison(tmp_path).methods, "val", "made-1") == []


@pytest.mark.parametrize("value", [[[1, 2]], [[1, None], [0, 1]], [["1", 0], [0, 1]], 3, [[1] * 101] * 101])
def test_what_is_no_matrix_is_refused(tmp_path: Path, value: object) -> None:
    content = {"matrices": {"test": {"a": {"confusion": value}}}}
    with pytest.raises(UserError, match=r"metrics\.json: matrices is"):
        checked_metrics(json.loads(json.dumps(content)))
