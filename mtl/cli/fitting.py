"""Runs the training and explains what can end it early."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from mtl.cli.record import folder_name, report
from mtl.errors import UserError, dead_worker, describe_error, first_line, is_of_backward, is_out_of_memory, text_of
from mtl.quoting import as_path, command, override

if TYPE_CHECKING:
    from mtl.step import StepResult
    from mtl.training.trainer import Trainer


def fit(trainer: "Trainer", folder: Path, console: Any) -> None:
    """Trains; explains in a sentence what ended the training early, with the command that resumes the run.

    Raises:
        UserError: See `explaining`.
    """
    try:
        with explaining(trainer):
            trainer.fit()
    except (UserError, RuntimeError, MemoryError):
        if trainer.saved_step and trainer.writer.is_there():
            again = command(override("resume", as_path(folder_name(folder))))
            report(console, f"saved    step {trainer.saved_step}; once the problem is solved, resume with {again}")
        raise


@contextmanager
def explaining(trainer: "Trainer") -> Iterator[None]:
    """Explains in a sentence what ends the training within the block.

    Raises:
        UserError: If a mistake of the user, exhausted memory, a dead worker process, a nondeterministic operation or a
            failing backward pass ends the training.
    """
    try:
        yield
    except (UserError, RuntimeError, MemoryError) as error:
        at = f"at step {trainer.global_step + 1}, in epoch {trainer.epoch}"
        place = at if trainer.epoch else "before the first step"
        if is_out_of_memory(error):
            line = f"out of memory {place}: {first_line(error)}. Split the batch with trainer.micro_batch_size"
            raise UserError(line) from error
        if died := dead_worker(error):
            memory = "" if "exit code" in died else "It may have run out of memory; "
            line = f"data: a process that loads samples died {place}: {died}"
            raise UserError(f"{line}. {memory}data.num_workers=0 loads without processes") from error
        if "deterministic" in text_of(error) and not isinstance(error, UserError):
            raise UserError(f"deterministic=true {place}: {first_line(error)}") from error
        if is_of_backward(error):
            raise UserError(
                f"the backward pass {place} failed: {describe_error(error)}. Check the losses, and the operations in "
                "the model"
            ) from error
        raise


def check_direction(trainer: "Trainer", result: "StepResult") -> None:
    """Checks that Optuna optimizes in the monitor's direction. Called after the first step, when the monitor exists.

    Raises:
        UserError: If Optuna optimizes in the other direction.
    """
    monitor = trainer.selection.monitor
    if trainer.global_step > 1 or monitor is None:
        return
    sweeper = HydraConfig.get().sweeper
    if "optuna" not in str(sweeper.get("_target_")):
        return
    direction = getattr(sweeper.direction, "name", sweeper.direction)
    right = {"max": "maximize", "min": "minimize"}[monitor.mode]
    if direction != right:
        raise UserError(f"the sweep would {direction} {monitor}; give hydra.sweeper.direction={right}")
