"""The metrics of a task, and the conversion of predictions for them.

The meaning of a prediction follows from the task, see outputs.py. Predictions are converted before they are passed to a
metric, since most of torchmetrics' classification metrics take predictions for logits if a batch contains numbers
outside [0, 1].

    metric                                           input
    AUROC, average precision, EER, LogAUC without    scores in [0, 1] in the order of the probabilities, or values
    thresholds, and the rankings of labels           (float64)
    others that would guess                          probabilities (float64)
    others of classes, which take the highest        the predictions
    divergences of distributions                     probabilities, or their logarithms if `log_prob` (float64)
    perplexity                                       logits, (N, T, C)
    all other metrics, custom ones included          probabilities for logits of yes or no, values for logarithms of
                                                     values, other predictions unchanged

Predictions have at least float32, and integer targets int64. A metric that would guess is refused if the meaning of the
prediction isn't known, or if there are no probabilities.
"""

import math
from typing import Any

import torch
import torchmetrics.classification as by_class
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import JensenShannonDivergence, KLDivergence
from torchmetrics.text import Perplexity
from torchmetrics.wrappers import BinaryTargetTransformer, LambdaInputTransformer

from mtl.batch import Batch, describe, field
from mtl.choices import OUTPUTS
from mtl.distributed.collectives import any_process
from mtl.errors import FOREIGN, UserError, describe_error, is_unrelated
from mtl.labels import select_for_metric
from mtl.metrics import GroupAUROC, NormalAngles
from mtl.outputs import as_values, at_least_single, log_probabilities, output_of, probabilities, ranks
from mtl.task import BY_CLASS, Task
from mtl.training.figures import MATRICES, Kind, declared, kinds_of, matrix_of, numbers
from mtl.training.metric_states import fill_empty_states, no_warning_of_empty_states

OF_TWO = (  # metrics that apply the sigmoid to each element
    *(by_class.BinaryStatScores, by_class.MultilabelStatScores),
    *(by_class.BinaryConfusionMatrix, by_class.MultilabelConfusionMatrix),
    *(by_class.BinaryPrecisionRecallCurve, by_class.MultilabelPrecisionRecallCurve),
    *(by_class.BinaryCalibrationError, by_class.BinaryHingeLoss, by_class.MultilabelExactMatch),
    *(by_class.BinaryGroupStatRates, by_class.BinaryFairness),
    GroupAUROC,
    *(by_class.MultilabelCoverageError, by_class.MultilabelRankingAveragePrecision, by_class.MultilabelRankingLoss),
)
GUESSING = (
    *OF_TWO,
    *(by_class.MulticlassPrecisionRecallCurve, by_class.MulticlassCalibrationError, by_class.MulticlassHingeLoss),
)
RANKED = {  # exact classes: a subclass may use the values of the scores, not only their order
    *(by_class.BinaryAUROC, by_class.MulticlassAUROC, by_class.MultilabelAUROC),
    *(by_class.BinaryAveragePrecision, by_class.MulticlassAveragePrecision, by_class.MultilabelAveragePrecision),
    *(by_class.BinaryEER, by_class.MulticlassEER, by_class.MultilabelEER),
    *(by_class.BinaryLogAUC, by_class.MulticlassLogAUC, by_class.MultilabelLogAUC),
    *(by_class.MultilabelCoverageError, by_class.MultilabelRankingAveragePrecision, by_class.MultilabelRankingLoss),
}
HIDE_NAN = (NormalAngles, GroupAUROC)  # whose figures of NaN would be numbers
BY_HIGHEST = (by_class.MulticlassStatScores, by_class.MulticlassConfusionMatrix, by_class.MulticlassExactMatch)
_OF_CLASSES = ("logits", "probabilities")


