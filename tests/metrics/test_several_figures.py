"""Metrics with several figures, from their values to log, monitor and report."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import problem
from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.wrappers import ClasswiseWrapper

import mtl
from mtl import tags
from mtl.data import Fields, Loader
from mtl.metrics import DepthErrors, Named, NormalAngles
from mtl.training.figures import Kind
from mtl.training.metrics import TaskMetric
from mtl.training.monitor import Monitor
from mtl.training.validation import Validation

CLASSES = ["bed", "book", "chair", "floor", "wall"]


def per_class() -> Metric:
    return Named(MulticlassJaccardIndex(num_classes=5, average="none"), CLASSES)


def undeclared() -> Metric:
    return ClasswiseWrapper(MulticlassJaccardIndex(num_classes=5, average="none"), CLASSES, prefix="of-")


def data(count: int = 23) -> Fields:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Fields({"x": x, "y0": torch.randint(0, 5, (count,), generator=generator)})


def validation(**metrics: object) -> Validation:
    model, tasks = problem(1)
    tasks[0].metrics = metrics  # type: ignore[assignment]
    return Validation(model, tasks, nullcontext)


def expected(of: Validation) -> list[float]:
    """Returns the intersection over union of each class, by counting."""
    fields = data().fields
    predicted = of.model.eval()({"x": fields["x"]})["t0"].argmax(1)
    pairs = [(predicted == c, fields["y0"] == c) for c in range(5)]
    return [((p & t).sum() / (p | t).sum()).item() for p, t in pairs]


def test_each_class_is_a_figure_of_its_own() -> None:
    checked = validation(iou=per_class, accuracy=partial(MulticlassAccuracy, num_classes=5))
    names = [f"iou.{name}" for name in CLASSES]
    assert list(checked.kinds()) == [*(f"t0/{name}" for name in names), "t0/accuracy", "t0/loss"]
    assert checked.kinds()["t0/iou.bed"] == Kind("max", "JaccardIndex")
    figures = checked(Loader(data(), batch_size=4))
    assert list(figures["t0"]) == [*names, "accuracy", "loss"]
    assert [figures["t0"][name] for name in names] == pytest.approx(expected(checked))
    assert tags.by_tag(figures, "val")["metric/t0/iou.chair/val"] == figures["t0"]["iou.chair"]


def test_names_that_a_metric_does_not_declare_are_known_once_it_was_computed() -> None:
    checked = validation(iou=undeclared)
    assert list(checked.kinds()) == ["t0/iou", "t0/loss"]
    monitor = Monitor({"t0/iou.of-bed": "max"}, checked.kinds())
    figures = checked(Loader(data(), batch_size=4))
    assert list(checked.kinds()) == [*(f"t0/iou.of-{name}" for name in CLASSES), "t0/loss"]
    assert checked.kinds()["t0/iou.of-bed"] == Kind("max", "JaccardIndex")
    assert monitor(figures) == pytest.approx(expected(checked)[0])
    wrong = Monitor({"t0/iou.of-bad": "max"}, validation(iou=undeclared).kinds())
    with pytest.raises(mtl.UserError, match=r"trainer\.monitor: there is no figure 't0/iou\.of-bad'.*t0/iou\.of-bed"):
        wrong(figures)
    main = Monitor(None, validation(iou=undeclared).kinds())
    with pytest.raises(mtl.UserError, match=r"trainer\.monitor is null.*, but there is no figure 't0/iou'"):
        main(figures)


def test_a_figure_is_monitored_by_its_name() -> None:
    kinds = validation(iou=per_class).kinds()
    figures = {"t0": {f"iou.{name}": float(i) for i, name in enumerate(CLASSES)} | {"loss": 9.0}}
    assert Monitor({"t0/iou.floor": "max"}, kinds)(figures) == 3
    assert Monitor({"t0/iou.floor": "max", "t0/iou.wall": "max"}, kinds)(figures) == 3.5
    assert Monitor(None, kinds)(figures) == 0  # the first figure is the main one
    with pytest.raises(mtl.UserError, match=r"there is no figure 't0/iou\.flor'.*t0/iou\.floor"):
        Monitor({"t0/iou.flor": "max"}, kinds)(figures)
    with pytest.raises(mtl.UserError, match="there is no figure 't0/other'"):
        Monitor({"t0/other": "max"}, kinds)


class Fixed(Metric):
    """A metric that returns the given values, one at each computation."""

    def __init__(self, *values: object, figures: object = None) -> None:
        super().__init__()
        self.values = list(values)
        if figures is not None:
            self.figures = figures

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        pass

    def compute(self) -> object:
        return self.values.pop(0)


ONE = torch.ones(())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"a": [{"x": ONE}, {"y": ONE}]}, r"metric 'a' gives the figures a\.y, and gave a\.x before"),
        ({"a": [ONE, {"y": ONE}]}, r"metric 'a' gives the figures a\.y, and gave a before"),
        ({"a": [{"x": torch.ones(2)}]}, r"metric 'a': its figure 'x' gives of shape \(2,\), not one number"),
        ({"a": [{"x/y": ONE}]}, "has a figure named 'x/y'; the name must be a text without /"),
        ({"a": [{3: ONE}]}, "has a figure named 3"),
        ({"a": [torch.ones(3)]}, r"gives of shape \(3,\), not one number; set its average, or name .*Named"),
        ({"a": [{"x": ONE}], "a.x": [ONE]}, r"task 't0': two of its figures are named 'a\.x'"),
        ({"loss": [ONE]}, "task 't0': two of its figures are named 'loss'"),
    ],
)
def test_figures_that_are_refused(metrics: dict[str, list], message: str) -> None:
    checked = validation(**{name: partial(Fixed, *values) for name, values in metrics.items()})
    loader = Loader(data(), batch_size=4)
    with pytest.raises(mtl.UserError, match=message):
        [checked(loader) for _ in range(2)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"y": ONE}, "metric 'a' gives the figures y, and declares x, y"),
        ({"y": ONE, "x": ONE}, "metric 'a' gives the figures y, x, and declares x, y"),
        (torch.ones(3), r"metric 'a' gives of shape \(3,\), and declares 2 figures: x, y"),
    ],
)
def test_a_metric_gives_the_figures_that_it_declares(value: object, message: str) -> None:
    checked = validation(a=partial(Fixed, value, figures={"x": "max", "y": None}))
    with pytest.raises(mtl.UserError, match=message):
        checked(Loader(data(), batch_size=4))
    with pytest.raises(mtl.UserError, match="its attribute figures is \\['x'\\]; it must map names to"):
        validation(a=partial(Fixed, figures=["x"]))


def test_without_labels_each_figure_is_nan() -> None:
    checked = validation(iou=per_class)
    empty = Fields({"x": data().fields["x"][:4], "y0": torch.full((4,), -100)})
    figures = checked(Loader(empty, batch_size=4))
    assert all(math.isnan(figures["t0"][f"iou.{name}"]) for name in CLASSES)


def test_a_name_occurs_once() -> None:
    with pytest.raises(ValueError, match="names has a name twice: a, a"):
        Named(MulticlassJaccardIndex(num_classes=2, average="none"), ["a", "a"])


def rotated(degrees: float) -> list[float]:
    """Returns (0, 0, 1) turned by an angle about the x-axis."""
    return [0.0, math.sin(math.radians(degrees)), math.cos(math.radians(degrees))]


def test_angles_of_normals_by_hand() -> None:
    metric = NormalAngles()
    angles = [5.0, 11.0, 20.0, 29.0, 100.0]
    target = torch.tensor([[0.0, 0.0, 1.0]] * 5 + [[0.0, 0.0, 0.0], [math.nan] * 3])
    prediction = torch.tensor([[3 * x for x in rotated(a)] for a in angles] + [[1.0, 0.0, 0.0]] * 2)
    metric.update(prediction[:2], target[:2])
    metric.update(prediction[2:], target[2:])
    figures = {name: float(value) for name, value in metric.compute().items()}
    assert list(figures) == ["mean", "median", "within_11.25", "within_22.5", "within_30"] == list(metric.figures)
    assert figures["mean"] == pytest.approx(33.0, abs=1e-4)
    assert figures["median"] == pytest.approx(20.0, abs=0.01)
    assert [figures[f"within_{each}"] for each in ("11.25", "22.5", "30")] == pytest.approx([0.4, 0.6, 0.8])
    metric.reset()
    metric.update(prediction[:4], target[:4])
    assert float(metric.compute()["median"]) == pytest.approx(15.5, abs=0.01)  # between 11 and 20
    maps = NormalAngles()
    maps.update(prediction.T.reshape(1, 3, 7, 1), target.T.reshape(1, 3, 7, 1))
    assert {name: float(value) for name, value in maps.compute().items()} == pytest.approx(figures)


def test_angles_are_exact_near_zero_and_nan_without_normals() -> None:
    metric = NormalAngles()
    metric.update(torch.tensor([rotated(1e-4)], dtype=torch.float64), torch.tensor([[0.0, 0.0, 1.0]]))
    assert float(metric.compute()["mean"]) == pytest.approx(1e-4, rel=1e-6)
    metric.reset()
    metric.update(torch.ones(2, 3), torch.zeros(2, 3))
    assert all(math.isnan(value) for value in metric.compute().values())


def test_a_prediction_that_is_nan_is_no_angle_of_zero() -> None:
    task = mtl.Task("normals", head=nn.Identity(), loss=mtl.losses.CosineDistance(), target="normal")
    task.metrics, task.mean_over = {"angle": NormalAngles}, "positions"
    metric = TaskMetric(task, "angle", torch.device("cpu"))
    target = torch.randn(2, 3, 4, 4)
    metric.update(torch.where(torch.arange(4) < 2, target, torch.nan), {"normal": target})
    assert all(math.isnan(value) for value in metric.compute().values())


@pytest.mark.parametrize(
    ("prediction", "values"),
    [("depth", [3.0, 1.0, 5.0]), ("inverse", [1 / 3, 1.0, 1 / 5])],
)
def test_errors_of_depths_by_hand(prediction: str, values: list[float]) -> None:
    metric = DepthErrors(prediction=prediction)  # type: ignore[arg-type]
    target = torch.tensor([2.0, 4.0, 5.0, 0.0, math.nan])
    metric.update(torch.tensor([*values, 7.0, 7.0]), target)
    figures = {name: float(value) for name, value in metric.compute().items()}
    wanted = {"absolute": (1 + 3 + 0) / 3, "relative": (1 / 2 + 3 / 4) / 3, "rmse": math.sqrt((1 + 9) / 3)}
    assert figures == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="prediction is 'other'; it must be depth or inverse"):
        DepthErrors(prediction="other")  # type: ignore[arg-type]
