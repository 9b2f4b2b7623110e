"""What the entry points have in common: Hydra, run folders, and errors for a person."""

import logging
import os
import re
import secrets
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mtl import schema, search, sweep
from mtl.errors import UserError, suggest
from mtl.resume import Busy, newest_unfinished
from mtl.signals import handed_to, working_for

# In a wheel the configs are inside the package, in a checkout beside it.
CONFIG_DIR = next(
    str(folder)
    for folder in (Path(__file__).with_name("configs"), Path(__file__).parents[1] / "configs")
    if (folder / "train.yaml").is_file()
)
REPLACED = (  # mappings whose keys are the user's
    *("trainer.monitor", "optimizer.groups", "model.freeze_until", "data.batch_size"),
)
TRAININGS = ("train", "graph")  # configs that `task=` completes
EXTRAS = {  # of mtl-train, by the launcher or sweeper of a plugin of Hydra's
    **{"joblib": "joblib", "ray": "ray", "optuna": "optuna"},
    **{"submitit_slurm": "slurm", "submitit_local": "slurm"},
}
# What Hydra says of an option that a group hasn't.
NO_OPTION = r".*Could not find '([^']+)/([^/']+)'\s+Available options in '[^']+':\n(.*?)(?:\n\S|\Z)"
RESOLVING = "UserError raised while resolving interpolation: "  # what OmegaConf says of our own errors
INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


def launch(job: Callable[[DictConfig], float | None], config_name: str) -> None:
    """Composes the config from the command line, runs the job, or each job of a multirun, and exits.

    A job that fails is reported, counts as NaN for a sweep and doesn't stop the other jobs; the exit code is then 1.
    """
    wanted = os.environ.get("HYDRA_FULL_ERROR")
    tracebacks = wanted == "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are about the profiler's own affairs
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, so that they are shown the same way as ours
    sys.argv[1:] = sweep.flags_first(sys.argv[1:])
    multirun = sweep.Sweep(sys.argv[1:], _run_id())
    _register_resolvers(multirun)
    if config_name in TRAININGS and {"-h", "--help"} & set(sys.argv) and not _overrides("task"):
        sys.argv.append("task=mnist_two_head")  # Hydra composes a config even to show help, and `task` has no default
    for key in REPLACED:
        if any(argument.startswith(f"{key}={{") for argument in sys.argv):
            others = [argument for argument in sys.argv[1:] if not argument.startswith(f"{key}={{")]
            added = [f"+{argument}" for argument in sys.argv[1:] if argument.startswith(f"{key}={{")]
            sys.argv[1:] = [*others, *_deleting(key), *added]
    failed = interrupted = worked_here = False
    began_in = os.getpid()

    def guarded(config: DictConfig) -> float | None:
        nonlocal failed, worked_here
        folder = Path(HydraConfig.get().runtime.output_dir)
        there_before = (folder / "config.yaml").exists()
        swept = HydraConfig.get().mode == RunMode.MULTIRUN
        # Hydra's plugin for Optuna stumbles over NaN, and takes None for a trial that failed.
        nothing = None if "optuna" in str(HydraConfig.get().sweeper.get("_target_")) else float("nan")
        worked_here = os.getpid() == began_in
        began = time.monotonic()

        def note(outcome: str, value: float | None = None) -> None:
            if swept:
                multirun.note(folder, outcome, value)
            if beside_others():
                print(f"{_line(folder.name, outcome, value)}  ({time.monotonic() - began:.0f} s)", flush=True)

        if not worked_here and multirun.stopping(folder):
            if not there_before:
                _forget(folder)
            return nothing
        if swept:
            multirun.begin(folder)
        try:
            with nullcontext() if worked_here else working_for(os.getppid(), lambda: multirun.stopping(folder)):
                value = job(config)
        except SystemExit:
            note("stopped")
            if worked_here:
                raise
            return nothing
        except Exception as error:
            where = f"{folder.name}: " if beside_others() else ""
            _show(error, tracebacks or config.get("debug") is True, config_name, where)
            failed = True
            note("busy" if isinstance(error, Busy) else "failed")
            return nothing
        finally:
            if not there_before:
                _forget_what_never_began(folder)
        note("done", value)
        return value

    def ask_to_stop() -> bool:
        if worked_here or multirun.folder is None:
            return False
        multirun.ask_to_stop()
        print("\nstopping: the jobs save where they are; once more ends them at once", flush=True)
        return True

    try:
        with handed_to(ask_to_stop) as signals:
            hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=config_name)(guarded)()
        if signals:
            interrupted = True
            sys.exit(128 + signals[0])
    except KeyboardInterrupt:
        interrupted = True
        sys.exit(INTERRUPTED)
    except SystemExit:
        interrupted = True
        raise
    except (HydraException, OmegaConfBaseException) as error:  # some of them are OSErrors or ValueErrors too
        _show(error, tracebacks, config_name)
        failed = True
    except OSError as error:  # Hydra makes the run's folder before the job begins
        folder = f"{error.filename or 'the folder of the run'} can't be written: {error.strerror or error}"
        _show(UserError(f"{folder}; set output_root to a folder that can be"), tracebacks, config_name)
        failed = True
    except (ValueError, YAMLError) as error:  # a group that is null, a file that isn't YAML
        nulls = ", ".join(argument for argument in sys.argv[1:] if argument.endswith("=null"))
        _show(UserError(f"{error}{f' ({nulls})' if nulls else ''}"), tracebacks, config_name)
        failed = True
    except Exception as error:
        _show(error, tracebacks, config_name)
        failed = True
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if wanted is not None:
            os.environ["HYDRA_FULL_ERROR"] = wanted
        multirun.stopped()
        jobs = multirun.ended()
        _say_how_jobs_ended(multirun, jobs, interrupted)
    sys.exit(1 if failed or any(ended["outcome"] != "done" for ended in jobs) else 0)


