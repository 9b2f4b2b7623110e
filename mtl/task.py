"""A task: one named objective."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mtl.errors import UserError

if TYPE_CHECKING:
    from torchmetrics import Metric

    from mtl.batch import Batch
    from mtl.model import MultiTaskModel


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
        missing: whether labels may be missing, see `mtl.labels`. They are counted in each step then, which makes the
            CPU wait for a GPU; a task without any label in a step takes no part in it.
        mask: the batch's field that is true where there is a label, one value a sample or element; implies `missing`.
        metrics: by name, callables without arguments that each make a fresh `torchmetrics.Metric`. Callables, since
            importing torchmetrics takes seconds and none is needed before the first validation. The first one is
            the task's main metric. Their predictions are the loss's, but probabilities where that is a
            `BCEWithLogitsLoss`.
        count: where the batch is cut into micro-batches: from a target to the number that the loss's mean divides by.
            Needed for losses that average over something that `mtl.labels.denominator` doesn't know, and for objectives
            of which it can't be proven that they are means over samples, see loss_checks.py.
        whole_batch: the loss is no mean over samples (RMSE, dice, contrastive losses), but is to be taken of the
            predictions for all of a step's batch. Where that is cut into micro-batches, each of these goes forward
            twice: see accumulation.py. An objective takes the whole batch in one graph instead.
        weight: multiplies the task's loss before a balancer sees it: a number of at least 0, or a function from the
            optimizer steps taken to one, such as `mtl.Schedule`. While that gives 0 the task takes no part in a step.
        objective: `objective(model, batch)` gives the loss, a 0-dim tensor, for what isn't loss(head(trunk(inputs)),
            target): residuals of equations, products of heads, distillation. In place of head, loss and target, which
            then only serve metrics; `count` is given the batch.

    Raises:
        UserError: for a name that can't name a module, a weight that isn't a finite number of at least 0, and a task
            with neither an objective nor all of head, loss and target.
    """

    name: str
    head: nn.Module = field(kw_only=True, default=_NONE)
    loss: Callable[[Any, Any], Tensor] = field(kw_only=True, default=_no_loss)
    target: str = field(kw_only=True, default="")
    missing: bool = field(kw_only=True, default=False)
    mask: str | None = field(kw_only=True, default=None)
    metrics: "Mapping[str, Callable[[], Metric]]" = field(kw_only=True, default_factory=dict)
    count: "Callable[[Any], Tensor | int] | None" = field(kw_only=True, default=None)
    whole_batch: bool = field(kw_only=True, default=False)
    weight: float | Callable[[int], float] = field(kw_only=True, default=1.0)
    objective: "Callable[[MultiTaskModel, Batch], Tensor] | None" = field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        check_name(self.name)
        self.missing |= self.mask is not None
        given = {"head": self.head is not _NONE, "loss": self.loss is not _no_loss, "target": bool(self.target)}
        if self.objective is None and not all(given.values()):
            missing = ", ".join(name for name, there in given.items() if not there)
            raise UserError(f"task '{self.name}': give head, loss and target, or an objective; {missing} isn't there")
        if self.objective is not None and (given["loss"] or self.missing):
            raise UserError(f"task '{self.name}': with an objective, loss, mask and missing have no place")
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
