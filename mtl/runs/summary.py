"""Summarises a finished run, on one screen and as data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mtl import tags
from mtl.data.lanes import length_of
from mtl.quoting import command, evaluating, viewing
from mtl.runs.fingerprint import fingerprints
from mtl.runs.passes import passes_of
from mtl.training.gallery import as_lists

if TYPE_CHECKING:
    from mtl.data import Sources, Splits
    from mtl.training.figures import Kind
    from mtl.training.trainer import Trainer
    from mtl.training.validation import Figures, Matrices

MOST_PAIRS = 5  # the most pairs of tasks that the summary describes
FEW = 8  # fewer measured steps don't allow a conclusion about a pair of tasks


@dataclass
class Run:
    """A finished run.

    Args:
        trainer: The trainer, after `fit`.
        splits: The data.
        test: The metrics of the best parameters on the test split.
        labelled: The number of labelled samples of each task.
        kinds: The kind of each metric, by `task/metric`.
        folder: The folder of the run, as a user would type it.
        arguments: The command-line arguments.
        config: The whole config.
        matrices: The matrices of the best parameters on the test split, such as confusion matrices, by task and metric.
    """

    trainer: "Trainer"
    splits: "Splits | Sources"
    test: "Figures"
    labelled: dict[str, int]
    kinds: "Mapping[str, Kind]"
    folder: str
    arguments: list[str]
    config: dict[str, Any]
    matrices: "Matrices" = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return [task.name for task in self.trainer.step.tasks]

    def mean(self, tag: str) -> float | None:
        """Returns the mean over the steps in which the tag was measured, without undefined values."""
        values = self.values(tag)
        return fmean(values) if values else None

    def last_weights(self) -> dict[str, float | None]:
        """Returns each task's gradient weight in the last step."""
        return {task: self.trainer.readings.weights.get(tags.weight(task)) for task in self.tasks}

    def values(self, tag: str) -> list[float]:
        """Returns the values that were measured under the tag."""
        return [m[tag] for m in self.trainer.readings.measured if tag in m and math.isfinite(m[tag])]

    def cosines(self) -> dict[str, dict[str, float]]:
        """Returns, for each pair of tasks, the mean cosine and the share of measured steps with a negative cosine."""
        return {
            tags.pair(first, second): {
                "mean": fmean(values),
                "below_zero": sum(value < 0 for value in values) / len(values),
                "steps": len(values),
            }
            for (first, second), values in self.trainer.readings.cosines().items()
        }

    def measuring_oftener(self) -> int | None:
        """Returns a smaller log.every that measures enough steps in a run of this length; None if there is none."""
        every = max(self.trainer.global_step // (2 * FEW), 1)
        return every if every < self.config["log"]["every"] and self.trainer.global_step // every >= FEW else None

    def samples(self) -> dict[str, int]:
        """Returns the number of samples in each split, of all sources together, without splits of unknown length."""
        counts: dict[str, int] = {}
        for split, dataset in self.splits.items():
            if (length := length_of(dataset)) is not None:
                counts[split] = counts.get(split, 0) + length
        return counts

    def unreached(self) -> list[str]:
        """Returns the trainable parameters that no task's loss reached in any step."""
        parameters, without = self.trainer.step.parameters, self.trainer.readings.without_gradient
        return [name for name, parameter in parameters.items() if parameter.requires_grad and name in without]

    def figures(self) -> dict[str, Any]:
        """Returns the run as plain data, for metrics.json."""
        trainer, recent = self.trainer, len(self.trainer.selection.recent)
        matrices = {"val": trainer.selection.best_matrices, "test": self.matrices}
        return {
            "data": self.splits.summary(),
            "steps": trainer.global_step,
            "epochs": trainer.epoch,
            "seconds_per_step": trainer.seconds_per_step,
            "passes": trainer.step.passes.kind,
            "memory_per_step": trainer.costs.memory_per_step,
            "best": {
                "epoch": trainer.selection.best_epoch,
                "monitor": str(trainer.selection.monitor),
                "value": trainer.selection.best,
                "mode": trainer.selection.monitor.mode if trainer.selection.monitor else None,
            },
            "kinds": {name: kind.mode for name, kind in self.kinds.items()},
            "samples": self.samples(),
            "labelled": self.labelled,
            "fingerprints": fingerprints(self.splits.items()),
            "train": {task: {"loss": loss} for task, loss in trainer.readings.epoch_losses.items()},
            "val": trainer.selection.figures,
            **({"last": trainer.selection.mean(), "last_epochs": recent} if recent else {}),
            "test": self.test,
            **as_lists(trainer.step.tasks, matrices, self.splits.facts),
            "grad_norm": {task: self.mean(tags.grad_norm(task)) for task in [*self.tasks, "total"]},
            "weight": {task: self.mean(tags.weight(task)) for task in self.tasks},
            "weight_last": self.last_weights(),
            "measured_steps": len(self.trainer.readings.measured),
            "balancer": self.config["balancer"]["_target_"],
            "cosine": self.cosines(),
            "unreached": self.unreached(),
            "skipped_steps": trainer.tried - trainer.global_step,
        }


def summarise(console: Console, run: Run) -> None:
    """Prints the run's results, an interpretation, the limits of the results, and commands for the next steps."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    trainer = run.trainer
    best = f"best.pt is from epoch {trainer.selection.best_epoch} of {trainer.epoch}"
    decided = f", by the validation's {decision(trainer)}" if trainer.selection.best is not None else ""
    say(f"{best}{decided}.")
    measured = {f"{split}, best.pt": f for split, f in (("val", trainer.selection.figures), ("test", run.test)) if f}
    recent = len(trainer.selection.recent)
    last = f"val, epochs {trainer.epoch + 1 - recent}–{trainer.epoch}"
    console.print(
        table_of(
            {f"train, epoch {trainer.epoch}": {t: {"loss": x} for t, x in trainer.readings.epoch_losses.items()}}
            | measured
            | ({last: trainer.selection.mean()} if recent else {}),
            {
                "gradient norm": {task: run.mean(tags.grad_norm(task)) for task in run.tasks},
                "weight, last": run.last_weights(),
            },
        )
    )
    names = " and ".join(split.split(",")[0] for split in measured)
    apart = f"; {names} are of best.pt" if " " in names else f"; {names} is of best.pt" if names else ""
    apart += f"; the column {last} has the means of these validations" if recent else ""
    say(
        f"The training losses are means over the steps of epoch {trainer.epoch}, while the parameters were "
        f"changing{apart}. Gradient norms are means over all measured steps.\n"
    )
    cosines = sorted(run.cosines().items(), key=lambda item: item[1]["mean"])
    oftener = run.measuring_oftener()
    for pair, cosine in cosines[:MOST_PAIRS]:
        what = meaning(cosine["mean"], cosine["below_zero"], int(cosine["steps"]), oftener)
        say(f"{pair.replace('~', ' and ')}: {what}")
    if len(cosines) > MOST_PAIRS:
        say(f"These are the lowest of {len(cosines)} pairs; metrics.json has all of them.")
    if len(run.tasks) > 1 and not run.cosines():
        if any(len(tasks) > 1 for tasks in trainer.readings.reach.values()):
            say("No step had two tasks whose gradients could be compared: the tasks alternate between steps.")
        else:
            say("No parameter is shared, so the tasks neither help nor hinder each other.")
    seconds = trainer.seconds_per_step
    taken = f"; {1e3 * seconds:.2f} ms a step, logging included" if seconds is not None else ""
    say(f"Passes: {passes_of(trainer.step, run.config)}{taken}.")
    balancing = trainer.step.balancing
    if balancing.collects:
        each = f"every {balancing.settings.every} steps" if balancing.settings.every > 1 else "each step"
        say(f"{type(balancing.balancer).__name__} takes every task's gradient {each} ({balancing.source}).")
    say(f"Trainable parameters that no task reached: {', '.join(run.unreached()) or 'none'}.")
    if trainer.tried > trainer.global_step:
        say(f"{trainer.tried - trainer.global_step} steps were skipped, since fp16 gradients overflowed.")
    say(trust(run))
    say("")
    for purpose, line in next_steps(run):
        console.print(f"{purpose:<22}{line}", highlight=False, markup=False, soft_wrap=True)


def decision(trainer: "Trainer") -> str:
    """Describes the monitored metric and its best value, and the terms of that value if they are scaled."""
    assert trainer.selection.monitor is not None
    text = f"{trainer.selection.monitor}: {trainer.selection.best:.4f}"
    terms = trainer.selection.monitor.terms(trainer.selection.figures)
    return f"{text} = {terms}" if terms else text


def table_of(splits: "Mapping[str, Figures]", more: Mapping[str, Mapping[str, float | None]] | None = None) -> Table:
    """Returns a table with one row per metric of a task and one column per split.

    Args:
        splits: The metrics of each split.
        more: Further columns of values by task.
    """
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("task")
    table.add_column("figure", no_wrap=True)
    for name in (*splits, *(more or {})):
        table.add_column(name, justify="right")
    tasks = dict.fromkeys(task for figures in splits.values() for task in figures)
    for task in tasks:
        names = dict.fromkeys(name for figures in list(splits.values())[::-1] for name in figures.get(task, {}))
        for row, name in enumerate(names):
            values = [splits[split].get(task, {}).get(name) for split in splits]
            values += [column.get(task) if row == 0 else None for column in (more or {}).values()]
            table.add_row(task if row == 0 else "", name, *("" if v is None else f"{v:.4g}" for v in values))
    return table


def written(folder: Path) -> list[str]:
    """Returns the files of the run; event files and the files of W&B are each combined to one entry."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    several = {"events.out.": "events.out.tfevents.*", "wandb/": "wandb/"}
    return list(dict.fromkeys(next((n for start, n in several.items() if f.startswith(start)), f) for f in files))


def meaning(mean: float, below_zero: float, steps: int, oftener: int | None) -> str:
    """Returns one sentence on two tasks' gradients over the shared parameters.

    Args:
        mean: The mean of the cosines.
        below_zero: The share of negative cosines.
        steps: The number of measured steps.
        oftener: A log.every that would measure enough steps, or None.
    """
    figures = f"mean cosine {mean:+.2f}, below zero in {below_zero:.0%} of {steps} measured steps"
    if steps < FEW:
        hint = f"; log.every={oftener} measures more often" if oftener else ""
        return f"{figures}: too few steps for a conclusion{hint}."
    if mean < -0.1:
        return f"{figures}: a step for one mostly undoes some of the other's; try a balancer, or separate models."
    if mean > 0.1:
        return f"{figures}: a step for one mostly helps the other; sharing suits them."
    return f"{figures}: their gradients are nearly at right angles, so they hardly affect each other."


def trust(run: Run) -> str:
    """Describes how far the metrics can be trusted."""
    text = f"One seed ({run.config['seed']})"
    tested = [length_of(dataset) for split, dataset in run.splits.items() if split == "test"]
    sizes = [length for length in tested if length is not None]
    if sizes and run.test:
        text += f", {' and '.join(f'{each:,}' for each in sizes)} test samples"
        few = {task: count for task, count in run.labelled.items() if 0 < count < min(sizes)}
        if few:
            text += f" ({', '.join(f'{count:,} with a label of {task}' for task, count in few.items())})"
        errors = [
            math.sqrt(value * (1 - value) / run.labelled[task])
            for task, figures in run.test.items()
            for name, value in figures.items()
            if "accuracy" in name and "." not in name and 0 < value < 1 and run.labelled.get(task)
        ]
        if errors:
            text += (
                f": an accuracy is uncertain by about ±{max(errors):.3f} (one standard error) from the samples alone"
            )
    return f"{text}. Before you compare methods, run several seeds: -m seed=0,1,2."


def next_steps(run: Run) -> list[tuple[str, str]]:
    """Returns commands for the next steps, each with a description."""
    arguments = [a for a in run.arguments if not a.lstrip("+").startswith("resume")]
    available = [split for split, _ in run.splits.items()]
    split = [] if "test" in available else ["split=val"] if "val" in available else ["split=train"]
    commands = [("evaluate", evaluating(run.folder, run.arguments, *split))]
    if any(Path(run.folder).glob("events.out.tfevents.*")):
        commands.insert(0, ("view", viewing(run.folder)))
    if len(run.tasks) > 1:
        for task in run.tasks[:4]:
            commands.append((f"{task} alone", command("python", "-m", "mtl.train", *arguments, f"only={task}")))
    return commands