def _register_resolvers(multirun: sweep.Sweep) -> None:
    """What `${…}` in the configs may ask for."""

    def sweep_dir(root: str, resume: str | None) -> str:
        return multirun.choose_folder(root, resume)

    def job_name(number: int, *, _root_: DictConfig) -> str:
        return multirun.job_name(number, list(_root_.hydra.overrides.task))

    resolvers: dict[str, Callable[..., Any]] = {"root": _root, "run_dir": _run_dir, "job_name": job_name}
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    # Its value goes with the config to jobs in other processes.
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True, use_cache=True)
    for of_config in (search.task_names, search.weight_grid, search.direction):
        OmegaConf.register_new_resolver(of_config.__name__, _of_root(of_config), replace=True)


def _of_root(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def resolver(*, _root_: DictConfig) -> Any:
        return function(_root_)

    return resolver


def _say_how_jobs_ended(multirun: sweep.Sweep, jobs: list[dict[str, Any]], interrupted: bool) -> None:
    if len(jobs) > 1:
        print(f"\n{len(jobs)} jobs in {multirun.folder}, each with what it monitors on validation:")
        for ended in jobs:
            print(f"  {_line(ended['job'], ended['outcome'], ended['value'])}")
    folder = _as_typed(str(multirun.folder))
    if interrupted and multirun.folder is not None and (multirun.folder / sweep.ABOUT).is_file():
        print(f"\ngo on     {going_on(multirun.typed, folder)}")
    elif len(jobs) > 1 and any(ended["outcome"] == "done" for ended in jobs):
        print(f"\ncompare               python -m mtl.report {shlex.quote(folder)}")
        print(f"look                  tensorboard --logdir {shlex.quote(folder)}")


def _line(job: str, outcome: str, value: float | None) -> str:
    return f"{job:<40} {outcome}" + ("" if value is None else f" {value:.4f}")


def beside_others() -> bool:
    """Whether this is a job of a multirun's that run side by side, whose lines would come between each other's."""
    hydra_config = HydraConfig.get()
    return hydra_config.mode == RunMode.MULTIRUN and hydra_config.runtime.choices["hydra/launcher"] != "basic"


def going_on(given: Sequence[str], folder: str) -> str:
    """The command by which the run or multirun in the folder, started with these arguments, goes on."""
    again = [argument for argument in given if not argument.lstrip("+").startswith("resume=")]
    return f"python -m mtl.train {shlex.join(again)} resume={shlex.quote(folder)}"


def code_folders() -> list[str]:
    """Where modules of the user's own may be: the current folder, and that of --config-dir."""
    sources = HydraConfig.get().runtime.config_sources
    own = [source.path for source in sources if source.schema == "file" and source.path != CONFIG_DIR]
    return [os.getcwd(), *own]


def arguments() -> list[str]:
    """What this job was given on the command line, the folder of --config-dir included, to be given again."""
    replaced = tuple(f"+{key}=" for key in REPLACED)
    deleting = [override for key in REPLACED for override in _deleting(key)]
    task = [argument for argument in HydraConfig.get().overrides.task if argument not in deleting]
    given = [a.removeprefix("+") if a.startswith(replaced) else a for a in task if not a.startswith("+sweep=")]
    folders = [s.path for s in HydraConfig.get().runtime.config_sources if s.provider == "command-line"]
    return [*(part for folder in folders for part in ("--config-dir", _as_typed(folder))), *given]


def _deleting(key: str) -> list[str]:
    """Overrides that take the key away.

    Hydra merges mappings, where one that is given here is to take the place of the task's own; and it can't delete one
    that is null.
    """
    return [f"++{key}={{x:0}}", f"~{key}"]


def _as_typed(folder: str) -> str:
    return os.path.relpath(folder) if Path(folder).is_relative_to(Path.cwd()) else folder


def shadowed() -> list[str]:
    """A line for each file of --config-dir that isn't read."""
    return [
        f"{path} is not read: mtl's own file of that name comes first; rename yours"
        for folder in code_folders()[1:]
        for path in sorted(Path(folder).rglob("*.yaml"))
        if (Path(CONFIG_DIR) / path.relative_to(folder)).is_file()
    ]


def _overrides(key: str) -> bool:
    return any(argument.split("=")[0].lstrip("+~") == key for argument in sys.argv[1:])


def _show(error: Exception, full: bool, config_name: str, where: str = "") -> None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OmegaConfBaseException) and isinstance(cause, UserError):
        error = cause  # raised by a resolver of ours
    elif isinstance(error, OmegaConfBaseException | HydraException) and RESOLVING in str(error):
        error = UserError(str(error).partition(RESOLVING)[2].partition("\n    full_key")[0])
    if full or not isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError):
        traceback.print_exception(error)
        return
    text = str(error).strip()
    unknown = re.match(r"Could not override '([^']+)'", text)
    if isinstance(error, OverrideParseException):
        text = f"'{error.override}' can't be read: {' '.join((error.message or '').splitlines()[1:2])}"
        example = "task=mnist_two_head" if config_name in TRAININGS else "run=outputs/…"
        text += f"; values are written key=value, as {example}"
    elif plugin := re.match(r"In 'hydra/config': Could not find 'hydra/(?:launcher|sweeper)/(\w+)'", text):
        extra = EXTRAS.get(plugin[1])
        text += f'\nInstall it: pip install "mtl-train[{extra}]"' if extra else ""
    elif "@task." in text:
        text += "\nThe task's file must begin with the line: # @package _global_"
    elif unknown and unknown[1] == "sweep":
        text = "a sweep is added: " + next(
            (f"+{given}" for given in sys.argv if given.startswith("sweep=")), "+sweep=…"
        )
    elif missing := re.match(NO_OPTION, text, re.S):
        text = f"{missing[1]}: there is no '{missing[2]}'" + suggest(missing[2], missing[3].split())
    elif unknown and unknown[1] not in schema.SCHEMA:
        text = f"there is no key '{unknown[1]}'" + suggest(unknown[1], schema.siblings(unknown[1], config_name))
        if unknown[1].split(".")[0] in ("data", "model", "optimizer", "scheduler", "balancer", "tasks"):
            text += "; what a _target_ takes is possible too: --cfg job shows what is set"
    print(f"{where}error: {text}\n(debug=true or HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)


def _forget_what_never_began(folder: Path) -> None:
    """Removes the folder of a new run that failed before anything was trained; in a sweep it stays, to say so."""
    hydra_config = HydraConfig.get()
    kept = {path.name for path in folder.iterdir()} - {"train.log", "metrics.json", "config.yaml"}
    if hydra_config.mode == RunMode.RUN and hydra_config.job.config_name in TRAININGS and not kept:
        _forget(folder)


def _forget(folder: Path) -> None:
    for handler in logging.getLogger().handlers:
        handler.close()
    shutil.rmtree(folder)


def _root(value: object) -> str:
    """The folder for runs, looked over before Hydra makes it."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"output_root is {value!r}; it must be the name of a folder")
    return value


def _run_dir(folder: str, resume: str | None, *, _root_: DictConfig) -> str:
    """The run's folder: a new one, or that of the run that is to go on.

    Raises:
        UserError: where there is no such run.
    """
    if resume is None:
        return f"{folder}/{_run_id()}"
    if resume == "auto":
        ours: Any = OmegaConf.to_container(
            OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"]), resolve=True
        )
        found = newest_unfinished(Path(folder), schema.narrowed(ours))
        return str(found) if found else f"{folder}/{_run_id()}"
    if not (Path(resume) / "config.yaml").is_file():
        raise UserError(f"resume: '{resume}' is not the folder of a run; it would hold a config.yaml")
    return resume


@cache
def _run_id() -> str:
    return time.strftime("%Y-%m-%d_%H-%M-%S-") + secrets.token_hex(2)
