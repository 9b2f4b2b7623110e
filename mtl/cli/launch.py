"""From a command line to its jobs, and to the exit code."""

import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mtl import schema, search
from mtl.cli.complaints import show
from mtl.cli.composing import composing
from mtl.cli.folders import CONFIG_DIR, TRAININGS, log_file, root, run_dir, run_id
from mtl.cli.jobs import Jobs
from mtl.cli.overrides import fixed, flags_first, for_hydra, gives, keys
from mtl.errors import UserError, suggest
from mtl.files import patient_screen
from mtl.signals import handed_to
from mtl.sweep import Sweep

INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


def launch(job: Callable[[DictConfig], float | None], config_name: str) -> None:
    """Composes the config from the command line, runs the job, or each job of a multirun, and exits.

    A job that fails is reported and doesn't stop the other jobs; the exit code is then 1. So it is where not all that
    there was to print could be.
    """
    with patient_screen() as screen:
        code = _launch(job, config_name)
        whole = screen.complete()
    sys.exit(code or int(not whole))


def _launch(job: Callable[[DictConfig], float | None], config_name: str) -> int | str | None:
    """The same, without exiting; gives the exit code."""
    wanted = os.environ.get("HYDRA_FULL_ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are about the profiler's own affairs
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, so that they are shown the same way as ours
    typed = flags_first(sys.argv[1:])
    if config_name in TRAININGS and {"-h", "--help"} & set(typed) and not gives(typed, "task"):
        typed.append("task=mnist_two_head")  # Hydra composes a config even to show help, and `task` has no default
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
        if not signals:  # else a sweeper may have taken offence at jobs that gave nothing
            show(_for_a_person(error), wanted == "1", config_name)
            jobs.failed = True
            broken = isinstance(error.__cause__, BrokenProcessPool)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if wanted is not None:
            os.environ["HYDRA_FULL_ERROR"] = wanted
        multirun.tidy(keep_stop=cut_short and not jobs.worked_here)
        all_done = jobs.say_how_they_ended(cut_short or broken or bool(signals))
    if cut_short:
        return code
    return 128 + signals[0] if signals else 1 if jobs.failed or not all_done else 0


def _check_typed(typed: list[str], config_name: str) -> None:
    """Raises a UserError for a multirun of a command that has none, and for folders that jobs wouldn't be found in."""
    for key in ("hydra.sweep.dir", "hydra.sweep.subdir"):
        if gives(typed, key):
            raise UserError(f"{key}: a multirun chooses its folders itself, below output_root; set that")
    if config_name == "evaluate":
        _check_evaluation(typed)
    if config_name == "graph" and (gives(typed, "sweep") or {"-m", "--multirun"} & set(typed)):
        raise UserError("-m: mtl.graph looks at one problem at a time")


def _check_evaluation(typed: list[str]) -> None:
    """Raises a UserError for what a model can't be measured with."""
    if gone := [argument for argument in typed if argument.startswith("~")]:
        raise UserError(f"{gone[0]}: nothing can be taken away here; name other data with data=…")
    for key in keys(typed):
        first = key.split(".")[0]
        if first in schema.SCHEMA and first not in schema.EVALUATE:
            raise UserError(
                f"{key}: a model is measured as it was trained; what can be given is {', '.join(schema.EVALUATE)}"
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
        if not jobs.go_on(broken):
            return
        others = [argument for argument in sys.argv[1:] if not argument.startswith("resume=")]
        sys.argv[1:] = [*others, f"resume='{multirun.folder}'"]
        multirun.fixed = fixed(sys.argv[1:])


def _for_a_person(error: Exception) -> Exception:
    """The error, or for some of Python's own a sentence."""
    if isinstance(error, HydraException | OmegaConfBaseException):  # some of them are OSErrors or ValueErrors too
        return error
    if isinstance(error, OSError):  # Hydra makes the run's folder before the job begins
        folder = f"{error.filename or 'the folder of the run'} can't be written: {error.strerror or error}"
        return UserError(f"{folder}; set output_root to a folder that can be")
    if isinstance(error, ValueError | YAMLError):  # a group that is null, a file that isn't YAML
        nulls = ", ".join(argument for argument in sys.argv[1:] if argument.endswith("=null"))
        return UserError(f"{error}{f' ({nulls})' if nulls else ''}")
    return error


def register_resolvers(multirun: Sweep) -> None:
    """What `${…}` in the configs may ask for."""

    def sweep_dir(root: str, resume: str | None) -> str:
        return multirun.choose_folder(root, resume)

    def job_name(number: int, *, _root_: DictConfig) -> str:
        return multirun.job_name(number, list(_root_.hydra.overrides.task))

    resolvers: list[Callable[..., Any]] = [root, run_dir, job_name, log_file]
    for resolver in resolvers:
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    # Its value goes with the config to jobs in other processes.
    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True, use_cache=True)
    for of_config in (search.task_names, search.weight_grid, search.direction):
        OmegaConf.register_new_resolver(of_config.__name__, _of_root(of_config), replace=True)


def _of_root(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def resolver(*, _root_: DictConfig) -> Any:
        return function(_root_)

    return resolver
