"""Shows the progress of the training on the terminal: a live line, or plain lines if output is redirected."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from mtl import tags
from mtl.loggers.logger import Logger

if TYPE_CHECKING:
    from mtl.step import StepResult
    from mtl.training.trainer import Trainer

REFRESH = 0.2  # seconds between updates of the live line
PLAIN = 10.0  # seconds between plain lines within an epoch


class Terminal(Logger):
    """Shows epoch, step, samples per second, and each task's loss and main metric. It is both a logger and a callback.

    Args:
        console: The console; a progress bar is shown if it is a terminal.
        tasks: The names of the tasks.
        mains: The name of each task's main metric, for tasks that have one.
        total_steps: The number of steps in the whole run.
        max_epochs: The number of epochs in the whole run.
    """

    def __init__(
        self, console: Console, tasks: Sequence[str], mains: Mapping[str, str], total_steps: int, max_epochs: int
    ) -> None:
        self._console = console
        self._tasks = tasks
        self._mains = mains
        self._total_steps = total_steps
        self._max_epochs = max_epochs
        self._losses: dict[str, float] = {}
        self._losses_at = 0  # the step of these losses, or the last step of their mean
        self._scalars: dict[str, float] = {}
        self._shown = time.monotonic()
        self._progress: Progress | None = None
        self._bar: Any = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                *([BarColumn(bar_width=10)] if console.width >= 100 else []),
                MofNCompleteColumn(),
                TextColumn(
                    "{task.fields[figures]}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=console,
                auto_refresh=False,  # a refreshing thread would slow down the training
                transient=True,
                expand=True,
            )
            self._progress.start()
            self._bar = self._progress.add_task("epoch 1", total=total_steps, figures="")

    def __call__(self, trainer: "Trainer", result: "StepResult") -> None:
        """Advances the progress bar, if the update interval has passed."""
        now = time.monotonic()
        if now - self._shown < REFRESH:
            return
        if self._progress is None and now - self._shown <= PLAIN:
            return
        values = torch.stack([loss.double() for loss in result.losses.values()]).tolist() if result.losses else []
        self._losses, self._losses_at = dict(zip(result.losses, values, strict=True)), trainer.global_step
        if self._progress is not None:
            self._draw(trainer.global_step, trainer.epoch)
        else:
            self._line(trainer.global_step, trainer.epoch)

    def log(self, step: int, epoch: int, scalars: Mapping[str, float]) -> None:
        """Stores new metrics, and shows them if they are from validation."""
        self._scalars |= scalars
        losses = {task: scalars[tag] for task in self._tasks if (tag := tags.loss(task, "train")) in scalars}
        if losses:
            self._losses, self._losses_at = losses, step
        if self._progress is not None:
            self._draw(step, epoch)
        elif tags.MONITOR in scalars:
            self._line(step, epoch)

    def close(self) -> None:
        """Removes the progress bar."""
        if self._progress is not None:
            self._progress.stop()

    def _figures(self, step: int) -> str:
        """Returns the losses of this step (or means up to it), the latest metrics, and the speed, as far as known."""
        losses = self._losses if self._losses_at == step else {}
        parts = []
        for task in self._tasks:
            main = self._main(task)
            metric = self._scalars.get(tags.metric(task, main, "val"))
            name = "" if self._progress is not None else f"{main} "  # the live line must be short
            figures = [f"{losses[task]:.4f}"] if task in losses else []
            figures += [f"({name}{metric:.3f})"] if metric is not None else []
            if figures:
                parts.append(" ".join([task, *figures]))
        speed = self._scalars.get(tags.SPEED)
        return ", ".join([*parts, *([f"{speed:,.0f} samples/s"] if speed is not None else [])])

    def _main(self, task: str) -> str:
        """Returns the name of the task's main figure, which is the first one of a metric with several figures."""
        main = str(self._mains.get(task))
        first, last = f"{tags.METRIC}/{task}/", "/val"
        several = (tag for tag in self._scalars if tag.startswith(f"{first}{main}.") and tag.endswith(last))
        alone = tags.metric(task, main, "val") in self._scalars
        return main if alone else next((tag.removeprefix(first).removesuffix(last) for tag in several), main)

    def _draw(self, step: int, epoch: int) -> None:
        assert self._progress is not None
        self._shown = time.monotonic()
        description = f"epoch {epoch}/{self._max_epochs}"
        self._progress.update(self._bar, completed=step, description=description, figures=self._figures(step))
        self._progress.refresh()

    def _line(self, step: int, epoch: int) -> None:
        self._shown = time.monotonic()
        place = f"epoch {epoch}/{self._max_epochs}, step {step}/{self._total_steps}"
        losses = "loss " if self._losses_at == step and self._losses else ""
        figures = self._figures(step)
        self._console.print(f"{place}: {losses}{figures}" if figures else place, highlight=False, soft_wrap=True)
