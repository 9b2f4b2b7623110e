"""python -m mtl.train task=…: build, run, report."""

import inspect
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mtl import cli, schema
from mtl.cli import record
from mtl.cli.conclusion import conclude, measured
from mtl.cli.record import choices, failed, folder_name, stopped, swept, tell, versions, write_status
from mtl.errors import UserError, dead_worker, first_line, is_of_backward, is_out_of_memory, text_of, told
from mtl.files import Folder, why, write_whole
from mtl.process.signals import held, no_exit
from mtl.quoting import as_path, command, override
from mtl.runs import resume as taking_up
from mtl.runs.resume import Busy, Refused, locked
from mtl.text import log

if TYPE_CHECKING:
    from mtl.build import Built
    from mtl.loggers import Loggers
    from mtl.step import Step, StepResult
    from mtl.training.trainer import Trainer


def train(composed: DictConfig) -> float | None:
    """Trains the problem that the config describes, in Hydra's run folder; gives the best monitored value.

    Raises:
        UserError: for whatever is wrong in the config or goes wrong in the run.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    home = Folder(folder)
    began = [] if (folder / "config.yaml").exists() else [home]  # the runs whose end is this process's to write down
    try:
        with no_exit(), cli.naming_origins():
            return run(schema.check(composed), home, began)  # checked before torch is imported, which takes seconds
    except Refused:
        raise  # and leave the run as it is
    except UserError as error:
        log.error("%s", text_of(error))
        failed(began, text_of(error))
        raise
    except Exception as error:
        log.exception("a mistake that is none of the user's")
        failed(began, f"{type(error).__name__}: {text_of(error)}")
        raise


def run(config: dict[str, Any], home: Folder, began: list[Folder]) -> float | None:
    """Trains in the folder, which this process then has for itself."""
    folder = home.path
    cli.checked(folder)
    with locked(folder) as free:
        if not free:
            raise Busy(f"another process is at work in {folder_name(folder)}")
        if config["resume"] is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
            done = taking_up.finished(folder)
            if done is not None:
                taking_up.check(taking_up.config_of(folder), config, folder_name(folder))
                record.terminal().print(f"skipped  {folder_name(folder)} is finished", soft_wrap=True, highlight=False)
                return _best_of(done)
        with held():
            from mtl.process.seeding import num_threads
        with num_threads(config["threads"]):
            return _run(config, home, began)


def _best_of(finished: dict[str, Any]) -> float | None:
    """What a finished run reached in what it monitored."""
    best = finished.get("best")
    value = best.get("value") if isinstance(best, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _run(config: dict[str, Any], home: Folder, began: list[Folder]) -> float | None:
    """Builds everything, trains, measures the best parameters on the test split, and writes and shows the results."""
    with held():
        from mtl.build import build
        from mtl.config.targets import make
        from mtl.config.training import build_step
        from mtl.loggers import Loggers, Terminal
        from mtl.loggers.options import final_tags, options
        from mtl.process.seeding import kept_random_state
        from mtl.training.trainer import Stopped

    console = record.terminal()
    folder = home.path
    say = partial(tell, console)
    state = resumed(console, config, folder)
    composed, text = config, OmegaConf.to_yaml(OmegaConf.create(config))
    if state is None:
        write_whole(folder / "config.yaml", text)
    for line in cli.shadowed():
        say(f"warning  {line}")
    for line in cli.left_out():
        say(f"note     {line}")

    code = cli.code_folders()
    trained_on = None if state is None else state.get("facts", {})
    problem = build(config, code_folders=code, trained_on=trained_on, tell=say)
    config, loaders, tasks = problem.config, problem.loaders, problem.tasks
    step = build_step(config, problem.model, tasks, problem.total_steps)
    announce(console, problem, step, folder)

    names = [task.name for task in tasks]
    mains = {task.name: next(iter(task.metrics)) for task in tasks if task.metrics}
    with kept_random_state():  # what these draw changes no draw of the training
        callbacks = [make(node, f"callbacks.{key}") for key, node in (config["callbacks"] or {}).items()]
        files = [make(node, f"logger.{key}", folder, names) for key, node in (config["logger"] or {}).items()]
    terminal = Terminal(console, names, mains, problem.total_steps, config["trainer"]["max_epochs"])
    with Loggers([*files, terminal], say) as loggers:
        finals = final_tags(config, "val" in loaders, "test" in loaders)
        loggers.begin(text, *options(composed, choices(), swept(folder)), finals)
        saved = {
            "config": config,
            "composed": composed,
            "facts": dict(problem.splits.facts),
            "code_folders": code,
            "versions": versions(),
        }
        trainer = trainer_of(problem, step, loggers, callbacks, [check_direction, terminal], folder, saved, say)
        try:
            if state is not None:
                take_up(trainer, state, config)
                write_whole(folder / "config.yaml", text)
                say(f"resume   from step {trainer.global_step}, epoch {trainer.epoch}")
            began[:] = [home]
            write_status(home, "running")
            fit(trainer, folder, console)
            finished = measured(problem, trainer, folder)
            if trainer.writer.failed:
                loggers.fail()
            else:
                loggers.end()
        except (Stopped, KeyboardInterrupt) as stop:
            terminal.close()
            stopped(console, trainer, home, 128 + getattr(stop, "signal", signal.SIGINT))
    try:
        conclude(console, finished, home, began)
    except KeyboardInterrupt:
        stopped(console, trainer, home, 128 + signal.SIGINT)
    return trainer.best


def trainer_of(
    problem: "Built",
    step: "Step",
    loggers: "Loggers",
    callbacks: "Sequence[Callable[[Trainer, StepResult], None]]",
    watchers: "Sequence[Callable[[Trainer, StepResult], None]]",
    folder: Path,
    saved: dict[str, Any],
    say: Callable[[str], None],
) -> "Trainer":
    """The trainer that the config describes, whose checkpoints have what is `saved` beside its state."""
    from mtl.training.gallery import Gallery
    from mtl.training.trainer import Trainer

    config, loaders = problem.config, problem.loaders
    gallery = Gallery(
        loaders.get("val", loaders.get("test")),
        pictures_every=config["log"]["pictures"],
        histograms_every=config["log"]["histograms"],
        facts=problem.splits.facts,
    )
    return Trainer(
        step,
        loaders["train"],
        loaders.get("val"),
        test=loaders.get("test"),
        max_epochs=config["trainer"]["max_epochs"],
        checkpoints=folder / "checkpoints",
        log_every=config["log"]["every"],
        monitor=config["trainer"]["monitor"],
        patience=config["trainer"]["patience"],
        loggers=loggers,
        callbacks=callbacks,
        watchers=watchers,
        after_epoch=[gallery],
        saved=saved,
        save_every_steps=config["checkpoint"]["every_steps"],
        save_every_minutes=config["checkpoint"]["every_minutes"],
        keep=None if config["checkpoint"]["keep"] == "all" else config["checkpoint"]["keep"],
        keep_best=config["checkpoint"]["best"],
        tell=say,
        faults=folder / "nonfinite.jsonl",
    )


def announce(console: Any, problem: "Built", step: "Step", folder: Path) -> None:
    """Says what is about to be trained, and what of the config changes nothing."""
    from mtl.config.training import without_effect

    config, model = problem.config, problem.model
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = "" if trained == count else f", {count - trained:,} of them frozen"
    tell(console, f"data     {problem.splits.summary()}")
    for line in problem.splits.warnings:
        tell(console, f"warning  {line}")
    tell(console, f"model    {count:,} parameters{frozen}; tasks: {', '.join(t.name for t in problem.tasks)}")
    for line in without_effect(config, step, problem.loaders["train"], problem.total_steps):
        tell(console, f"warning  {line}")
    threads = f" with {config['threads']} thread{'s'[: config['threads'] > 1]}" if problem.device.type == "cpu" else ""
    how = f"seed {config['seed']}, {problem.device}{threads}, {config['precision']}"
    tell(console, f"run      {folder_name(folder)}  ({how})")


def fit(trainer: "Trainer", folder: Path, console: Any) -> None:
    """Trains; says in a sentence what ended it, memory or an operation that isn't deterministic too, and how to go on.

    Raises:
        UserError: for these and all others that are for the user.
    """
    try:
        trainer.fit()
    except (UserError, RuntimeError, MemoryError) as error:
        if trainer.saved_step and trainer.writer.is_there():
            again = command(override("resume", as_path(folder_name(folder))))
            tell(console, f"saved    step {trainer.saved_step}; when it is mended, go on with {again}")
        at = f"at step {trainer.global_step + 1}, in epoch {trainer.epoch}"
        place = at if trainer.epoch else "before the first step"
        if is_out_of_memory(error):
            line = f"out of memory {place}: {first_line(error)}. Cut the batch with trainer.micro_batch_size"
            raise UserError(line) from error
        if died := dead_worker(error):
            memory = "" if "exit code" in died else "It may have run out of memory; "
            line = f"data: a process that loads samples died {place}: {died}"
            raise UserError(f"{line}. {memory}data.num_workers=0 loads without") from error
        if "deterministic" in text_of(error) and not isinstance(error, UserError):
            raise UserError(f"deterministic=true {place}: {first_line(error)}") from error
        if is_of_backward(error):
            raise UserError(
                f"the backward pass {place} failed: {told(error)}. Look at the losses, and what the model does to its "
                "tensors"
            ) from error
        raise


def check_direction(trainer: "Trainer", result: "StepResult") -> None:
    """Called after each step; looks in the first, when it is known what is monitored.

    Raises:
        UserError: where Optuna goes the other way than what is monitored.
    """
    if trainer.global_step > 1 or trainer.monitor is None:
        return
    sweeper = HydraConfig.get().sweeper
    if "optuna" not in str(sweeper.get("_target_")):
        return
    there = getattr(sweeper.direction, "name", sweeper.direction)
    right = {"max": "maximize", "min": "minimize"}[trainer.monitor.mode]
    if there != right:
        raise UserError(f"the sweep would {there} {trainer.monitor}; give hydra.sweeper.direction={right}")


def take_up(trainer: "Trainer", state: dict[str, Any], config: dict[str, Any]) -> None:
    """Loads the state, and gives the optimizer what may have changed.

    Raises:
        Refused: where the state doesn't fit.
    """
    from mtl.runs import exchanged
    from mtl.training.saved import check_kinds, load_into

    optimizer = trainer.step.optimizer
    assert optimizer is not None
    takes = {*inspect.signature(type(optimizer)).parameters, "name", "initial_lr"}  # some groups also hold a state
    fresh = [
        {key: value for key, value in group.items() if key in takes - {"params"}} for group in optimizer.param_groups
    ]
    there = [group if isinstance(group, dict) else {} for group in state["step"]["optimizer"]["param_groups"]]
    before, now = ([group.get("name") for group in groups] for groups in (there, fresh))
    if before != now:  # the optimizer's state is by position
        raise Refused(
            f"resume: optimizer.groups were {', '.join(map(str, before))} and are {', '.join(map(str, now))}; their "
            "values may change, and neither their patterns nor the order of these"
        )
    try:
        load_into(trainer.step.model, state["model"], "the state that was saved")
        exchanged.check(trainer.step, state, config)
        check_kinds({key: value for key, value in state.items() if key != "model"}, trainer.state_dict())
        trainer.load_state_dict(state)
    except UserError as error:
        raise Refused(f"resume: {error}") from error
    except OSError as error:
        raise Refused(f"resume: what was logged can't be taken up: {why(error)}") from error
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise Refused(f"resume: the state that was saved doesn't fit this config: {told(error)}") from error
    allowed = config["resume_allow"] + exchanged.options(trainer.step, state, config)
    taking_up.reset_options(trainer.step.descent.param_groups(first=True), fresh, allowed)


def resumed(console: Any, config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The state to go on from, None for a new run.

    Raises:
        Refused: where the config differs from that of the run in what isn't allowed to, or the run is finished.
    """
    from mtl.training import checkpoint, saved

    if config["resume"] is None or not (folder / "config.yaml").is_file():
        return None
    if not list(folder.glob("checkpoints/last*.pt")):
        tell(console, f"resume   {folder_name(folder)} has no checkpoint yet: it begins anew")
        for name in ("metrics.csv", "nonfinite.jsonl"):
            (folder / name).unlink(missing_ok=True)
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
        return None
    try:
        state = checkpoint.newest(folder / "checkpoints", lambda line: tell(console, line))
        saved.check(state, f"the newest checkpoint in {folder_name(folder)}", saved.RUN)
    except UserError as error:
        raise Refused(str(error)) from error
    known = {"threads": state["versions"].get("threads")}  # for a run that is older than the key
    taking_up.check(known | state["composed"], config, folder_name(folder))
    taking_up.changed_versions(state["versions"], versions(), lambda line: tell(console, line))
    return state


if __name__ == "__main__":
    cli.launch(train, "train")
