"""Runs the jobs of a command line and returns the exit code."""

import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from traceback import extract_tb
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mtl import schema
from mtl.cli import processes, search
from mtl.cli.complaints import show
from mtl.cli.composing import composing
from mtl.cli.folders import CONFIG_DIR, TRAININGS, check_name, log_file, root, run_dir, run_id
from mtl.cli.jobs import Jobs
from mtl.cli.overrides import config_folders, fixed, flags_first, for_hydra, gives, is_multirun, keys, parted
from mtl.cli.sweep import Sweep
from mtl.cli.unknown import inside_a_list, nameless, with_plus, without_a_job
from mtl.errors import UserError, suggest
from mtl.files import patient_screen
from mtl.process.signals import handed_to
from mtl.quoting import override

SHOWING = ("--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i", "--version", "--shell-completion", "-sc")
INTERRUPTED = 130  # a shell's exit code for a command that Ctrl-C ended


def launch(job: Callable[[DictConfig], float | None], config_name: str) -> None:
    """Composes the config from the command line, runs the job or each job of a multirun, and exits.

    A job that fails is reported and doesn't stop the other jobs. The exit code is 1 if a job failed or if some output
    couldn't be printed.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides warnings about internals of the profiler
    if processes.is_follower():
        shows = set(SHOWING) & set(sys.argv[1:])
        sys.exit(0 if shows or config_name != "train" else processes.follow())
    with patient_screen() as screen:
        code = _launch(job, config_name)
        whole = screen.complete()
    sys.exit(code or int(not whole))


def _launch(job: Callable[[DictConfig], float | None], config_name: str) -> int | str | None:
    """Does the same as `launch` without exiting; returns the exit code."""
    wanted = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, so that all errors are shown in the same way
    typed = flags_first(sys.argv[1:])
    if config_name in TRAININGS and {"-h", "--help"} & set(typed) and not gives(typed, "task"):
        typed.append("task=mnist_two_head")  # Hydra composes a config even for help, and `task` has no default
    sys.argv[1:] = for_hydra(typed, config_name)
    multirun = Sweep(typed, run_id(), fixed(sys.argv[1:]))
    register_resolvers(multirun)
    jobs = Jobs(job, config_name, multirun, tracebacks=wanted == "1")
    signals: list[int] = []
    cut_short = broken = False
    try:
        with handed_to(jobs.ask_to_stop, signals):
            _check_typed(typed, config_name)
            _run(jobs, multirun, config_name)
    except KeyboardInterrupt:
        cut_short = True
        sys.stderr.write("interrupted\n")
        code: int | str | None = INTERRUPTED
    except SystemExit as ended:
        cut_short = True
        code = ended.code
    except Exception as error:
        if not signals:  # otherwise a sweeper may have failed because stopped jobs returned nothing
            if str(error).startswith("Unable to configure ") and isinstance(error.__cause__, Exception):
                error = error.__cause__  # logging's own error names only the handler or the formatter
            sentence = _explained(error, config_name)
            sentence.__cause__ = error.__cause__ if sentence is error else error  # for the full traceback
            show(sentence, wanted == "1", config_name)
            jobs.failed = True
            broken = isinstance(error.__cause__, BrokenProcessPool)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if wanted is not None:
            os.environ["HYDRA_FULL_ERROR"] = wanted
        multirun.tidy(keep_stop=cut_short and not jobs.worked_here)
        all_done = jobs.report_outcomes(cut_short or broken or bool(signals))
    if cut_short:
        return code
    return 128 + signals[0] if signals else 1 if jobs.failed or not all_done else 0


def _check_typed(typed: list[str], config_name: str) -> None:
    """Raises a UserError for commands that have no multirun, and for output folders in which jobs wouldn't be found."""
    if config_name == "train":
        processes.check_environment()
    check_name(os.getcwd(), "the current folder")
    for folder in config_folders(typed):
        check_name(folder, "--config-dir")
    for key in ("hydra.sweep.dir", "hydra.sweep.subdir"):
        if gives(typed, key):
            raise UserError(f"{key}: a multirun chooses its folders itself, below output_root; set output_root instead")
    one_process = [f"hydra/launcher={name}" for name in ("basic", "joblib", "ray")]
    for key in ("hydra.launcher.tasks_per_node", "hydra.launcher.nodes"):
        if gives(typed, key) and (launcher := [word for word in typed if word in one_process]):
            raise UserError(
                f"{key}: a job of {launcher[0]} is one process; hydra/launcher=submitit_slurm starts jobs of several"
            )
    if is_multirun(typed) and processes.count() > 1:
        raise UserError("-m: torchrun's processes train one run together; start a multirun without torchrun")
    if config_name != "train" and processes.count() > 1:
        raise UserError(f"mtl.{config_name} runs in one process; start it without torchrun")
    if config_name == "evaluate":
        _check_evaluation(typed)
    if config_name == "graph" and (gives(typed, "sweep") or {"-m", "--multirun"} & set(typed)):
        raise UserError("-m: mtl.graph shows one problem at a time")


