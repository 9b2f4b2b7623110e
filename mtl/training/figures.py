"""The figures of a metric: one number, several numbers with names, or a square matrix, which is shown as a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryConfusionMatrix, MulticlassConfusionMatrix

from mtl.batch import describe
from mtl.errors import UserError
from mtl.task import Task

MATRICES = (BinaryConfusionMatrix, MulticlassConfusionMatrix)  # exact classes: subclasses compute numbers


@dataclass(frozen=True)
class Kind:
    """The kind of a figure. Only figures of the same unit can be averaged.

    Attributes:
        mode: Whether larger (`max`) or smaller (`min`) values are better; None if neither.
        unit: The unit: the kind of metric for metrics with a bound, such as accuracies; nats for cross-entropies; the
            unit of the target for other errors and losses.
    """

    mode: str | None
    unit: str


def declared(metric: Metric, where: str) -> dict[str, str | None] | None:
    """Returns the names of a metric's figures, each with `max`, `min` or None; None for a metric without names.

    A metric declares its figures in the attribute `figures`.

    Raises:
        UserError: If the attribute is no such mapping.
    """
    figures = getattr(metric, "figures", None)
    if figures is None:
        return None
    if not isinstance(figures, Mapping) or not figures or not {"max", "min", None}.issuperset(figures.values()):
        raise UserError(f"{where}: its attribute figures is {figures!r}; it must map names to 'max', 'min' or None")
    return {_checked(key, where): mode for key, mode in figures.items()}


def matrix_of(value: Any) -> Tensor | None:
    """Returns the value of a metric on the CPU if it is a square matrix of several rows, such as a confusion matrix."""
    if not isinstance(value, Tensor) or value.ndim != 2 or not 1 < len(value) == value.shape[1]:
        return None
    return value.detach().double().cpu()


def numbers(value: Any, names: Mapping[str, Any] | None, name: str, where: str) -> dict[str, float]:
    """Returns the figures of a metric by their full names: `metric` for one number, `metric.name` for several.

    Args:
        value: A tensor with one number, a mapping from names to such tensors, or a vector if there are names.
        name: The name of the metric.
        names: The names that the metric declares, see `declared`.
        where: The metric, for error messages.

    Raises:
        UserError: If the value is something else, or if its names aren't those that the metric declares.
    """
    if names is not None and isinstance(value, Tensor) and value.shape == (len(names),):
        value = dict(zip(names, value, strict=True))
    if isinstance(value, Mapping) and value:
        several = {_checked(key, where): _number(each, f"{where}: its figure '{key}'") for key, each in value.items()}
        if names is not None and list(several) != list(names):
            raise UserError(f"{where} gives the figures {', '.join(several)}, and declares {', '.join(names)}")
        return {f"{name}.{key}": number for key, number in several.items()}
    if names is not None:
        raise UserError(f"{where} gives {describe(value)}, and declares {len(names)} figures: {', '.join(names)}")
    return {name: _number(value, where)}


def _number(value: Any, where: str) -> float:
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise UserError(
            f"{where} gives {describe(value)}, not one number; set its average, or name the numbers with "
            "mtl.metrics.Named"
        )
    return float(value)


def _checked(key: Any, where: str) -> str:
    if not isinstance(key, str) or not key or "/" in key:
        raise UserError(f"{where} has a figure named {key!r}; the name must be a text without /")
    return key


def kinds_of(metric: Metric, names: Mapping[str, str | None] | None, full: list[str], task: Task) -> dict[str, Kind]:
    """Returns the kind of each figure of a metric.

    Args:
        metric: The metric.
        names: The names that the metric declares, see `declared`.
        full: The full names of the figures, as far as they are known: `metric`, or `metric.name` for several.
        task: The task of the metric.
    """
    wrapped = getattr(metric, "metric", None)
    inner: Any = wrapped if isinstance(wrapped, Metric) else metric
    better, bound = inner.higher_is_better, inner.plot_upper_bound
    unit = _unit(type(inner).__name__, bound, task)
    if names is None:
        return dict.fromkeys(full, Kind(None if better is None else "max" if better else "min", unit))
    units = [unit if bound is not None else f"{name} in {unit}" for name in names]
    return {name: Kind(*kind) for name, kind in zip(full, zip(names.values(), units, strict=True), strict=True)}


def _unit(metric: str, bound: float | None, task: Task) -> str:
    """Returns the unit of a metric: the metric's name for all numbers of classes if it is bounded, else the target."""
    if bound is None:
        return f"{metric} of {task.target}"
    for kind in ("Binary", "Multiclass", "Multilabel"):
        metric = metric.removeprefix(kind)
    return metric
