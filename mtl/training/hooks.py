"""Functions that a training calls after each step and each epoch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mtl.errors import FOREIGN, UserError, told
from mtl.process.seeding import kept_random_state
from mtl.step import StepResult

if TYPE_CHECKING:
    from mtl.training.trainer import Trainer


@dataclass(frozen=True)
class Hooks:
    """The functions to be called.

    Attributes:
        callbacks: called with the trainer and the `StepResult` after each step. Random numbers that a callback draws
            change no draw of the training, and a model that a callback leaves in eval mode returns to training mode.
        watchers: called in the same way, without this protection, which takes about 0.1 ms a step. A watcher must not
            draw random numbers or change the model.
        after_epoch: called with the trainer after each epoch's validation; protected as the callbacks are.
    """

    callbacks: Sequence[Callable[["Trainer", StepResult], None]] = ()
    watchers: Sequence[Callable[["Trainer", StepResult], None]] = ()
    after_epoch: Sequence[Callable[["Trainer"], None]] = ()

    def after_step(self, trainer: "Trainer", result: StepResult, number: int) -> None:
        """Calls the callbacks and the watchers.

        Args:
            trainer: the first argument of each.
            result: the second.
            number: the number of the step, for messages.

        Raises:
            UserError: for a callback that fails.
        """
        with protected(trainer.step.model) if self.callbacks else nullcontext():
            for callback in (*self.callbacks, *self.watchers):
                try:
                    callback(trainer, result)
                except FOREIGN as error:
                    name = getattr(callback, "__name__", type(callback).__name__)
                    raise UserError(f"callback {name} failed at step {number}: {told(error)}") from error


@contextmanager
def protected(model: nn.Module) -> Iterator[None]:
    """Keeps the code inside from changing the training by accident, by random numbers that it draws or by eval mode."""
    with kept_random_state():
        yield
    if not model.training:
        model.train()
