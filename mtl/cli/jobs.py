"""Runs the jobs of a command or of a multirun, in this process or in others, and reports how they ended."""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mtl.cli import processes, submitted
from mtl.cli.complaints import show
from mtl.cli.folders import forget, forget_what_never_began
from mtl.cli.overrides import as_typed
from mtl.cli.sweep import ABOUT, Sweep
from mtl.errors import UserError
from mtl.files import patient_screen, write_whole
from mtl.process.signals import Ended, no_exit, working
from mtl.quoting import command, resuming, viewing
from mtl.runs.resume import Busy, metrics_of
from mtl.text import echo, plain

DIED = "its process was killed; it may have run out of memory"


class Jobs:
    """Calls the job function for each job. Other processes get a pickled copy, and report in the multirun's journal.

    Args:
        job: A function of the config that returns the monitored value.
        config_name: The config name of the command.
        multirun: The multirun, if the jobs belong to one.
        tracebacks: Whether to print tracebacks of errors.

    Attributes:
        failed: Whether a job in this process failed, or the process of a job was killed.
        worked_here: Whether this process has begun a job itself.
    """

    def __init__(
        self, job: Callable[[DictConfig], float | None], config_name: str, multirun: Sweep, *, tracebacks: bool
    ) -> None:
        self.failed = False
        self._only: str | None = None  # the name of the only job to run
        self._suspects: list[str] = []  # jobs that were running when a process was killed
        self._job = job
        self._config_name = config_name
        self._multirun = multirun
        self._tracebacks = tracebacks
        self._began_in = os.getpid()
        self.worked_here = False
        self._asked_to_stop = False
        self._single = False  # whether this is a single job, not one of a multirun

    @patient_screen()
    def __call__(self, config: DictConfig) -> float | None:
        """Runs the job of Hydra's current folder, unless it is to be skipped; reports and records errors."""
        folder = Path(HydraConfig.get().runtime.output_dir)
        self.worked_here = os.getpid() == self._began_in
        self._single = HydraConfig.get().mode == RunMode.RUN
        existed_before = any(os.path.lexists(folder / name) for name in ("config.yaml", "metrics.json"))
        if self.worked_here and self._asked_to_stop:  # set before it was known that there are no other processes
            if not existed_before:
                forget(folder)
            raise KeyboardInterrupt
        # Hydra's Optuna plugin fails on NaN, and treats None as a failed trial.
        nothing = None if "optuna" in str(HydraConfig.get().sweeper.get("_target_")) else float("nan")
        if not self.worked_here:
            submitted.join()
            if processes.is_follower():
                with self._governed(folder), suppress(KeyboardInterrupt):
                    processes.follow()
                return nothing
        with submitted.dismissing():
            return self._run(config, folder, existed_before, nothing)

    def _run(self, config: DictConfig, folder: Path, existed_before: bool, nothing: float | None) -> float | None:
        if not self.worked_here:
            earlier = self._multirun.noted(folder.parent).get(folder.name)
            if earlier and earlier["outcome"] in ("done", "failed"):
                return nothing if earlier["value"] is None else float(earlier["value"])
            if self._multirun.stopping(folder) or self._only not in (None, folder.name):
                if not existed_before:
                    forget(folder)
                return nothing
        began = time.monotonic()
        try:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                self._multirun.begin(folder)
            with self._governed(folder), no_exit():
                value = self._job(config)
        except (Ended, KeyboardInterrupt):
            self._note(folder, began, "stopped")
            if self.worked_here:
                raise
            return nothing
        except Exception as error:
            where = f"{folder.name}: " if runs_in_parallel() else ""
            show(error, self._tracebacks or config.get("debug") is True, self._config_name, where)
            self.failed = True
            existed_before |= isinstance(error, Busy)  # another process has made the folder at the same moment
            self._note(folder, began, "busy" if isinstance(error, Busy) else "failed")
            return nothing
        finally:
            if not existed_before:
                forget_what_never_began(folder)
        self._note(folder, began, "done", value)
        return value

    def _governed(self, folder: Path) -> Any:
        if self.worked_here:
            return nullcontext()
        return working(lambda: self._multirun.stopping(folder))

    def _note(self, folder: Path, began: float, outcome: str, value: float | None = None) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            with suppress(OSError):  # a full disk; the job has reported the error already
                self._multirun.note(folder, outcome, value)
        if runs_in_parallel():
            echo(f"{_line(folder.name, outcome, value)}  ({time.monotonic() - began:.0f} s)")

    def ask_to_stop(self) -> bool:
        """Asks jobs in other processes to save and stop; returns whether there may be any such jobs."""
        if self.worked_here or self._multirun.folder is None or not self._multirun.folder.is_dir():
            return False
        self._asked_to_stop = True
        self._multirun.ask_to_stop()
        echo("\nstopping: the jobs save their state first; a second signal doesn't wait for them")
        return True

    def go_on(self, broken: BrokenProcessPool | None) -> bool:
        """Returns whether Hydra is to run the remaining jobs again. Called when Hydra has run the jobs.

        Hydra's joblib plugin ends all jobs when one process is killed. The jobs that were running then run once more,
        one at a time: a job whose process is killed again has failed. The remaining jobs run afterwards.

        Args:
            broken: The exception that reports a killed process, if there is one.
        """
        if self._asked_to_stop:
            return False
        folder = self._multirun.folder
        if broken is not None:
            under_way = self._multirun.under_way()
            if folder is None or not under_way or _searches(folder):
                raise UserError(
                    "the process of a job was killed, and the sweep with it; it may have run out of memory"
                ) from broken
            if self._only is None:
                self._suspects = under_way
                echo(f"\na process was killed; these jobs run again, one at a time: {', '.join(under_way)}")
            else:
                self._give_up(folder, self._only)
        alone = self._only is not None
        self._only = self._suspects.pop(0) if self._suspects else None
        return alone or self._only is not None

    def none_began(self) -> bool:
        """Returns whether no job has begun, in this process or in another one."""
        folder = self._multirun.folder
        began = folder is not None and (not folder.is_dir() or self._multirun.noted(folder))  # it existed
        return not self.worked_here and not began and not self._asked_to_stop

    def _give_up(self, folder: Path, name: str) -> None:
        self.failed = True
        self._multirun.note(folder / name, "failed")
        echo(f"{name}: error: {DIED}")
        about: dict[str, Any] = {}
        with suppress(UserError, OSError):  # the job may have written anything
            about = metrics_of(folder / name)
        with suppress(UserError, OSError):
            text = json.dumps({**about, "status": "failed", "error": DIED}, indent=2) + "\n"
            write_whole(folder / name / "metrics.json", text)

    def report_outcomes(self, interrupted: bool) -> bool:
        """Lists the jobs of a multirun and the commands for the next steps; returns whether all jobs have finished."""
        multirun = self._multirun
        jobs = multirun.ended()
        if len(jobs) > 1:
            monitored = any(ended["value"] is not None for ended in jobs)
            what = ", with their monitored validation metrics" if monitored else ""
            echo(f"\n{len(jobs)} jobs in {multirun.folder}{what}:")
            for ended in jobs:
                echo(f"  {_line(ended['job'], ended['outcome'], ended['value'])}")
        folder = as_typed(str(multirun.folder))
        if interrupted and multirun.folder is not None and (multirun.folder / ABOUT).is_file():
            echo(f"\nresume    {resuming(multirun.typed, folder)}")
        elif len(jobs) > 1 and any(ended["outcome"] == "done" for ended in jobs):
            echo(f"\ncompare               {command('python', '-m', 'mtl.report', folder)}")
            echo(f"view                  {viewing(folder)}")
        if multirun.is_lost() and not self._single and not interrupted and not self.failed:
            sys.stderr.write(f"error: {plain(folder)} no longer exists, so how the jobs ended is unknown\n")
            return False
        return all(ended["outcome"] == "done" for ended in jobs) and not multirun.under_way()


def _searches(folder: Path) -> bool:
    """Returns whether the next jobs depend on the results of the last ones, as with all but Hydra's basic sweeper."""
    return not (folder / "multirun.yaml").is_file()  # written by Hydra's basic sweeper


def _line(job: str, outcome: str, value: float | None) -> str:
    return f"{job:<40} {outcome}" + ("" if value is None else f" {value:.4f}")


def runs_in_parallel() -> bool:
    """Returns whether this job runs in parallel with other jobs of a multirun, so that output lines would mix."""
    hydra_config = HydraConfig.get()
    return hydra_config.mode == RunMode.MULTIRUN and hydra_config.runtime.choices["hydra/launcher"] != "basic"
