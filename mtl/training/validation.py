"""Losses and metrics over a whole split."""

from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mtl.batch import Batch
from mtl.data import Loader, Mix
from mtl.distributed.collectives import any_process, rank, sum_scalars, world_size
from mtl.distributed.replicas import difference
from mtl.distributed.sharding import is_sharded
from mtl.errors import UserError
from mtl.labels import denominator, label_fields, num_labelled
from mtl.model import MultiTaskModel
from mtl.step.forward import loss_of, objective_of
from mtl.step.loss_checks import LossChecks
from mtl.step.over_processes import gather
from mtl.step.precision import Autocast
from mtl.task import Task
from mtl.training.figures import Kind
from mtl.training.metrics import TaskMetric

NATS = (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss)
Matrices = dict[str, dict[str, Tensor]]  # by task, then by metric
Figures = dict[str, dict[str, float]]  # by task, then by metric; `loss` is one of them


class Validation:
    """Computes the loss and the metrics of each task over a split, with the model in eval mode.

    This module imports torchmetrics, which takes seconds, and should therefore be imported only when it is needed.

    Args:
        model: The model.
        tasks: The tasks.
        autocast: Returns the context manager in which forward passes run.

    Attributes:
        labelled: By task, the number of samples in the last split that had at least a part of the labels.
        matrices: By task and metric, the values of the last split that are square matrices, such as confusion matrices.
        batchwise: The tasks whose loss over the last split depends on the batch size, since the loss is neither a mean
            over samples nor over what `count` counts.

    Raises:
        UserError: If a metric can't be created, or doesn't suit a task's predictions.
    """

    def __init__(self, model: MultiTaskModel, tasks: Sequence[Task], autocast: Autocast) -> None:
        self.model = model
        self.tasks = tasks
        self.autocast = autocast
        self.labelled: dict[str, int] = {}
        self.matrices: Matrices = {}
        self.batchwise: set[str] = set()
        self._checks = LossChecks(model)
        device = next(model.parameters()).device
        self.metrics = {task.name: {name: TaskMetric(task, name, device) for name in task.metrics} for task in tasks}

    def kinds(self) -> dict[str, Kind]:
        """Returns the kind of each figure, by `task/metric`; the main metric of a task comes first, the loss last."""
        kinds: dict[str, Kind] = {}
        for task in self.tasks:
            for metric in self.metrics[task.name].values():
                kinds |= {f"{task.name}/{name}": kind for name, kind in metric.kinds().items()}
            kinds[f"{task.name}/loss"] = Kind(
                "min", "nats" if isinstance(task.loss, NATS) else f"loss of {task.target or task.name}"
            )
        return kinds

    def __call__(self, loader: Loader | Mix) -> Figures:
        """Computes the figures of each task over all samples, of which each process takes its share.

        The loss is the mean over all samples or elements, not over batches. A loss that is no such mean is averaged
        over batches, weighted by the number of samples, see `batchwise`. Missing labels don't count, and without any
        labels a figure is NaN. If there are several loaders, only tasks that have data get figures.
        """
        return self._figures(loader)

    def trial(self, loader: Loader | Mix) -> Figures:
        """Computes the figures of the first batch of each source, to detect errors early."""
        return self._figures(loader, trial=True)

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
            cut: set[str] = set()  # the tasks that have more data than the trial uses
            self.batchwise = set()
            for part, names in loader.by_source():
                tasks = [task for task in self.tasks if names is None or task.name in names]
                seen |= {task.name for task in tasks}
                cut |= {task.name for task in tasks if trial and not part.has_one_batch}
                batches: Any = part.shares()
                last: Batch = {}  # with samples of this process
                with closing(batches):  # also ends the worker processes
                    for batch, size in islice(batches, 1 if trial else None):
                        last = batch if size else last
                        several = (not part.has_one_batch or world_size() > 1) and not trial
                        self._take(tasks, last, size, sums, counts, several=several)
                        for task in tasks if size else ():
                            labelled[task.name] += size if task.objective is not None else num_labelled(task, batch)
            for each in (sums, counts, labelled):
                each.update(zip(each, sum_scalars(list(each.values())), strict=True))
            depends = any_process([task.name in self.batchwise for task in self.tasks])
            self.batchwise = {task.name for task, is_so in zip(self.tasks, depends, strict=True) if is_so}
            self.labelled = {name: int(labelled[name]) for name in labelled if name in seen}
            figures = {
                task.name: {
                    **_joined(task, [m.compute(cut=task.name in cut) for m in self.metrics[task.name].values()]),
                    "loss": float(sums[task.name] / counts[task.name]),
                }
                for task in self.tasks
                if task.name in seen
            }
            _check_equal(figures)
            matrices = {
                task: {n: m.matrix for n, m in self.metrics[task].items() if m.matrix is not None} for task in figures
            }
            self.matrices = {task: named for task, named in matrices.items() if named}
            return figures
        finally:
            for metrics in self.metrics.values():
                for metric in metrics.values():
                    metric.reset()
            self.model.train(training)

    def caveat(self) -> str:
        """Returns a warning about losses over the last split that depend on the batch size, or an empty string."""
        names = ", ".join(f"{name}/loss" for name in sorted(self.batchwise))
        if not names:
            return ""
        return (
            f"warning  {names}: a mean over evaluation batches, which depends on data.eval_batch_size, since the loss "
            "isn't a mean over samples; tasks.NAME.count can give the denominator"
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
        """Adds the losses of the tasks on one batch of `size` samples to the sums, and updates their metrics.

        A process that has no samples of the batch takes part in what the others do together: it runs the forward passes
        of an earlier batch if the parameters are sharded, and sends no predictions.

        Args:
            tasks: The tasks.
            batch: The samples of this process, or the last ones that it had; empty if it has had none.
            size: The number of samples that count.
            sums: By task, the sum of the losses.
            counts: By task, the denominator of the mean loss.
            several: Whether the split has several batches, so that a loss may depend on their size.

        Raises:
            UserError: If the parameters are sharded, and this process has had no samples.
        """
        runs = size > 0 or is_sharded(next(self.model.parameters()))
        if runs and not batch:
            raise UserError(
                f"data: a split has fewer samples than the {world_size()} processes that share the model's parameters; "
                "take distributed=ddp"
            )
        features = None
        for task in tasks:
            prediction = None
            if runs and (task.objective is None or task.metrics):
                with self.autocast():
                    if features is None:
                        features = self.model.features(batch)
                    prediction = self.model.predict(task.name, features)
            if _is_joined(task):
                self._take_joined(task, prediction, batch if size else {}, size, sums, counts)
                self.batchwise |= {task.name} if several else set()
            if not size:
                continue
            by_samples = task.whole_batch or (task.objective is not None and task.count is None)
            count = size if by_samples else denominator(task, batch)
            if count and not _is_joined(task):
                sums[task.name] += self._loss(task, prediction, batch).double() * count
                counts[task.name] += count
                if several and self._checks.depends_on_batch(task, prediction, batch):
                    self.batchwise.add(task.name)
            # Metrics also count labels of classes whose weight in the loss is 0.
            if self.metrics[task.name] and (task.objective is not None or num_labelled(task, batch)):
                for metric in self.metrics[task.name].values():
                    metric.update(prediction, batch)

    def _take_joined(
        self,
        task: Task,
        prediction: Any,
        batch: Batch,
        size: int,
        sums: dict[str, Tensor],
        counts: dict[str, Tensor],
    ) -> None:
        """Adds a loss that needs the predictions of all processes for the batch; the process of rank 0 counts it."""
        whole = gather(prediction, label_fields(task, batch) if size else {}, range(size), sums[task.name].device)
        if rank() == 0 and whole.size:
            with self.autocast():
                loss = loss_of(task, whole.prediction, whole.batch)
            sums[task.name] += loss.double() * whole.size
            counts[task.name] += whole.size

    def _loss(self, task: Task, prediction: Any, batch: Batch) -> Tensor:
        if task.objective is not None:
            with torch.enable_grad(), self.autocast():  # the objective may compute gradients
                return objective_of(self.model, task, batch).detach()
        with self.autocast():
            return loss_of(task, prediction, batch)


def _is_joined(task: Task) -> bool:
    """Returns whether the loss of a task needs the predictions of several processes."""
    return task.whole_batch and task.objective is None and world_size() > 1


def _joined(task: Task, figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the figures of all metrics of a task.

    Raises:
        UserError: If two figures have the same name.
    """
    names = [name for each in figures for name in each] + ["loss"]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"task '{task.name}': two of its figures are named '{name}'; rename one of its metrics")
    return {name: value for each in figures for name, value in each.items()}


def _check_equal(figures: Figures) -> None:
    """Checks that all processes have computed the same figures.

    Raises:
        UserError: If a figure differs, as that of a metric whose states are not synchronised.
    """
    if world_size() == 1:
        return
    for task, named in figures.items():
        for name, value in named.items():
            if difference(repr(value)):
                raise UserError(
                    f"task '{task}': '{name}' has different values in the processes that train together. A custom "
                    "metric has to register its states by add_state with a dist_reduce_fx"
                )
