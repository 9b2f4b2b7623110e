"""A task: one named objective."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mtl.errors import UserError

if TYPE_CHECKING:
    from torchmetrics import Metric


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
            Needed for losses that average over something that `mtl.labels.denominator` doesn't know.
        whole_batch: the loss is no mean over samples (RMSE, dice, contrastive losses), but is to be taken of the
            predictions for all of a step's batch. Where that is cut into micro-batches, each of these goes forward
            twice: see accumulation.py.
        weight: multiplies the task's loss before a balancer sees it; at least 0.

    Raises:
        UserError: for a name that can't name a module, or a weight that isn't a finite number of at least 0.
    """

    name: str
    head: nn.Module = field(kw_only=True)
    loss: Callable[[Any, Any], Tensor] = field(kw_only=True)
    target: str = field(kw_only=True)
    missing: bool = field(kw_only=True, default=False)
    mask: str | None = field(kw_only=True, default=None)
    metrics: "Mapping[str, Callable[[], Metric]]" = field(kw_only=True, default_factory=dict)
    count: "Callable[[Any], Tensor | int] | None" = field(kw_only=True, default=None)
    whole_batch: bool = field(kw_only=True, default=False)
    weight: float = field(kw_only=True, default=1.0)

    def __post_init__(self) -> None:
        check_name(self.name)
        self.missing |= self.mask is not None
        if not self.weight >= 0 or math.isinf(self.weight):
            raise UserError(f"task '{self.name}': weight is {self.weight}; it must be a finite number of at least 0")


def check_name(name: str) -> None:
    """Raises a UserError unless `name` can name a task: in a tag, a file and an `nn.ModuleDict`."""
    if not name.isidentifier():
        raise UserError(f"task name '{name}': use letters, digits and _, not beginning with a digit")
    if hasattr(nn.ModuleDict, name) or name in vars(nn.ModuleDict()):
        raise UserError(f"task name '{name}' is taken by PyTorch's ModuleDict; choose another, such as '{name}_'")
