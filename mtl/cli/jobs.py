"""The jobs of a command, one or those of a multirun, in this process or in others; and how they end."""

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

from mtl.cli.complaints import show
from mtl.cli.folders import forget, forget_what_never_began
from mtl.cli.overrides import as_typed
from mtl.cli.sweep import ABOUT, Sweep
from mtl.errors import UserError
from mtl.files import patient_screen, write_whole
from mtl.process.signals import Ended, no_exit, working
from mtl.quoting import command, looking, resuming
from mtl.runs.resume import Busy, metrics_of
from mtl.text import plain, say

DIED = "its process was killed; it may have run out of memory"


class Jobs:
    """What is called for each job. It goes into other processes, and what it notes there the multirun's journal has.

    Args:
        job: takes the config, and gives what it monitors.
        config_name: of the command.
        multirun: of which the jobs are, if they are of one.
        tracebacks: whether errors are shown with theirs.

    Attributes:
        failed: whether a job in this process did, or one's process was killed.
        worked_here: whether this process has begun a job itself.
    """

    def __init__(
        self, job: Callable[[DictConfig], float | None], config_name: str, multirun: Sweep, *, tracebacks: bool
    ) -> None:
        self.failed = False
        self._only: str | None = None  # the name of the one job that is to run
        self._suspects: list[str] = []  # jobs that were under way when a process was killed
        self._job = job
        self._config_name = config_name
        self._multirun = multirun
        self._tracebacks = tracebacks
        self._began_in = os.getpid()
        self.worked_here = False
        self._asked_to_stop = False
        self._single = False  # whether the job is no multirun's, which a folder may have been chosen for all the same

    @patient_screen()
    def __call__(self, config: DictConfig) -> float | None:
        """Runs the job of Hydra's folder, unless it isn't to; what goes wrong is told and noted."""
        folder = Path(HydraConfig.get().runtime.output_dir)
        self.worked_here = os.getpid() == self._began_in
        self._single = HydraConfig.get().mode == RunMode.RUN
        there_before = any(os.path.lexists(folder / name) for name in ("config.yaml", "metrics.json"))
        if self.worked_here and self._asked_to_stop:  # before it was known that there are no other processes
            if not there_before:
                forget(folder)
            raise KeyboardInterrupt
        # Hydra's plugin for Optuna stumbles over NaN, and takes None for a trial that failed.
        nothing = None if "optuna" in str(HydraConfig.get().sweeper.get("_target_")) else float("nan")
        if not self.worked_here:
            earlier = self._multirun.noted(folder.parent).get(folder.name)
            if earlier and earlier["outcome"] in ("done", "failed"):
                return nothing if earlier["value"] is None else float(earlier["value"])
            if self._multirun.stopping(folder) or self._only not in (None, folder.name):
                if not there_before:
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
            where = f"{folder.name}: " if beside_others() else ""
            show(error, self._tracebacks or config.get("debug") is True, self._config_name, where)
            self.failed = True
            self._note(folder, began, "busy" if isinstance(error, Busy) else "failed")
            return nothing
        finally:
            if not there_before:
                forget_what_never_began(folder)
        self._note(folder, began, "done", value)
        return value

    def _governed(self, folder: Path) -> Any:
        if self.worked_here:
            return nullcontext()
        return working(lambda: self._multirun.stopping(folder))

    def _note(self, folder: Path, began: float, outcome: str, value: float | None = None) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            with suppress(OSError):  # a full disk: the job has said what went wrong
                self._multirun.note(folder, outcome, value)
        if beside_others():
            say(f"{_line(folder.name, outcome, value)}  ({time.monotonic() - began:.0f} s)")

    def ask_to_stop(self) -> bool:
        """Asks jobs in other processes to save and end; gives whether there may be any."""
        if self.worked_here or self._multirun.folder is None or not self._multirun.folder.is_dir():
            return False
        self._asked_to_stop = True
        self._multirun.ask_to_stop()
        say("\nstopping: the jobs save where they are; once more doesn't wait for them")
        return True

    def go_on(self, broken: BrokenProcessPool | None) -> bool:
        """Called when Hydra has run the jobs; gives whether it is to run them again, those that have ended left out.

        Hydra's plugin for joblib ends all jobs with the first process that is killed. Those that were under way then
        run once more, each by itself: if its process is killed again, it has failed. After them the others run.

        Args:
            broken: what was raised because a process was killed.
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
                say(f"\na process was killed; run again, each by itself: {', '.join(under_way)}")
            else:
                self._give_up(folder, self._only)
        alone = self._only is not None
        self._only = self._suspects.pop(0) if self._suspects else None
        return alone or self._only is not None

    def had_none(self) -> bool:
        """Whether no job has begun, here or elsewhere."""
        folder = self._multirun.folder
        elsewhere = folder is not None and (not folder.is_dir() or self._multirun.noted(folder))  # gone: it was made
        return not self.worked_here and not elsewhere and not self._asked_to_stop

    def _give_up(self, folder: Path, name: str) -> None:
        self.failed = True
        self._multirun.note(folder / name, "failed")
        say(f"{name}: error: {DIED}")
        about: dict[str, Any] = {}
        with suppress(UserError, OSError):  # what it wrote may be of any kind
            about = metrics_of(folder / name)
        with suppress(UserError, OSError):
            text = json.dumps({**about, "status": "failed", "error": DIED}, indent=2) + "\n"
            write_whole(folder / name / "metrics.json", text)

    def say_how_they_ended(self, interrupted: bool) -> bool:
        """Lists a multirun's jobs and says what one may do next; gives whether all of them are done."""
        multirun = self._multirun
        jobs = multirun.ended()
        if len(jobs) > 1:
            monitored = any(ended["value"] is not None for ended in jobs)
            what = ", each with what it monitors on validation" if monitored else ""
            say(f"\n{len(jobs)} jobs in {multirun.folder}{what}:")
            for ended in jobs:
                say(f"  {_line(ended['job'], ended['outcome'], ended['value'])}")
        folder = as_typed(str(multirun.folder))
        if interrupted and multirun.folder is not None and (multirun.folder / ABOUT).is_file():
            say(f"\ngo on     {resuming(multirun.typed, folder)}")
        elif len(jobs) > 1 and any(ended["outcome"] == "done" for ended in jobs):
            say(f"\ncompare               {command('python', '-m', 'mtl.report', folder)}")
            say(f"look                  {looking(folder)}")
        if multirun.is_lost() and not self._single and not interrupted and not self.failed:
            sys.stderr.write(f"error: {plain(folder)} is gone, and with it how the jobs ended\n")
            return False
        return all(ended["outcome"] == "done" for ended in jobs) and not multirun.under_way()


def _searches(folder: Path) -> bool:
    """Whether the next jobs depend on how the last ones ended, as with other sweepers than Hydra's own."""
    return not (folder / "multirun.yaml").is_file()  # which that one writes


def _line(job: str, outcome: str, value: float | None) -> str:
    return f"{job:<40} {outcome}" + ("" if value is None else f" {value:.4f}")


def beside_others() -> bool:
    """Whether this is a job of a multirun's that run side by side, whose lines would come between each other's."""
    hydra_config = HydraConfig.get()
    return hydra_config.mode == RunMode.MULTIRUN and hydra_config.runtime.choices["hydra/launcher"] != "basic"
