"""Groups of settings of a step."""

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mtl.choices import INTERVALS, SOURCES
from mtl.errors import UserError


@dataclass(frozen=True)
class Gradients:
    """Settings of the Gramian of the tasks' gradients.

    Args:
        source: How the Gramian is computed, see gradients/at_features.py: `rows`, `layerwise`, `representation` or
            `auto`. `auto` is `layerwise` if that is possible, else `rows`; both are exact.
        every: The number of steps from one Gramian to the next; the weights stay the same in between.

    Raises:
        UserError: If a value is invalid.
    """

    source: str = "auto"
    every: int = 1

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UserError(f"gradients.source: '{self.source}' is not one of {', '.join(SOURCES)}")
        if self.every < 1:
            raise UserError(f"gradients.every is {self.every}; it must be at least 1")


@dataclass(frozen=True)
class Update:
    """Settings of the parameter update: scheduler, clipping and a second optimizer.

    Args:
        scheduler: The learning rate scheduler.
        interval: When the scheduler steps: after each optimizer `step`, or after each `epoch`, in `Step.epoch_end`. A
            `ReduceLROnPlateau` needs `epoch`, and steps in `Step.validated`.
        clip_norm: The norm that the summed gradient is clipped to.
        clip_shared_norm: The norm that the summed gradient over the shared parameters is clipped to, before `clip_norm`
            applies; the gradients of the heads are not clipped. A parameter is shared if at least two tasks have
            reached it, in this step or an earlier one. The authors of FAMO, FairGrad and Nash-MTL use 1 in their code.
        then: A number of steps and the optimizer that takes over after these steps, without the scheduler. The
            optimizer may be `torch.optim.LBFGS`, whose line search evaluates the loss of the batch several times.
            Gradients are then not clipped, and the balancer's weights are fixed during the line search and multiply
            the gradients of the heads, too. LBFGS estimates the curvature from successive steps, and the estimate is
            poor if batches or balancer weights differ much from step to step. Large batches or fixed points are best.

    Raises:
        UserError: If a value is invalid, or if the scheduler is a `ReduceLROnPlateau` and the interval isn't `epoch`.
    """

    scheduler: LRScheduler | None = None
    interval: str = "step"
    clip_norm: float | None = None
    clip_shared_norm: float | None = None
    then: tuple[int, Optimizer] | None = None

    def __post_init__(self) -> None:
        if self.interval not in INTERVALS:
            raise UserError(f"interval: '{self.interval}' is not one of {', '.join(INTERVALS)}")
        for name, limit in (("clip_norm", self.clip_norm), ("clip_shared_norm", self.clip_shared_norm)):
            if limit is not None and not limit > 0:
                raise UserError(f"trainer.{name} is {limit}; it must be above 0, or None")
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.interval == "step":
            raise UserError(
                "scheduler: ReduceLROnPlateau needs a validation metric, which is known once an epoch; set its "
                "interval to epoch"
            )
