"""Losses and metrics over a whole split."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mtl.batch import Batch
from mtl.data import Loader, Mix
from mtl.labels import denominator, num_labelled
from mtl.model import MultiTaskModel
from mtl.step.forward import loss_of, objective_of
from mtl.step.loss_checks import LossChecks
from mtl.step.precision import Autocast
from mtl.task import Task
from mtl.training.metrics import TaskMetric

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
        batchwise: the tasks whose loss over the last split depends on how that was cut into batches, since it isn't a
            mean over samples, nor over what `count` says.

    Raises:
        UserError: where a metric can't be made, or used with what a task's predictions mean.
    """

    def __init__(self, model: MultiTaskModel, tasks: Sequence[Task], autocast: Autocast) -> None:
        self.model = model
        self.tasks = tasks
        self.autocast = autocast
        self.labelled: dict[str, int] = {}
        self.batchwise: set[str] = set()
        self._checks = LossChecks(model)
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

    def __call__(self, loader: Loader | Mix) -> Figures:
        """Every task's figures over all of the loader's samples: the loss a mean over what it counts, not over batches.

        With several loaders there are figures for the tasks that have data. Labels that are missing don't count;
        without any, a figure is NaN. A loss that is no mean over what is counted is the mean of the batches' losses, by
        samples; see `batchwise`.
        """
        return self._figures(loader)

    def trial(self, loader: Loader | Mix) -> None:
        """Takes the figures of the loader's first batch, the first of each source, to see what fails."""
        self._figures(loader, trial=True)

    @torch.no_grad()
    def _figures(self, loader: Loader | Mix, *, trial: bool = False) -> Figures:
        training = self.model.training
        self.model.eval()
        zero = torch.zeros((), dtype=torch.float64, device=next(self.model.parameters()).device)
        sums = {task.name: zero.clone() for task in self.tasks}
        counts = {task.name: zero.clone() for task in self.tasks}
        labelled = {task.name: zero.clone() for task in self.tasks}
        try:
            seen: set[str] = set()
            cut: set[str] = set()  # the tasks of which there is more than what the trial takes
            self.batchwise = set()
            for part, names in loader.parts():
                tasks = [task for task in self.tasks if names is None or task.name in names]
                seen |= {task.name for task in tasks}
                cut |= {task.name for task in tasks if trial and len(part) > 1}
                batches: Any = part.batches()
                with closing(batches):  # worker processes end with it
                    for batch, size in islice(zip(batches, part.sizes(), strict=not trial), 1 if trial else None):
                        self._take(tasks, batch, size, sums, counts, several=len(part) > 1 and not trial)
                        for task in tasks:
                            labelled[task.name] += size if task.objective is not None else num_labelled(task, batch)
            self.labelled = {name: int(labelled[name]) for name in labelled if name in seen}
            return {
                task.name: {
                    **{name: each.compute(cut=task.name in cut) for name, each in self.metrics[task.name].items()},
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

    def caveat(self) -> str:
        """What there is to say of losses over the last split that depend on its batches; the empty text for none."""
        names = ", ".join(f"{name}/loss" for name in sorted(self.batchwise))
        if not names:
            return ""
        return (
            f"warning  {names}: a mean over evaluation batches, which depends on data.eval_batch_size, since the loss "
            "isn't a mean over samples; tasks.NAME.count can say what it is a mean over"
        )

    def _take(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        size: int,
        sums: dict[str, Tensor],
        counts: dict[str, Tensor],
        *,
        several: bool,
    ) -> None:
        """Adds the losses and metrics of these tasks on one batch of `size` samples, which may be one of several."""
        features = None
        for task in tasks:
            prediction = None
            if task.objective is None or task.metrics:
                with self.autocast():
                    if features is None:
                        features = self.model.features(batch)
                    prediction = self.model.predict(task.name, features)
            by_samples = task.whole_batch or (task.objective is not None and task.count is None)
            count = size if by_samples else denominator(task, batch)
            if count:
                sums[task.name] += self._loss(task, prediction, batch).double() * count
                counts[task.name] += count
                if several and self._checks.depends_on_batch(task, prediction, batch):
                    self.batchwise.add(task.name)
            # Labels of classes that weigh nothing in the loss count in the metrics.
            if self.metrics[task.name] and (task.objective is not None or num_labelled(task, batch)):
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
