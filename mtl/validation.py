"""Losses and metrics over a whole split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtl.batch import Batch, num_samples
from mtl.data import Loader, Mix
from mtl.labels import denominator, num_labelled
from mtl.metrics import TaskMetric
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
        UserError: where a metric can't be made, or used with what a task's predictions mean.
    """

    def __init__(self, model: MultiTaskModel, tasks: Sequence[Task], autocast: Autocast) -> None:
        self.model = model
        self.tasks = tasks
        self.autocast = autocast
        self.labelled: dict[str, int] = {}
        device = next(model.parameters()).device
        self.metrics = {task.name: {name: TaskMetric(task, name, device) for name in task.metrics} for task in tasks}

    def kinds(self) -> dict[str, Kind]:
        """The kind of every figure, by `task/metric`; each task's main one comes first, its loss last."""
        kinds = {}
        for task in self.tasks:
            for name, task_metric in self.metrics[task.name].items():
                metric = task_metric.metric
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
                    **{name: metric.compute() for name, metric in self.metrics[task.name].items()},
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
            whole = task.whole_batch and task.objective is None
            count = num_samples(batch) if whole else denominator(task, batch)
            if count:
                sums[task.name] += self._loss(task, prediction, batch).double() * count
                counts[task.name] += count
            # Labels of classes that weigh nothing in the loss count in the metrics.
            if self.metrics[task.name] and num_labelled(task, batch):
                for metric in self.metrics[task.name].values():
                    metric.update(prediction, batch)

    def _loss(self, task: Task, prediction: Any, batch: Batch) -> Tensor:
        if task.objective is not None:
            with torch.enable_grad(), self.autocast():  # it may differentiate by itself
                return objective_of(self.model, task, batch).detach()
        with self.autocast():
            return loss_of(task, prediction, batch)


def _unit(metric: str, bound: float | None, task: Task) -> str:
    """Accuracies are alike, whether of two classes or of many; an error without a bound is in its target's unit."""
    if bound is None:
        return f"{metric} of {task.target}"
    for kind in ("Binary", "Multiclass", "Multilabel"):
        metric = metric.removeprefix(kind)
    return metric
