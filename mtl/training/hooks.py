"""The functions that a training calls after each step and each epoch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mtl.errors import FOREIGN, UserError, describe_error
from mtl.process.seeding import preserved_generators
from mtl.step import StepResult

if TYPE_CHECKING:
    from mtl.training.trainer import Trainer


@dataclass(frozen=True)
class Hooks:
    """Functions that are called after each step or epoch.

    Attributes:
        callbacks: Called with the trainer and the `StepResult` after each step. Random numbers that a callback draws
            don't affect the training, and a model that a callback leaves in eval mode returns to training mode.
        watchers: Called in the same way, without this protection, which takes about 0.1 ms per step. A watcher must not
            draw random numbers or change the model.
        after_epoch: Called with the trainer after each epoch's validation, with the same protection as the callbacks.
    """

    callbacks: Sequence[Callable[["Trainer", StepResult], None]] = ()
    watchers: Sequence[Callable[["Trainer", StepResult], None]] = ()
    after_epoch: Sequence[Callable[["Trainer"], None]] = ()

    def after_step(self, trainer: "Trainer", result: StepResult, number: int) -> None:
        """Calls the callbacks and the watchers.

        Args:
            trainer: The first argument of each function.
            result: The second argument.
            number: The number of the step, for messages.

        Raises:
            UserError: If a callback or watcher fails.
        """
        with protected(trainer.step.model) if self.callbacks else nullcontext():
            for callback in (*self.callbacks, *self.watchers):
                try:
                    callback(trainer, result)
                except FOREIGN as error:
                    name = getattr(callback, "__name__", type(callback).__name__)
                    raise UserError(f"callback {name} failed at step {number}: {describe_error(error)}") from error


@contextmanager
def protected(model: nn.Module) -> Iterator[None]:
    """Restores the random state and the training mode of the model at the end of the context."""
    with preserved_generators():
        yield
    if not model.training:
        model.train()
