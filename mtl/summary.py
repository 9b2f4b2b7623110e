"""What a finished run has to say: one screen, and the same as data."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mtl.data import Splits
    from mtl.trainer import Trainer
    from mtl.validation import Figures

COSTS = {
    "joint": "one trunk forward and backward a step, all graphs alive at once",
    "sequential": "{trunks} trunk forwards and backwards a step, one task's graph alive at a time",
    "shared": "one trunk forward and backward a step, one head's graph alive at a time",
}


@dataclass
class Run:
    """A finished run.

    Args:
        trainer: after `fit`.
        splits: the data.
        test: the best parameters' figures on the test split.
        folder: of the run, as one would type it.
        overrides: the command line's.
        config: the whole config.
    """

    trainer: "Trainer"
    splits: "Splits"
    test: "Figures"
    folder: str
    overrides: list[str]
    config: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return [task.name for task in self.trainer.step.tasks]

    def mean(self, tag: str) -> float | None:
        """The mean over the steps in which the tag was measured, undefined values left out."""
        values = self.values(tag)
        return fmean(values) if values else None

    def values(self, tag: str) -> list[float]:
        """What was measured under the tag."""
        return [m[tag] for m in self.trainer.measured if tag in m and math.isfinite(m[tag])]

    def cosines(self) -> dict[str, dict[str, float]]:
        """Per pair of tasks the mean cosine and the share of measured steps in which it was below zero."""
        pairs = dict.fromkeys(tag for m in self.trainer.measured for tag in m if tag.startswith("cosine/"))
        return {
            tag.removeprefix("cosine/"): {"mean": fmean(v), "below_zero": sum(c < 0 for c in v) / len(v)}
            for tag in pairs
            if (v := self.values(tag))
        }

    def unreached(self) -> list[str]:
        """Trainable parameters that no task's loss reached in any measured step."""
        parameters = self.trainer.step.parameters
        return [name for name, tasks in self.trainer.reach.items() if not tasks and parameters[name].requires_grad]

    def figures(self) -> dict[str, Any]:
        """The run as plain data, for metrics.json."""
        trainer = self.trainer
        return {
            "status": "finished",
            "overrides": self.overrides,
            "data": self.splits.summary(),
            "steps": trainer.global_step,
            "epochs": trainer.epoch,
            "seconds_per_step": trainer.seconds_per_step,
            "passes": trainer.step.passes,
            "best": {"epoch": trainer.best_epoch, "monitor": str(trainer.monitor), "value": trainer.best},
            "train": {task: {"loss": loss} for task, loss in trainer.train_losses.items()},
            "val": trainer.figures,
            "test": self.test,
            "grad_norm": {task: self.mean(f"grad_norm/{task}") for task in [*self.tasks, "total"]},
            "weight": {task.name: task.weight for task in trainer.step.tasks},
            "cosine": self.cosines(),
            "unreached": self.unreached(),
            "skipped_steps": trainer.skipped,
        }


def summarise(console: Console, run: Run) -> None:
    """Prints the run's results, what they mean, how far to trust them, and what to do next."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    trainer = run.trainer
    best = f"best.pt is from epoch {trainer.best_epoch} of {trainer.epoch}"
    decided = f", by the validation's {trainer.monitor}: {trainer.best:.4f}" if trainer.best is not None else ""
    say(f"{best}{decided}.")
    console.print(
        table_of(
            {"train": {t: {"loss": loss} for t, loss in trainer.train_losses.items()}}
            | {split: f for split, f in (("val", trainer.figures), ("test", run.test)) if f},
            {
                "gradient norm": {task: run.mean(f"grad_norm/{task}") for task in run.tasks},
                "weight": {task.name: task.weight for task in trainer.step.tasks},
            },
        )
    )
    for pair, cosine in sorted(run.cosines().items(), key=lambda item: item[1]["mean"])[:5]:
        say(f"{pair.replace('~', ' and ')}: {meaning(cosine['mean'], cosine['below_zero'])}")
    if len(run.tasks) > 1 and not run.cosines():
        say("No parameter is shared, so the tasks neither help nor hinder each other.")
    cost = COSTS[trainer.step.passes].format(trunks=len(run.tasks))
    say(f"Passes: {trainer.step.passes}, {cost}; {1e3 * trainer.seconds_per_step:.2f} ms a step, logging included.")
    say(f"Trainable parameters that no task reached: {', '.join(run.unreached()) or 'none'}.")
    if trainer.skipped:
        say(f"{trainer.skipped} steps were skipped, since fp16 gradients overflowed.")
    say(trust(run))
    say("")
    folder = shlex.quote(run.folder)
    for purpose, command in next_steps(run, folder):
        console.print(f"{purpose:<22}{command}", highlight=False, markup=False, soft_wrap=True)
    files = "config.yaml, train.log, metrics.csv, metrics.json, tensorboard/, checkpoints/best.pt, checkpoints/last.pt"
    say(f"\nWritten to {run.folder}: {files}")


def table_of(splits: "Mapping[str, Figures]", more: Mapping[str, Mapping[str, float | None]] | None = None) -> Table:
    """A table with a row for each task and a column for each split's figures."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column("task")
    columns = {(s, name): None for s, figures in splits.items() for named in figures.values() for name in named}
    for split, name in columns:
        table.add_column(f" {split}\n {name}", justify="right")
    for name in more or {}:
        table.add_column("\n".join(f" {word}" for word in name.split()), justify="right")
    tasks = dict.fromkeys(task for figures in splits.values() for task in figures)
    for task in tasks:
        values = [splits[split].get(task, {}).get(name) for split, name in columns]
        values += [column.get(task) for column in (more or {}).values()]
        table.add_row(task, *("" if value is None else f" {value:.4g}" for value in values))
    return table


def meaning(mean: float, below_zero: float) -> str:
    """One sentence on two tasks' gradients over the shared parameters."""
    figures = f"mean cosine {mean:+.2f}, below zero in {below_zero:.0%} of the measured steps"
    if mean < -0.1:
        return f"{figures}: a step for one mostly undoes some of the other's; try a balancer, or separate models."
    if mean > 0.1:
        return f"{figures}: a step for one mostly helps the other; sharing suits them."
    return f"{figures}: their gradients are nearly at right angles, so they mostly leave each other alone."


def trust(run: Run) -> str:
    """How far the figures can be trusted."""
    text = f"One seed ({run.config['seed']})"
    if run.splits.test is not None and run.test:
        size = len(run.splits.test)  # type: ignore[arg-type]  # Dataset declares no length
        text += f", {size:,} test samples"
        shares = [v for figures in run.test.values() for name, v in figures.items() if "accuracy" in name and 0 < v < 1]
        if shares:
            error = max(math.sqrt(v * (1 - v) / size) for v in shares)
            text += f": an accuracy is uncertain by about ±{error:.3f} (one standard error) from the samples alone"
    return f"{text}. Before you compare methods, run several seeds: -m seed=0,1,2."


def next_steps(run: Run, folder: str) -> list[tuple[str, str]]:
    """Commands that go on from here, each with what it is for."""
    given = " ".join(shlex.quote(override) for override in run.overrides)
    commands = [
        ("look", f"tensorboard --logdir {folder}"),
        ("evaluate", f"python -m mtl.evaluate run={folder}"),
    ]
    if len(run.tasks) > 1:
        for task in run.tasks[:4]:
            others = " ".join(shlex.quote(f"~tasks.{other}") for other in run.tasks if other != task)
            commands.append((f"{task} alone", f"python -m mtl.train {given} {others}"))
    return commands
