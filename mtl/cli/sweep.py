"""A multirun: its folder, the names of its jobs, and a journal of how they ended."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mtl.errors import UserError, first_line
from mtl.files import write_whole
from mtl.quoting import command
from mtl.runs.resume import IRRELEVANT
from mtl.safety.bounded import LARGEST, LONGEST, parse_json, read_json, read_lines
from mtl.safety.regular import check_folder, regular
from mtl.text import echo, log

STOP = "stop-"  # prefix of the files that ask jobs to stop
ABOUT = "sweep.json"  # the command line
JOURNAL = "jobs.jsonl"  # one line of JSON per job event, from all processes


class Sweep:
    """One multirun, new or resumed. It is pickled with the jobs into other processes.

    Args:
        typed: The command line, without the program's name, with the flags first.
        new: The folder name of a new multirun, which no other process uses.
        fixed: The overrides that are the same in all jobs, as they are written in a job's overrides.

    Attributes:
        folder: The folder that contains the jobs' folders, after `choose_folder`.
    """

    def __init__(self, typed: Sequence[str], new: str, fixed: Sequence[str] = ()) -> None:
        self.typed = list(typed)
        self.fixed = list(fixed)
        self.new = new
        self.folder: Path | None = None
        self._empty = False

    def choose_folder(self, root: str, resume: str | None) -> str:
        """Returns the folder of a new multirun, or of the multirun to resume.

        Args:
            root: The folder of multiruns.
            resume: null; `auto` for the newest multirun with the same arguments, if there is one; or a folder.

        Raises:
            UserError: If the folder isn't a multirun's, or is that of a multirun with other arguments.
        """
        folder = Path(root) / self.new
        if resume == "auto":
            folder = next((path for path, typed in _newest_first(root) if _same(typed, self.typed)), folder)
        elif resume is not None:
            folder = Path(resume)
            try:
                check_folder(folder)
                theirs = arguments(folder)
            except UserError as error:
                raise UserError(f"resume: {error}") from error
            except OSError as error:
                why = f"resume: '{resume}' is not the folder of a multirun, which would contain a {ABOUT}"
                raise UserError(why) from error
            if not _same(theirs, self.typed):
                raise UserError(f"resume: '{resume}' was started with other arguments: {command(*theirs)}")
        if self.folder is None and resume == "auto" and not folder.exists():
            echo("resume   there is no multirun with these arguments: a new one begins")
        self.folder = folder
        return str(folder)

    def begin(self, job: Path) -> None:
        """Writes the multirun's command line to the multirun's folder, before the job of folder `job` begins."""
        if not (job.parent / ABOUT).exists():
            about = {"arguments": self.typed, "fixed": self.fixed}
            write_whole(job.parent / ABOUT, json.dumps(about) + "\n")
        self.note(job, "began")

    def job_name(self, number: int, overrides: Sequence[str]) -> str:
        """Returns a short, portable name, such as `0_lr-0.001_seed-0` for a sweep over optimizer.lr and seed."""
        swept = [override for override in overrides if override not in self.fixed]
        names = [name for override in swept if "=" in override for name in _names(*override.split("=", 1))]
        return "_".join([str(number), *names])[:100]

    def note(self, job: Path, outcome: str, value: float | None = None) -> None:
        """Records the state of the job with this folder in the journal.

        Args:
            job: The folder of the job.
            outcome: began, done, failed, stopped, or busy (another process is running the job).
            value: The monitored value of a job that is done.
        """
        line = json.dumps({"by": self.new, "job": job.name, "outcome": outcome, "value": value}).encode()
        with open(job.parent / JOURNAL, "a+b", buffering=0, opener=regular) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # a full disk may have truncated the last line
            file.write(line + b"\n")

    def noted(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Returns the last journal entry of each job of this multirun."""
        jobs = {}
        with suppress(OSError, UserError):  # no journal, or not that of a multirun
            for line in read_lines(folder / JOURNAL, LARGEST, LONGEST):
                with suppress(ValueError, LookupError, TypeError):  # a truncated line
                    noted = parse_json(line, JOURNAL)
                    if noted["by"] == self.new:
                        jobs[str(noted["job"])] = noted
        return dict(sorted(jobs.items(), key=lambda item: _number(item[0])))

    def is_lost(self) -> bool:
        """Returns whether the journal is missing although jobs have begun."""
        return self.folder is not None and not self._empty and not (self.folder / JOURNAL).is_file()

    def under_way(self) -> list[str]:
        """Returns the jobs that have begun and not ended."""
        jobs = self.noted(self.folder) if self.folder else {}
        return [name for name, noted in jobs.items() if noted["outcome"] == "began"]

    def ended(self) -> list[dict[str, Any]]:
        """Returns the journal entries of the jobs that have ended."""
        jobs = self.noted(self.folder) if self.folder else {}
        return [noted for noted in jobs.values() if noted["outcome"] != "began"]

    def ask_to_stop(self) -> None:
        """Asks the jobs in all processes to save and stop; jobs that haven't begun don't start."""
        assert self.folder is not None
        self._stop_of(self.folder).touch()

    def stopping(self, job: Path) -> bool:
        """Returns whether the job with this folder was asked to stop."""
        return self._stop_of(job.parent).exists()

    def tidy(self, *, keep_stop: bool = False) -> None:
        """Removes files that are no longer needed: stop requests, and the folder if no job has begun.

        Args:
            keep_stop: Whether to keep the stop requests, because jobs may still be queued in other processes.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        if not keep_stop:
            for path in self.folder.glob(f"{STOP}*"):  # including those of processes that were killed before
                path.unlink(missing_ok=True)
        if {path.name for path in self.folder.iterdir()} <= {"multirun.yaml"}:
            self._empty = True
            shutil.rmtree(self.folder)

    def _stop_of(self, folder: Path) -> Path:
        return folder / f"{STOP}{self.new}"  # the name of the multirun, so that an old request stops no other jobs


def arguments(folder: Path) -> list[str]:
    """Returns the command line with which the multirun of the folder was started."""
    return _about(folder, "arguments")


def fixed(folder: Path) -> list[str]:
    """Returns the overrides that are the same in all jobs of the folder's multirun, as written in a job's overrides."""
    return _about(folder, "fixed")


def _about(folder: Path, key: str) -> list[str]:
    """Reads a list of texts that was written when the multirun began.

    Raises:
        UserError: If there is no such list.
        OSError: If there is no such file.
    """
    about = read_json(folder / ABOUT)
    texts = about.get(key) if isinstance(about, dict) else None
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise UserError(f"{folder / ABOUT} holds no list of texts '{key}'")
    return texts


def _number(job: str) -> float:
    number = job.split("_")[0]
    return float(number) if number.isdecimal() else inf


def _newest_first(root: str) -> Iterator[tuple[Path, list[str]]]:
    for path in sorted(Path(root).glob(f"*/{ABOUT}"), reverse=True):
        try:
            typed = arguments(path.parent)
            check_folder(path.parent)
        except (OSError, UserError) as error:  # the folder may belong to something else
            log.warning("%s is skipped: %s", path.parent, first_line(error))
            continue
        yield path.parent, typed


def _same(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Returns whether both command lines define the same jobs."""
    return list(_relevant(theirs)) == list(_relevant(ours))