class TaskMetric:
    """One metric of one task.

    Args:
        task: The task.
        name: The name of the metric in `task.metrics`.
        device: The device of the metric's state.

    Attributes:
        names: The names of the metric's figures. A metric with several figures has the names `metric.figure`, which are
            known from the start if it declares them, see `mtl.training.figures.declared`, else once it was computed. A
            metric whose value is a square matrix has no figures.
        matrix: The last value, if it is a square matrix, such as a confusion matrix; float64, on the CPU.

    Raises:
        UserError: If the metric can't be created, or doesn't suit the task's predictions.
    """

    def __init__(self, task: Task, name: str, device: torch.device) -> None:
        self.task = task
        self.name = name
        metric = task.metrics[name]()
        if not isinstance(metric, Metric):
            kind = type(metric).__name__
            raise UserError(f"task '{task.name}': metric '{name}' is a {kind}, not a torchmetrics.Metric")
        self.metric: Metric = metric.to(device)
        self._where = f"task '{task.name}': metric '{name}'"
        self._declared = declared(metric, self._where)
        self.matrix: Tensor | None = None
        self._is_final = self._declared is not None or type(metric) in MATRICES
        known = [] if type(metric) in MATRICES else [name]
        self.names = known if self._declared is None else [f"{name}.{each}" for each in self._declared]
        self._convert = self._conversion()
        self._has_nan = torch.zeros((), dtype=torch.bool, device=device)

    def update(self, prediction: Any, batch: Batch) -> None:
        """Updates the metric with the predictions for a batch, without the samples whose labels are missing.

        Raises:
            UserError: If the target isn't in the batch, or if the metric fails.
        """
        task = self.task
        target = field(batch, task.target, f"task '{task.name}': its metrics' target")
        try:
            ignored = getattr(self.metric, "ignore_index", None)
            group = getattr(self.metric, "group", None)  # the name of a field, see mtl.metrics.GroupAUROC
            further = []
            if isinstance(group, str):
                groups = field(batch, group, f"tasks.{task.name}.metrics.{self.name}.group:")
                further = [select_for_metric(task, groups, batch)[0]]
            prediction, target = select_for_metric(task, prediction, batch, ignored=ignored)
            if isinstance(target, Tensor) and not len(target):
                return
            prediction = self._convert(prediction)
            if self._hides_nan and isinstance(prediction, Tensor) and prediction.is_floating_point():
                self._has_nan |= prediction.isnan().any()
            self.metric.update(prediction, at_least_single(target), *further)
        except UserError:
            raise
        except FOREIGN as error:
            if is_unrelated(error):
                raise
            raise UserError(
                f"task '{task.name}': its metric '{self.name}' failed on a prediction {describe(prediction)} and the "
                f"target '{task.target}' {describe(target)}: {describe_error(error)}. Check "
                f"tasks.{task.name}.metrics.{self.name}"
            ) from error

    def compute(self, *, cut: bool = False) -> dict[str, float]:
        """Computes the figures of the metric by name, or its matrix; NaN without labels, or if a prediction was NaN.

        Args:
            cut: Whether the metric has seen only a part of the split, so that the value is NaN if the metric fails.

        Raises:
            UserError: If the metric fails, returns something else than numbers, or has other figures than before.
        """
        self.matrix = None
        updated, has_nan = any_process([self.metric.update_called, bool(self._has_nan)])
        if not updated or has_nan:
            return dict.fromkeys(self.names, math.nan)
        fill_empty_states(self.metric)
        try:
            with no_warning_of_empty_states():
                value = self.metric.compute()
        except Exception as error:
            if is_unrelated(error):
                raise
            if cut:
                return dict.fromkeys(self.names, math.nan)
            name = self.task.name
            raise UserError(
                f"task '{name}': its metric '{self.name}' failed on the whole split: {describe_error(error)}. Check "
                f"tasks.{name}.metrics.{self.name}"
            ) from error
        self.matrix = matrix_of(value) if self._declared is None else None
        figures = numbers(value, self._declared, self.name, self._where) if self.matrix is None else {}
        if self._is_final and list(figures) != self.names:
            raise UserError(
                f"{self._where} gives the figures {', '.join(figures)}, and gave {', '.join(self.names)} before; it "
                "has to give the same figures for all samples, in the same order"
            )
        self.names, self._is_final = list(figures), self._is_final or not cut
        return figures

    def kinds(self) -> dict[str, Kind]:
        """Returns the kind of each figure by its name."""
        return kinds_of(self.metric, self._declared, self.names, self.task)

    def reset(self) -> None:
        """Resets the state of the metric."""
        self.metric.reset()
        self._has_nan.zero_()

    def _conversion(self) -> Any:
        """Returns the function that converts predictions to the input of the metric."""
        modules = [module for module in self.metric.modules() if isinstance(module, Metric)]
        leaves = [module for module in modules if not any(isinstance(c, Metric) for c in module.children())]
        self._is_guessing = any(isinstance(module, GUESSING) for module in modules)
        self._hides_nan = self._is_guessing or any(isinstance(module, (*BY_HIGHEST, *HIDE_NAN)) for module in modules)
        if not self._is_guessing:
            divergences = [m for m in leaves if isinstance(m, KLDivergence | JensenShannonDivergence)]
            if divergences:
                return self._floats(self._shares(divergences))
            if any(isinstance(m, Perplexity) for m in leaves) and output_of(self.task) is not None:
                return self._floats(self._last_is_class)
            return at_least_single if any(isinstance(m, BY_HIGHEST) for m in leaves) else self._values
        changed = any(isinstance(module, LambdaInputTransformer | BinaryTargetTransformer) for module in modules)
        by_rank = not changed and all(type(m) in RANKED and getattr(m, "thresholds", None) is None for m in leaves)
        self._check_output(leaves, by_rank=by_rank)
        return self._floats(ranks if by_rank else probabilities)

    def _shares(self, divergences: list[Any]) -> Any:
        """Returns the conversion of predictions for divergences: to probabilities or to their logarithms.

        Raises:
            UserError: If the meaning of the predictions isn't known, or if metric and loss disagree about the target.
        """
        output, metric = output_of(self.task), type(divergences[0]).__name__
        where = f"task '{self.task.name}': its metric '{self.name}', {metric},"
        key = f"tasks.{self.task.name}"
        logs = {bool(m.log_prob) for m in divergences}
        if output is None or output == "multilabel_logits" or (True in logs and output not in _OF_CLASSES):
            what = f"the predictions are {output}" if output else "the kind of the predictions isn't known"
            raise UserError(
                f"{where} compares the probabilities of classes, and {what}. Set {key}.output=logits or probabilities"
            )
        if len(logs) > 1:
            raise UserError(f"{where} consists of metrics with different log_prob; it must be the same for all")
        by_loss = getattr(self.task.loss, "log_target", False if isinstance(self.task.loss, BY_CLASS) else None)
        if by_loss is not None and logs != {by_loss}:
            taken = {False: "probabilities", True: "log-probabilities"}
            raise UserError(
                f"{where} expects {taken[not by_loss]} in the target '{self.task.target}', and the loss expects "
                f"{taken[by_loss]}. Set {key}.metrics.{self.name}.log_prob={str(by_loss).lower()}"
            )
        return log_probabilities if True in logs else probabilities if output in _OF_CLASSES else as_values

    def _last_is_class(self, task: Task, prediction: Tensor) -> Tensor:
        """Returns logits in the shape that torchmetrics' perplexity expects, (N, T, C)."""
        output = output_of(task)
        if output != "logits":
            raise UserError(
                f"task '{task.name}': its metric '{self.name}', Perplexity, takes logits of classes, and the "
                f"predictions are {output}"
            )
        logits: Tensor = at_least_single(prediction)
        return logits.movedim(1, -1)

    def _values(self, prediction: Any) -> Any:
        return as_values(self.task, prediction)

    def _floats(self, convert: Any) -> Any:
        """Returns the conversion restricted to floating-point predictions; predicted class numbers don't change."""
        return lambda p: convert(self.task, p) if isinstance(p, Tensor) and p.is_floating_point() else p

    def _check_output(self, leaves: list[Metric], *, by_rank: bool) -> None:
        """Raises a UserError if the metric needs probabilities and the predictions can't be converted to these."""
        output = output_of(self.task)
        metric = next(type(m).__name__ for m in leaves if isinstance(m, GUESSING))
        where = f"task '{self.task.name}': its metric '{self.name}', {metric},"
        key = f"tasks.{self.task.name}.output"
        if output is None:
            raise UserError(
                f"{where} takes probabilities, and the kind of the predictions isn't known. Set {key} to one of "
                f"{', '.join(OUTPUTS)}"
            )
        if output == "logits" and any(isinstance(m, OF_TWO) for m in leaves):
            raise UserError(
                f"{where} takes one prediction for each yes or no, and the predictions are logits of classes. Use the "
                "metric for several classes, Multiclass…, with num_classes; or, if they are logits of yes or no, set "
                f"{key}=multilabel_logits"
            )
        if output in ("values", "log_values") and not by_rank:
            raise UserError(
                f"{where} takes probabilities, and the predictions are {output}. Use a metric of values, such as "
                f"torchmetrics.MeanAbsoluteError, or set {key} if they are something else"
            )
