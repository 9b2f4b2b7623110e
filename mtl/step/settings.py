"""Settings of a step that belong together, in small groups."""

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mtl.choices import INTERVALS, SOURCES
from mtl.errors import UserError


@dataclass(frozen=True)
class Gradients:
    """How a balancer gets the Gramian of the tasks' gradients.

    Args:
        source: where it comes from, see gradients/at_features.py: `rows`, `layerwise`, `representation`, or `auto`:
            `layerwise` where that is possible, else `rows`, both exact.
        every: steps from one Gramian to the next; between them the weights stay.

    Raises:
        UserError: for a value that there isn't.
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
    """What goes with the optimizer when the parameters move.

    Args:
        scheduler: of the learning rate.
        interval: when the scheduler steps: after each optimizer `step`, or after each `epoch`, in `Step.epoch_end`;
            `ReduceLROnPlateau` then does in `Step.validated`.
        clip_norm: the norm that the summed gradient is clipped to.
        clip_shared_norm: the norm that the summed gradient over the shared parameters is clipped to, before
            `clip_norm`; heads stay as they are. Shared are parameters that at least two tasks have reached, in this
            step or an earlier one. FAMO, FairGrad and Nash-MTL do so at 1 in their authors' code.
        then: from how many steps on which other optimizer takes over, without the scheduler. It may be
            `torch.optim.LBFGS`, whose line search evaluates the batch's loss again and again. Nothing is clipped then,
            and the balancer's weights are held fixed and multiply heads too. It takes curvature from one step to the
            next: batches, and with a balancer weights, that differ much spoil it; large batches or fixed points serve
            it best.

    Raises:
        UserError: for a value that there isn't, and for a `ReduceLROnPlateau` whose interval isn't `epoch`.
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
                "scheduler: ReduceLROnPlateau waits for figures on validation, which come once an epoch; set its "
                "interval to epoch"
            )
