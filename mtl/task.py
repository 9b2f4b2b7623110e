"""A task: one named objective."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mtl.choices import MEAN_OVER
from mtl.errors import UserError
from mtl.outputs import check_output

if TYPE_CHECKING:
    from torchmetrics import Metric

    from mtl.batch import Batch
    from mtl.model import MultiTaskModel


BY_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss)
BY_ELEMENT = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss),
    *(nn.PoissonNLLLoss, nn.GaussianNLLLoss, nn.KLDivLoss),
)
WEIGHTED = (*BY_CLASS, nn.MultiMarginLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
_NONE = nn.Module()


def _no_loss(prediction: Any, target: Any) -> Tensor:
    raise AssertionError("the task has an objective")


@dataclass(eq=False)
class Task:
    """One named objective: a head, a loss, a target field of the batch, metrics and a weight.

    Args:
        name: The name of the task, an identifier, which appears in log tags and as a key of `model.heads`.
        head: The module from the trunk's features to the prediction.
        loss: The loss function. `loss(prediction, target)` returns a 0-dim tensor, a mean over the samples.
        target: The field of the batch that is the target of the loss and the metrics.
        missing: Whether labels may be missing, see `mtl.labels`. If true, labels are counted in each step, which
            forces a GPU synchronisation, and a task without labels in a step doesn't take part. None, the default,
            means true for targets whose missing labels have to be removed: floats, and -100 with a binary loss. For
            class numbers, torch's losses ignore missing labels themselves; set `missing` to true only if a step may
            have no labels at all. False means that no labels are missing: the loss gets the target unchanged.
        mask: The field of the batch that is true where there is a label. It has the shape of the target, one channel
            for all channels of the target, (N, 1, …), or one value for each sample. A mask implies `missing`.
        metrics: Functions without arguments that each create a `torchmetrics.Metric`, by name. They are functions
            because importing torchmetrics takes seconds and isn't needed before the first validation. The first metric
            is the task's main metric. The conversion of predictions for metrics is described in `mtl.training.metrics`.
        output: The meaning of the prediction, one of `mtl.outputs.OUTPUTS`. Only needed if the meaning doesn't follow
            from the loss, as it does for torch's losses.
        mean_over: What a custom loss averages over, needed if labels may be missing or batches are divided into
            micro-batches: `samples`; `elements`, if prediction and target have the same shape; or `positions`, such as
            pixels. The positions are all dimensions of the prediction except dimension 1, which has the channels. The
            shape of a floating-point target is then that of the prediction, and the shape of class numbers is the same
            without the channels. The loss gets the positions that have a label: predictions (M, C) and targets (M, C)
            or (M,). A mask may then also have one value for each position, (N, …) or (N, 1, …).
        count: A function from the target to the denominator of the loss's mean, used if the batch is divided into
            micro-batches. Needed for losses whose denominator `mtl.labels.denominator` doesn't know, and for objectives
            that can't be shown to be means over samples, see step/loss_checks.py.
        whole_batch: Whether the loss isn't a mean over samples (RMSE, dice, contrastive losses) and has to be computed
            from the predictions for the whole batch. If the batch is divided into micro-batches, each of them runs
            forward twice, see step/whole_batch.py; an objective gets the whole batch in one graph instead.
        weight: The factor of the task's loss, which applies before the balancer's weights: a number of at least 0, or a
            function from the number of optimizer steps taken to such a number, such as `mtl.Schedule`. While the
            function returns 0, the task doesn't take part in steps.
        objective: A function `objective(model, batch)` that returns the loss, a 0-dim tensor, for tasks that aren't of
            the form loss(head(trunk(inputs)), target), such as residuals of equations, products of heads, or
            distillation. It replaces `loss`; head and target are then only used for metrics, and `count` gets the
            batch.

    Raises:
        UserError: If the name can't be the name of a module, if the weight isn't a finite number of at least 0, if the
            task has neither an objective nor all of head, loss and target, or if `output` or `mean_over` is unknown or
            contradicts the loss.
    """

    name: str
    head: nn.Module = field(kw_only=True, default=_NONE)
    loss: Callable[[Any, Any], Tensor] = field(kw_only=True, default=_no_loss)
    target: str = field(kw_only=True, default="")
    missing: bool | None = field(kw_only=True, default=None)
    mask: str | None = field(kw_only=True, default=None)
    metrics: "Mapping[str, Callable[[], Metric]]" = field(kw_only=True, default_factory=dict)
    output: str | None = field(kw_only=True, default=None)
    mean_over: str | None = field(kw_only=True, default=None)
    count: "Callable[[Any], Tensor | int] | None" = field(kw_only=True, default=None)
    whole_batch: bool = field(kw_only=True, default=False)
    weight: float | Callable[[int], float] = field(kw_only=True, default=1.0)
    objective: "Callable[[MultiTaskModel, Batch], Tensor] | None" = field(kw_only=True, default=None)
    seen: "Callable[[Any, Batch], None] | None" = field(init=False, repr=False, default=None)  # each prediction, batch

    def __post_init__(self) -> None:
        check_name(self.name)
        arguments = {"head": self.head is not _NONE, "loss": self.loss is not _no_loss, "target": bool(self.target)}
        if self.objective is None and not all(arguments.values()):
            missing = ", ".join(name for name, is_set in arguments.items() if not is_set)
            raise UserError(f"task '{self.name}': give head, loss and target, or an objective; {missing} is missing")
        of_a_loss = (arguments["loss"], self.mask, self.missing, self.mean_over)
        if self.objective is not None and any(of_a_loss):
            raise UserError(f"task '{self.name}': with an objective, leave out loss, mask, missing and mean_over")
        if self.mask is not None:
            self.missing = True
        check_output(self)
        check_mean_over(self)
        if self.head is _NONE:
            self.head = nn.Identity()
        self.weight_at(0)

    def weight_at(self, step: int) -> float:
        """Returns the weight after a number of optimizer steps.

        Raises:
            UserError: If the weight isn't a finite number of at least 0.
        """
        weight = self.weight(step) if callable(self.weight) else self.weight
        if not isinstance(weight, int | float) or not weight >= 0 or math.isinf(weight):
            raise UserError(f"task '{self.name}': weight is {weight!r}; it must be a finite number of at least 0")
        return float(weight)


def check_name(name: str) -> None:
    """Raises a UserError unless `name` can be used in a tag, a file name and an `nn.ModuleDict`."""
    if not (name.isascii() and name.isidentifier()):
        raise UserError(f"task name '{name}': use letters a to z, digits and _, not beginning with a digit")
    if hasattr(nn.ModuleDict, name) or name in vars(nn.ModuleDict()):
        raise UserError(f"task name '{name}' is taken by PyTorch's ModuleDict; choose another, such as '{name}_'")


def check_mean_over(task: Task) -> None:
    """Raises a UserError if `mean_over` is unknown, or if the loss or `count` already determines the denominator."""
    if task.mean_over is None:
        return
    if task.mean_over not in MEAN_OVER:
        raise UserError(
            f"task '{task.name}': mean_over is {task.mean_over!r}; it must be one of {', '.join(MEAN_OVER)}"
        )
    if isinstance(task.loss, BY_CLASS + BY_ELEMENT):
        raise UserError(
            f"task '{task.name}': mean_over is for custom losses; the mean of {type(task.loss).__name__} is known"
        )
    if task.count is not None and task.mean_over != "samples":
        raise UserError(f"task '{task.name}': both count and mean_over set the loss's denominator; use only one")
