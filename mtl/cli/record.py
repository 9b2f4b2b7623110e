"""What a run says and writes of itself: its status, what it was made with, how it goes on."""

import json
import logging
import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from mtl import cli, quoting
from mtl.cli import sweep
from mtl.errors import UserError
from mtl.files import Folder, LogFile, why, write_whole
from mtl.process.signals import Ended
from mtl.text import log

if TYPE_CHECKING:
    from rich.console import Console

    from mtl.build import Built
    from mtl.step import Step
    from mtl.training.trainer import Trainer

ROOM = 2**14  # bytes


def terminal() -> "Console":
    """The terminal, or for one of several jobs side by side nothing: their lines would come between each other's."""
    from mtl.process.screen import Screen

    return Screen(quiet=cli.beside_others())


def report(console: Any, line: str) -> None:
    """Prints a line whole, whatever the terminal's width, and puts it into the run's log."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)
    log.info("%s", line)


def folder_name(folder: Path) -> str:
    """The folder as one would type it here."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def write_status(folder: Folder, status: str, **more: Any) -> None:
    """Writes the run's metrics.json: what it is of, how it stands, and what more there is to say.

    That of a run that is under way keeps room for how it ends, should the disk be full by then.

    Raises:
        UserError: where the file can't be written, or the folder is gone.
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
    """Writes down that the run failed, if it is this process's."""
    for folder in began:
        with suppress(UserError):  # what went wrong is told all the same
            write_status(folder, "failed", error=error)


def add_to_log(text: str) -> None:
    """Adds lines to the run's log, as they are."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogFile):
            handler.add(text)


def choices() -> dict[str, str]:
    """By group of the config, the option that was chosen."""
    chosen = {str(group): option for group, option in HydraConfig.get().runtime.choices.items()}
    return {group: option for group, option in chosen.items() if "hydra" not in group and isinstance(option, str)}


def swept(folder: Path) -> list[str]:
    """The job's overrides that its multirun sweeps over."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return []
    fixed = sweep.fixed(folder.parent)
    overrides = [override for override in HydraConfig.get().overrides.task if override not in fixed]
    return [o for o in overrides if not sweep.makes_no_difference(o)]  # which an interrupted one may go on with


def versions() -> dict[str, Any]:
    """What the numbers may depend on besides the config."""
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

    config, model = problem.config, problem.model
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = "" if trained == count else f", {count - trained:,} of them frozen"
    report(console, f"data     {problem.splits.summary()}")
    for line in problem.splits.warnings:
        report(console, f"warning  {line}")
    report(console, f"model    {count:,} parameters{frozen}; tasks: {', '.join(t.name for t in problem.tasks)}")
    for line in without_effect(config, step, problem.loaders["train"], problem.total_steps):
        report(console, f"warning  {line}")
    threads = f" with {config['threads']} thread{'s'[: config['threads'] > 1]}" if problem.device.type == "cpu" else ""
    how = f"seed {config['seed']}, {problem.device}{threads}, {config['precision']}"
    report(console, f"run      {folder_name(folder)}  ({how})")


def stopped(console: Any, trainer: "Trainer", home: Folder, code: int) -> NoReturn:
    """Says after Ctrl-C or SIGTERM what was saved and how to go on; ends the process, or the job in it."""
    saved = folder_name(home.path)
    there = sorted(str(path) for path in Path(saved).glob("checkpoints/*.pt"))
    place = {"steps": trainer.global_step, "epochs": trainer.epoch}
    with suppress(UserError):
        write_status(home, "stopped", **place)
    at = f"at step {trainer.global_step}, in epoch {trainer.epoch}"
    older = "" if trainer.saved_step == trainer.global_step else f" (of step {trainer.saved_step})"
    report(console, f"Stopped {at}. Saved: {', '.join(there) or 'nothing yet'}{older if there else ''}")
    if there and HydraConfig.get().mode == RunMode.RUN:
        report(console, f"go on     {quoting.resuming(cli.arguments(), saved)}")
    if there:
        report(console, f"look      {quoting.looking(saved)}")
        report(console, f"evaluate  {quoting.evaluating(saved, cli.arguments(), 'checkpoint=last')}")
    raise Ended(code)