def _relevant(typed: Sequence[str]) -> Iterator[str]:
    for argument in typed:
        key = argument.lstrip("+~").split("=")[0]
        is_launch = key in ("-m", "--multirun", "hydra/launcher") or key.startswith("hydra.launcher.")
        if not is_launch and not makes_no_difference(argument):
            yield argument


def makes_no_difference(override: str) -> bool:
    """Returns whether the override's key has no influence on a run's results."""
    key = override.lstrip("+~").split("=")[0]
    return any(key == name or key.startswith(f"{name}.") for name in IRRELEVANT)


def _names(key: str, value: str) -> list[str]:
    """Returns the parts of a swept value for the job's name: for a mapping the values, for a task weight the task."""
    parts = key.lstrip("+").split(".")
    if value.startswith("{"):
        plain = OmegaConf.to_container(OmegaConf.create(re.sub(r":(?=\S)", ": ", value)))
        return [f"{_plain(name)}-{_short(str(each))}" for name, each in _leaves(plain)]
    weight = parts[0] == "tasks" and parts[-1] == "weight"
    return [f"{_plain(parts[-2 if weight else -1])}-{_short(value)}"]


def _short(value: str) -> str:
    """Shortens a number that isn't an integer to a few digits."""
    try:
        number = f"{float(value):.4g}".replace("e+", "e")
    except ValueError:
        return _plain(value)
    return value if value.lstrip("-").isdecimal() else number


def _plain(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _leaves(value, str(key))
        else:
            yield (name if key == "weight" and name else str(key)), value
