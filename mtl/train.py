"""python -m mtl.train task=…: trains a problem and reports the results."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mtl import cli, schema
from mtl.cli import processes, record
from mtl.cli.conclusion import conclude, measured
from mtl.cli.fitting import check_direction, fit
from mtl.cli.resuming import load_state, newest_state
from mtl.errors import UserError, text_of
from mtl.files import Folder, write_whole
from mtl.process.signals import Stopped, held, no_exit
from mtl.runs import resume
from mtl.runs.resume import Busy, Refused, locked
from mtl.text import log


def train(composed: DictConfig) -> float | None:
    """Trains the problem that the config describes, in Hydra's run folder; returns the best monitored value.

    Raises:
        UserError: If the config is invalid or the run fails.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    home = Folder(folder)
    began = [] if (folder / "config.yaml").exists() else [home]  # the runs whose final status this process writes
    try:
        with no_exit(), cli.naming_origins():
            return run(schema.check(composed), home, began)  # check the config before the slow import of torch
    except Refused:
        raise  # and leave the run unchanged
    except UserError as error:
        log.error("%s", text_of(error))
        record.failed(began, text_of(error))
        raise
    except Exception as error:
        log.exception("unexpected error, which may be a bug in mtl")
        record.failed(began, f"{type(error).__name__}: {text_of(error)}")
        raise


def run(config: dict[str, Any], home: Folder, began: list[Folder]) -> float | None:
    """Trains in the folder, which is locked against other processes."""
    folder = home.path
    cli.checked(folder)
    with locked(folder) as free:
        if not free:
            raise Busy(f"another process is using {record.folder_name(folder)}")
        if config["resume"] is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            done = resume.finished(folder)
            if done is not None:
                resume.check(resume.config_of(folder), config, record.folder_name(folder))
                record.terminal().print(
                    f"skipped  {record.folder_name(folder)} is finished", soft_wrap=True, highlight=False
                )
                return _best_of(done)
        with held():
            from mtl.process.seeding import num_threads
        with num_threads(config["threads"]):
            return _run(config, home, began)


def _best_of(finished: dict[str, Any]) -> float | None:
    """Returns the best monitored value of a finished run."""
    best = finished.get("best")
    value = best.get("value") if isinstance(best, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _run(config: dict[str, Any], home: Folder, began: list[Folder]) -> float | None:
    """Trains in this process, or in all that torchrun started, from the newest state if the run is resumed."""
    with held():
        import mtl.config.trainer  # noqa: F401  # and torch with it

    console, folder = record.terminal(), home.path
    report = partial(record.report, console)
    state = newest_state(console, config, folder)
    if state is None:
        write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    for line in cli.shadowed():
        report(f"warning  {line}")
    for line in cli.left_out():
        report(f"note     {line}")
    with processes.leading(config=config, code=cli.code_folders(), state=state, folder=str(folder)):
        return _train(config, home, began, state)


def _train(config: dict[str, Any], home: Folder, began: list[Folder], state: dict[str, Any] | None) -> float | None:
    """Builds the problem, trains, evaluates the best parameters on the test split, and reports the results."""
    from mtl.build import build
    from mtl.config.trainer import build_callbacks, build_loggers, build_trainer
    from mtl.config.training import build_step
    from mtl.loggers import Loggers, Terminal
    from mtl.loggers.options import final_tags, options
    from mtl.training.hooks import Hooks

    console, folder, code = record.terminal(), home.path, cli.code_folders()
    report = partial(record.report, console)
    composed, text = config, OmegaConf.to_yaml(OmegaConf.create(config))
    trained_on = None if state is None else state.get("facts", {})
    problem = build(config, code_folders=code, trained_on=trained_on, report=report)
    processes.check_same_data(problem)
    config, loaders, tasks = problem.config, problem.loaders, problem.tasks
    step = build_step(config, problem.model, tasks, problem.total_steps)
    record.announce(console, problem, step, folder)

    names = [task.name for task in tasks]
    mains = {task.name: next(iter(task.metrics)) for task in tasks if task.metrics}
    terminal = Terminal(console, names, mains, problem.total_steps, config["trainer"]["max_epochs"])
    hooks = Hooks(build_callbacks(config), watchers=[check_direction, terminal])
    with Loggers([*build_loggers(config, folder, names), terminal], report) as loggers:
        finals = final_tags(config, "val" in loaders, "test" in loaders)
        loggers.begin(text, *options(composed, record.choices(), record.swept(folder)), finals)
        facts = dict(problem.splits.facts)
        made_with = {"facts": facts, "code_folders": code, "versions": record.versions()}
        checkpoint_data = {"config": config, "composed": composed, **made_with}
        trainer = build_trainer(problem, step, hooks, loggers, folder, checkpoint_data)
        try:
            if state is not None:
                load_state(trainer, state, config)
                write_whole(folder / "config.yaml", text)
                report(f"resume   from step {trainer.global_step}, epoch {trainer.epoch}")
            began[:] = [home]
            record.write_status(home, "running")
            fit(trainer, folder, console)
            finished = measured(problem, trainer, folder)
            if trainer.writer.failed:
                loggers.fail()
            else:
                loggers.end()
        except (Stopped, KeyboardInterrupt) as stop:
            terminal.close()
            record.stopped(console, trainer, home, 128 + getattr(stop, "signal", signal.SIGINT))
    try:
        conclude(console, finished, home, began)
    except KeyboardInterrupt:
        record.stopped(console, trainer, home, 128 + signal.SIGINT)
    return trainer.selection.best


if __name__ == "__main__":
    cli.launch(train, "train")
