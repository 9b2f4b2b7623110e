"""Losses and metrics over a whole split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mtl.batch import Batch, describe, field, num_samples
from mtl.data import Loader, Mix
from mtl.errors import UserError, is_elsewhere, told
from mtl.labels import denominator, num_labelled, select_for_metric
from mtl.model import MultiTaskModel
from mtl.passes import loss_of, objective_of
from mtl.precision import Autocast
from mtl.task import Task

NATS = (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss)
Figures = dict[str, dict[str, float]]  # by task, then by metric; `loss` is one of them


@dataclass(frozen=True)
class Kind:
    """What a figure measures: whether up (`max`) or down (`min`) is better, None if neither, and its unit.

    Only figures of one unit have a mean: shares, as accuracies are, of the same kind; cross-entropies, in nats. An
    error or a loss of another kind is in the unit of its own target.
    """

    mode: str | None
    unit: str


class Validation:
    """Takes each task's loss and metrics over a split, with the model in eval mode.

    Importing this imports torchmetrics, which takes seconds: do so when the first step has been taken.

    Attributes:
        labelled: by task, how many samples of the last split had a label, or a part of one.

    Raises:
        UserError: where a metric can't be made.
    """

    def __init__(self, model: MultiTaskModel, tasks: Sequence[Task], autocast: Autocast) -> None:
        self.model = model
        self.tasks = tasks
        self.autocast = autocast
        self.labelled: dict[str, int] = {}
        device = next(model.parameters()).device
        self.metrics = {task.name: {name: _make(task, name).to(device) for name in task.metrics} for task in tasks}

    def kinds(self) -> dict[str, Kind]:
        """The kind of every figure, by `task/metric`; each task's main one comes first, its loss last."""
        kinds = {}
        for task in self.tasks:
            for name, metric in self.metrics[task.name].items():
                better = metric.higher_is_better
                mode = None if better is None else "max" if better else "min"
                kinds[f"{task.name}/{name}"] = Kind(mode, _unit(type(metric).__name__, metric.plot_upper_bound, task))
            kinds[f"{task.name}/loss"] = Kind(
                "min", "nats" if isinstance(task.loss, NATS) else f"loss of {task.target or task.name}"
            )
        return kinds

    @torch.no_grad()
    def __call__(self, loader: Loader | Mix) -> Figures:
        """Every task's figures over all of the loader's samples: the loss a mean over what it counts, not over batches.

        With several loaders there are figures for the tasks that have data. Labels that are missing don't count;
        without any, a figure is NaN. A loss that is taken of whole batches is their mean, by samples.
        """
        training = self.model.training
        self.model.eval()
        zero = torch.zeros((), dtype=torch.float64, device=next(self.model.parameters()).device)
        sums = {task.name: zero.clone() for task in self.tasks}
        counts = {task.name: zero.clone() for task in self.tasks}
        labelled = {task.name: zero.clone() for task in self.tasks}
        try:
            seen: set[str] = set()
            for part, names in loader.parts():
                tasks = [task for task in self.tasks if names is None or task.name in names]
                seen |= {task.name for task in tasks}
                for batch in part.batches():
                    self._take(tasks, batch, sums, counts)
                    for task in tasks:
                        labelled[task.name] += num_labelled(task, batch)
            self.labelled = {name: int(labelled[name]) for name in labelled if name in seen}
            return {
                task.name: {
                    **{name: _number(task, name, metric) for name, metric in self.metrics[task.name].items()},
                    "loss": float(sums[task.name] / counts[task.name]),
                }
                for task in self.tasks
                if task.name in seen
            }
        finally:
            for metrics in self.metrics.values():
                for metric in metrics.values():
                    metric.reset()
            self.model.train(training)

    def _take(self, tasks: Sequence[Task], batch: Batch, sums: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
        """Adds one batch's losses and metrics of these tasks."""
        features = None
        for task in tasks:
            prediction = None
            if task.objective is None or task.metrics:
                with self.autocast():
                    if features is None or not self.model.shares_trunk:
                        features = self.model.features(batch, task.name)
                    prediction = self.model.predict(task.name, features)
            count = num_samples(batch, [task.target]) if task.whole_batch else denominator(task, batch)
            if not count:
                continue
            if task.objective is not None:
                with torch.enable_grad(), self.autocast():  # it may differentiate by itself
                    loss = objective_of(self.model, task, batch).detach()
            else:
                with self.autocast():
                    loss = loss_of(task, prediction, batch)
            sums[task.name] += loss.double() * count
            counts[task.name] += count
            for name, metric in self.metrics[task.name].items():
                _update(task, name, metric, prediction, batch)


def _unit(metric: str, bound: float | None, task: Task) -> str:
    """Accuracies are alike, whether of two classes or of many; an error without a bound is in its target's unit."""
    if bound is None:
        return f"{metric} of {task.target}"
    for kind in ("Binary", "Multiclass", "Multilabel"):
        metric = metric.removeprefix(kind)
    return metric


def _make(task: Task, name: str) -> Metric:
    metric = task.metrics[name]()
    if not isinstance(metric, Metric):
        raise UserError(f"task '{task.name}': metric '{name}' is a {type(metric).__name__}, not a torchmetrics.Metric")
    return metric


def _update(task: Task, name: str, metric: Metric, prediction: Any, batch: Batch) -> None:
    target = field(batch, task.target, f"task '{task.name}': its metrics' target")
    try:
        if isinstance(task.loss, nn.BCEWithLogitsLoss):
            # Given logits, torchmetrics would take those of a batch where all lie in [0, 1] for probabilities.
            prediction = prediction.sigmoid()
        if task.missing:
            prediction, target = select_for_metric(
                task, prediction, batch, ignored=getattr(metric, "ignore_index", None)
            )
        if not isinstance(target, Tensor) or len(target):
            metric.update(prediction, target)
    except Exception as error:
        if is_elsewhere(error):
            raise
        raise UserError(
            f"task '{task.name}': its metric '{name}' failed on a prediction {describe(prediction)} and the target "
            f"'{task.target}' {describe(target)}: {told(error)}. Look at tasks.{task.name}.metrics.{name}"
        ) from error


def _number(task: Task, name: str, metric: Metric) -> float:
    if not metric.update_called:
        return math.nan
    value = metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise UserError(f"task '{task.name}': metric '{name}' gives {describe(value)}, not one number; set its average")
    return float(value)