def _check_evaluation(typed: list[str]) -> None:
    """Raises a UserError for options with which a model can't be evaluated."""
    if gone := [argument for argument in typed if argument.startswith("~")]:
        raise UserError(f"{gone[0]}: nothing can be removed here; choose other data with data=…")
    for key in keys(typed):
        first = key.split(".")[0]
        if first in schema.SCHEMA and first not in schema.EVALUATE:
            raise UserError(
                f"{key}: a model is evaluated as it was trained; the options are {', '.join(schema.EVALUATE)}"
            )
        if first not in (*schema.EVALUATE, "hydra"):
            raise UserError(f"there is no key '{key}'" + suggest(first, schema.EVALUATE))


def _run(jobs: Jobs, multirun: Sweep, config_name: str) -> None:
    def call(config: DictConfig) -> float | None:
        return jobs(config)

    broken: BrokenProcessPool | None
    while True:
        try:
            with composing():
                hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=config_name)(call)()
            broken = None
        except BrokenProcessPool as error:
            broken = error
        except HydraException as error:
            again = with_plus(sys.argv[1:], error, config_name)
            if again is None:
                raise
            sys.argv[1:] = again
            multirun.fixed = fixed(again)
            continue
        if not jobs.go_on(broken):
            break
        arguments = [argument for argument in sys.argv[1:] if not argument.startswith("resume=")]
        sys.argv[1:] = [*arguments, override("resume", str(multirun.folder))]
        multirun.fixed = fixed(sys.argv[1:])
    if is_multirun(sys.argv[1:]) and jobs.none_began() and not set(SHOWING) & set(parted(sys.argv[1:])[0]):
        raise UserError(f"{without_a_job(sys.argv[1:])}: the sweep has no job")


def _explained(error: Exception, config_name: str) -> Exception:
    """Returns the error, or for some of Python's own errors a UserError with an explanation."""
    if isinstance(error, HydraException | OmegaConfBaseException):  # some of these are also OSErrors or ValueErrors
        return error
    if isinstance(error, OSError):  # Hydra creates the run's folder before the job begins
        folder = f"{error.filename or 'the folder of the run'} can't be written: {error.strerror or error}"
        return UserError(f"{folder}; set output_root to a writable folder")
    if keyless := [argument for argument in sys.argv[1:] if argument.startswith("=")]:
        return UserError(f"'{keyless[0]}' can't be read: there is no key before the =")
    if str(error).startswith("Config group override must be a string or a list"):
        wrong = ", ".join(nameless(sys.argv[1:]))
        return UserError(f"{wrong}: choose an option of a group by its name, or no option with ~ before the group")
    if isinstance(error, UserError):
        return error
    if isinstance(error, ValueError | IndexError | TypeError) and (message := inside_a_list(sys.argv[1:], config_name)):
        return UserError(message)
    place = Path(extract_tb(error.__traceback__)[-1].filename)
    if isinstance(error, ValueError | YAMLError) or {"hydra", "omegaconf"} & set(place.parts):
        message = "" if isinstance(error, AssertionError) else str(error).strip()
        return UserError(message or f"Hydra fails on the command line: {type(error).__name__} in {place.name}")
    return error


def register_resolvers(multirun: Sweep) -> None:
    """Registers the resolvers for `${…}` in the configs."""

    def sweep_dir(root: str, resume: str | None) -> str:
        return multirun.choose_folder(root, resume)

    def job_name(number: int, *, _root_: DictConfig) -> str:
        return multirun.job_name(number, list(_root_.hydra.overrides.task))

    resolvers: list[Callable[..., Any]] = [root, run_dir, job_name, log_file]
    for resolver in resolvers:
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    # The resolver's value is passed with the config to jobs in other processes.
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True, use_cache=True)
    for of_config in (search.task_names, search.weight_grid, search.direction):
        OmegaConf.register_new_resolver(of_config.__name__, _of_root(of_config), replace=True)


def _of_root(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def resolver(*, _root_: DictConfig) -> Any:
        return function(_root_)

    return resolver
