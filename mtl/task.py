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
    """One named objective: a head, a loss, a target field of the batch, metrics, a weight.

    Args:
        name: appears in log tags and as the head's name in `model.heads`; an identifier.
        head: from the trunk's features to the prediction.
        loss: `loss(prediction, target)` gives a 0-dim tensor, a mean over the samples.
        target: the batch's field that the loss and the metrics are given.
        missing: whether labels may be missing, see `mtl.labels`. Labels are counted in each step then, for which the
            CPU waits for a GPU, and a task without any label in a step takes no part in it. None, the default, is true
            for targets whose missing labels have to be taken out: floats, and the -100 of a loss of yes and no. Of
            class numbers torch's losses leave out those that are ignored, without a wait; only where a step may have
            no others does it take a true. False promises that all are there: nothing is counted or taken out, and the
            loss is given the target as it is.
        mask: the batch's field that is true where there is a label, of the target's shape or with one value for each
            sample; implies `missing`.
        metrics: by name, callables without arguments that each make a fresh `torchmetrics.Metric`. Callables, since
            importing torchmetrics takes seconds and none is needed before the first validation. The first one is
            the task's main metric. What they are given of the predictions is described in `mtl.training.metrics`.
        output: what the prediction means, one of `mtl.outputs.OUTPUTS`, where the loss isn't one of torch's from which
            that is known.
        mean_over: what a loss of one's own is a mean over, where labels may be missing or batches are cut into
            micro-batches: `samples`; `elements`, of a prediction and a target of one shape; or `positions`, such as
            pixels. Positions are all dimensions but dimension 1 of the prediction, which has the channels. A floating
            target has the prediction's shape then, one of class numbers that shape without the channels; the loss is
            given those positions that have a label: predictions (M, C) and targets (M, C) or (M,). A mask may then
            also have one value for each position, (N, …) or (N, 1, …).
        count: where the batch is cut into micro-batches: from a target to the number that the loss's mean divides by.
            Needed for losses that average over something that `mtl.labels.denominator` doesn't know, and for objectives
            of which it can't be proven that they are means over samples, see step/loss_checks.py.
        whole_batch: the loss is no mean over samples (RMSE, dice, contrastive losses), but is to be taken of the
            predictions for all of a step's batch. Where that is cut into micro-batches, each of these goes forward
            twice: see step/whole_batch.py. An objective takes the whole batch in one graph instead.
        weight: multiplies the task's loss before a balancer sees it: a number of at least 0, or a function from the
            optimizer steps taken to one, such as `mtl.Schedule`. While that gives 0 the task takes no part in a step.
        objective: `objective(model, batch)` gives the loss, a 0-dim tensor, for what isn't loss(head(trunk(inputs)),
            target): residuals of equations, products of heads, distillation. In place of head, loss and target, which
            then only serve metrics; `count` is given the batch.

    Raises:
        UserError: for a name that can't name a module, a weight that isn't a finite number of at least 0, a task with
            neither an objective nor all of head, loss and target, and for an output or mean_over that there is not or
            that contradicts the loss.
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
        given = {"head": self.head is not _NONE, "loss": self.loss is not _no_loss, "target": bool(self.target)}
        if self.objective is None and not all(given.values()):
            missing = ", ".join(name for name, there in given.items() if not there)
            raise UserError(f"task '{self.name}': give head, loss and target, or an objective; {missing} isn't there")
        of_a_loss = (given["loss"], self.mask, self.missing, self.mean_over)
        if self.objective is not None and any(of_a_loss):
            raise UserError(f"task '{self.name}': with an objective, loss, mask, missing and mean_over have no place")
        if self.mask is not None:
            self.missing = True
        check_output(self)
        check_mean_over(self)
        if self.head is _NONE:
            self.head = nn.Identity()
        self.weight_at(0)

    def weight_at(self, step: int) -> float:
        """The weight when so many optimizer steps have been taken.

        Raises:
            UserError: where it isn't a finite number of at least 0.
        """
        weight = self.weight(step) if callable(self.weight) else self.weight
        if not isinstance(weight, int | float) or not weight >= 0 or math.isinf(weight):
            raise UserError(f"task '{self.name}': weight is {weight!r}; it must be a finite number of at least 0")
        return float(weight)


def check_name(name: str) -> None:
    """Raises a UserError unless `name` can name a task: in a tag, a file and an `nn.ModuleDict`."""
    if not (name.isascii() and name.isidentifier()):
        raise UserError(f"task name '{name}': use letters a to z, digits and _, not beginning with a digit")
    if hasattr(nn.ModuleDict, name) or name in vars(nn.ModuleDict()):
        raise UserError(f"task name '{name}' is taken by PyTorch's ModuleDict; choose another, such as '{name}_'")


def check_mean_over(task: Task) -> None:
    """Raises a UserError for a `mean_over` that there is not, or of which loss or count already say another."""
    if task.mean_over is None:
        return
    if task.mean_over not in MEAN_OVER:
        raise UserError(
            f"task '{task.name}': mean_over is {task.mean_over!r}; it must be one of {', '.join(MEAN_OVER)}"
        )
    if isinstance(task.loss, BY_CLASS + BY_ELEMENT):
        raise UserError(
            f"task '{task.name}': mean_over is for losses of one's own; of {type(task.loss).__name__} it is known"
        )
    if task.count is not None and task.mean_over != "samples":
        raise UserError(f"task '{task.name}': count and mean_over both say what the loss's mean divides by; give one")
