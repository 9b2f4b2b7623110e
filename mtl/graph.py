"""python -m mtl.graph task=…: shows the graphs of one batch and their memory over a step, without training."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtl import cli, schema
from mtl.cli.record import folder_name, report
from mtl.errors import UserError, first_line, is_out_of_memory
from mtl.quoting import viewing
from mtl.safety.regular import check_folder

if TYPE_CHECKING:
    from graphviz import Digraph
    from rich.console import Console

    from mtl.build import Built
    from mtl.graphs import Life, Walk
    from mtl.graphs.text import Grid


def graph(composed: DictConfig) -> None:
    """Shows the graphs of the problem that the config describes; writes tables and pictures to Hydra's folder.

    Raises:
        UserError: If the config is invalid, or if the first training step would fail.
    """
    config, options = schema.check_graph(composed)  # check the config before the slow import of torch
    if config["resume"] is not None:
        raise UserError("resume: mtl.graph doesn't train, so it can't resume a run; init_from=… is possible")
    from mtl.process.seeding import num_threads

    try:
        with cli.naming_origins(), num_threads(config["threads"]):
            folder = Path(HydraConfig.get().runtime.output_dir)
            check_folder(folder)
            _graph(config, options, folder)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        line = f"out of memory: {first_line(error)}. A smaller data.batch_size has the same graph"
        raise UserError(line) from error


def _graph(config: dict[str, Any], options: dict[str, Any], folder: Path) -> None:
    """Builds the problem as for training, inspects the graphs of one step, and writes and prints the results."""
    from mtl.graphs import text
    from mtl.process.screen import Screen
    from mtl.step.passes import choose

    console = Screen()
    problem, batch = built(config, console)
    config, model = problem.config, problem.model
    chosen = choose(config["passes"], model)
    pictures = Pictures(console)
    walk, reach = inspect(problem, batch, pictures)
    if not walk.seen:
        raise UserError("no task has labels in the first batch, so there is no graph")
    lives, refused = memory(problem, batch)

    text.write_leaves(walk, folder / "leaves.csv")
    text.write_life(lives, folder / "life.csv")
    of_leaves = text.notes(walk, reach, model.frozen_until)
    of_life = [text.peaks(lives, chosen)] if lives else []
    of_life += [f"No measurement for {kind} passes: {why}." for kind, why in refused.items()]
    whole = [text.leaves(walk, None).markdown(), *of_leaves, text.life(lives, None).markdown(), *of_life]
    (folder / "graph.md").write_text("\n\n".join(whole), encoding="utf-8")
    show(console, text.leaves(walk), of_leaves, "leaves.csv")
    show(console, text.life(lives), of_life, "life.csv")
    pictures.draw(walk, lives, folder)
    if options["tensorboard"]:
        write_events(lives, "\n\n".join(whole), folder)
    written = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    shown = folder_name(folder)
    report(console, f"Written to {shown}: {text.listed(written, 2 * text.MODULES)}")
    if options["tensorboard"]:
        report(console, f"view     {viewing(shown)}")
    if chosen in refused:
        raise refused[chosen]


def built(config: dict[str, Any], console: "Console") -> "tuple[Built, Any]":
    """Returns the problem and the first training batch."""
    from mtl.build import build

    for line in cli.shadowed():
        report(console, f"warning  {line}")
    for line in cli.left_out():
        report(console, f"note     {line}")
    problem = build(config, code_folders=cli.code_folders(), report=lambda line: report(console, line))
    problem.model.train()
    batches: Any = problem.loaders["train"].batches(1)
    with closing(batches):  # ends the worker processes
        batch = next(batches)
    report(console, f"data     {problem.splits.summary()}")
    report(
        console, f"batch    {next(problem.loaders['train'].sizes(1)):,} samples, the first of epoch 1; no step is taken"
    )
    return problem, batch


def inspect(problem: "Built", batch: Any, pictures: "Pictures") -> "tuple[Walk, Mapping[str, Sequence[str]]]":
    """Inspects the graphs of one joint step; returns the graphs, and for each parameter the tasks with a gradient."""
    from mtl.graphs import Walk, backward
    from mtl.step import Step

    walk = Walk(problem.model, [task.name for task in problem.tasks], batch, pictures.take)
    pictures.named = walk.named()
    micro_batches = {key: problem.config["trainer"][key] for key in ("micro_batch_size", "num_micro_batches")}
    step = Step(problem.model, problem.tasks, passes="joint", precision=problem.config["precision"], **micro_batches)
    with walk.recording():
        result = backward(step, batch, walk, measure=True)
    return walk, result.reach or {}


def memory(problem: "Built", batch: Any) -> "tuple[dict[str, Life], dict[str, UserError]]":
    """Returns the memory over a step for each kind of passes, and the errors of the kinds that fail."""
    from mtl.choices import PASSES
    from mtl.config.training import build_step
    from mtl.graphs import Life, backward, living_anyway
    from mtl.step.passes import choose

    config, model = problem.config, problem.model
    lives: dict[str, Life] = {}
    refused: dict[str, UserError] = {}
    for kind in PASSES:
        settings = {**config, "passes": kind, "model": {**config["model"], "compile": False}}
        if kind != choose(config["passes"], model):
            settings["gradients"] = {**config["gradients"], "source": "auto"}  # the kind may not support the source
        life = Life(living_anyway(model, batch))
        try:
            step = build_step(settings, model, problem.tasks, problem.total_steps)
            with life.counting():
                backward(step, batch, life)
            lives[kind] = life
        except UserError as error:
            refused[kind] = error
    return lives, refused


class Pictures:
    """Draws pictures of graphs, as far as the required packages are installed.

    Args:
        console: The console on which missing packages are reported.

    Attributes:
        named: The parameters whose names the pictures show.
    """

    def __init__(self, console: "Console") -> None:
        from mtl.graphs import pictures

        self._console = console
        self._missing = pictures.missing()
        self._taken: dict[str, Digraph] = {}
        self.named: Mapping[str, Any] = {}

    def take(self, task: str, loss: Any) -> None:
        """Records the task's graph with torchviz while the graph is alive."""
        from mtl.graphs import pictures

        if self._missing is None:
            try:
                self._taken[task] = pictures.of_task(task, loss, self.named)
            except Exception as error:  # torchviz may fail on unusual graphs
                report(self._console, f"warning  torchviz can't draw the graph of {task}: {first_line(error)}")

    def draw(self, walk: "Walk", lives: "Mapping[str, Life]", folder: Path) -> None:
        """Draws all pictures that can be drawn, and reports the others."""
        from mtl.graphs import pictures, plot

        if lives:
            plot.plot(lives, folder / "life.svg")
        if self._missing is not None:
            report(self._console, f"warning  {self._missing}")
            return
        everything = {"graph": pictures.of_all(walk)} | {f"graph_{task}": each for task, each in self._taken.items()}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {name: pool.submit(pictures.draw, each, folder / f"{name}.svg") for name, each in everything.items()}
        for name, job in jobs.items():
            try:
                job.result()
            except OSError as error:
                report(self._console, f"warning  no picture {name}: {first_line(error)}")


def write_events(lives: "Mapping[str, Life]", report: str, folder: Path) -> None:
    """Writes pictures, report and numbers as TensorBoard events."""
    import numpy as np
    from PIL import Image

    from mtl.loggers.events import summary_writer

    with summary_writer(folder) as writer:
        writer.add_text("graph", report)
        for path in sorted(folder.glob("*.png")):
            with Image.open(path) as picture:
                picture.thumbnail((4096, 4096))
                writer.add_image(path.stem, np.asarray(picture.convert("RGB")), dataformats="HWC")
        for kind, life in lives.items():
            writer.add_scalar(f"life_peak/{kind}", life.peak)
            for number, event in enumerate(life.events, start=1):
                writer.add_scalar(f"life/{kind}", event.alive, number)


def show(console: "Console", grid: "Grid", lines: "Sequence[str]", where: str) -> None:
    """Prints a table and sentences about it."""
    console.print(grid.rich())
    if grid.left_out:
        report(console, f"  … and {grid.left_out} more rows in {where}")
    for line in lines:
        console.print(line, highlight=False, markup=False)
    console.print()


if __name__ == "__main__":
    cli.launch(graph, "graph")
