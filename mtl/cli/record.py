"""Prints and writes information about a run: status, versions, log, and how to resume it."""

import json
import logging
import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from mtl import cli, quoting
from mtl.cli import processes, sweep
from mtl.errors import UserError
from mtl.files import Folder, LogFile, why, write_whole
from mtl.process.signals import Ended
from mtl.text import log

if TYPE_CHECKING:
    from rich.console import Console

    from mtl.build import Built
    from mtl.step import Step
    from mtl.training.trainer import Trainer

ROOM = 2**14  # bytes reserved in metrics.json


def terminal() -> "Console":
    """Returns the terminal; it is quiet in parallel jobs of a multirun, whose lines would mix."""
    from mtl.process.screen import Screen

    return Screen(quiet=cli.runs_in_parallel())


def report(console: Any, line: str) -> None:
    """Prints a line without wrapping it to the terminal's width, and adds it to the run's log."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)
    log.info("%s", line)


def folder_name(folder: Path) -> str:
    """Returns the folder as a user would type it in the current folder."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def write_status(folder: Folder, status: str, **more: Any) -> None:
    """Writes the run's metrics.json with the run's options, the status, and further entries.

    The file of a running run reserves space for the final status, in case the disk is full by then.

    Args:
        folder: The folder of the run.
        status: The status, such as running or finished.
        more: Further entries of the file.

    Raises:
        UserError: If the file can't be written, or if the folder no longer exists.
    """
    folder.check()
    about = {
        "status": status,
        "problem": choices()["task"],
        "choices": choices(),
        "arguments": cli.arguments(),
        "launcher": HydraConfig.get().runtime.choices["hydra/launcher"],
    }
    path = folder.path / "metrics.json"
    try:
        write_whole(path, json.dumps(about | more, indent=2) + "\n", room=ROOM if status == "running" else 0)
    except OSError as error:
        raise UserError(f"{path} can't be written: {why(error)}") from error


def failed(began: list[Folder], error: str) -> None:
    """Writes the status `failed`, if this process began the run."""
    for folder in began:
        with suppress(UserError):  # the original error is reported in any case
            write_status(folder, "failed", error=error)


def add_to_log(text: str) -> None:
    """Adds text to the run's log without changing it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogFile):
            handler.add(text)


def choices() -> dict[str, str]:
    """Returns the chosen option of each group of the config."""
    chosen = {str(group): option for group, option in HydraConfig.get().runtime.choices.items()}
    return {group: option for group, option in chosen.items() if "hydra" not in group and isinstance(option, str)}


def swept(folder: Path) -> list[str]:
    """Returns those overrides of the job that the multirun sweeps over."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return []
    fixed = sweep.fixed(folder.parent)
    overrides = [override for override in HydraConfig.get().overrides.task if override not in fixed]
    return [o for o in overrides if not sweep.makes_no_difference(o)]  # may change when a multirun is resumed


def versions() -> dict[str, Any]:
    """Returns the versions and settings besides the config on which results may depend."""
    import numpy
    import torch

    import mtl

    return {
        "mtl": mtl.__version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def announce(console: Any, problem: "Built", step: "Step", folder: Path) -> None:
    """Reports what is about to be trained, and which options of the config have no effect."""
    from mtl.config.training import without_effect
    from mtl.runs.passes import passes_of

    config, model = problem.config, problem.model
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = "" if trained == count else f", {count - trained:,} of them frozen"
    report(console, f"data     {problem.splits.summary()}")
    for line in problem.splits.warnings:
        report(console, f"warning  {line}")
    for loader, _ in problem.loaders["train"].by_source():
        for line in loader.stream.notes() if loader.stream is not None else ():
            report(console, f"note     {line}")
    report(console, f"model    {count:,} parameters{frozen}; tasks: {', '.join(t.name for t in problem.tasks)}")
    for line in without_effect(config, step, problem.loaders["train"], problem.total_steps):
        report(console, f"warning  {line}")
    report(console, f"passes   {passes_of(step, config)}")
    threads = f" with {config['threads']} thread{'s'[: config['threads'] > 1]}" if problem.device.type == "cpu" else ""
    together = f", {processes.count()} processes" if processes.count() > 1 else ""
    how = f"seed {config['seed']}, {problem.device}{threads}, {config['precision']}{together}"
    report(console, f"run      {folder_name(folder)}  ({how})")


def stopped(console: Any, trainer: "Trainer", home: Folder, code: int) -> NoReturn:
    """Reports after Ctrl-C or SIGTERM what was saved and how to resume; ends the process or the job."""
    saved = folder_name(home.path)
    checkpoints = sorted(str(path) for path in Path(saved).glob("checkpoints/*.pt"))
    place = {"steps": trainer.global_step, "epochs": trainer.epoch}
    with suppress(UserError):
        write_status(home, "stopped", **place)
    at = f"at step {trainer.global_step}, in epoch {trainer.epoch}"
    older = "" if trainer.saved_step == trainer.global_step else f" (of step {trainer.saved_step})"
    report(console, f"Stopped {at}. Saved: {', '.join(checkpoints) or 'nothing yet'}{older if checkpoints else ''}")
    if checkpoints and HydraConfig.get().mode == RunMode.RUN:
        report(console, f"resume    {quoting.resuming(cli.arguments(), saved)}")
    if checkpoints:
        report(console, f"view      {quoting.viewing(saved)}")
        report(console, f"evaluate  {quoting.evaluating(saved, cli.arguments(), 'checkpoint=last')}")
    raise Ended(code)
