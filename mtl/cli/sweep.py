"""A multirun: its folder, its jobs' names, and how its jobs ended."""

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
from mtl.text import log, say

STOP = "stop-"  # begins the names of files that ask jobs to
ABOUT = "sweep.json"  # what was typed
JOURNAL = "jobs.jsonl"  # how each job ended, a line of JSON each, by whichever process it ran in


class Sweep:
    """One multirun, from its start or from where an earlier one was interrupted to its end.

    It goes with the jobs into other processes.

    Args:
        typed: the command line, without the program's name, its flags first.
        new: the name of a new multirun's folder, which no other process has.
        fixed: the overrides that are the same in all jobs, as they stand in a job's.

    Attributes:
        folder: where the jobs' folders are, once it has been asked for.
    """

    def __init__(self, typed: Sequence[str], new: str, fixed: Sequence[str] = ()) -> None:
        self.typed = list(typed)
        self.fixed = list(fixed)
        self.new = new
        self.folder: Path | None = None
        self._empty = False

    def choose_folder(self, root: str, resume: str | None) -> str:
        """The folder of the multirun: a new one, or that of the one that is to go on.

        Args:
            root: where multiruns are.
            resume: null, `auto` for the newest that was started with the same arguments, if any, or its folder.

        Raises:
            UserError: for a folder that isn't a multirun's, or one of other arguments.
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
                why = f"resume: '{resume}' is not the folder of a multirun; it would hold a {ABOUT}"
                raise UserError(why) from error
            if not _same(theirs, self.typed):
                raise UserError(f"resume: '{resume}' was begun with other arguments: {command(*theirs)}")
        if self.folder is None and resume == "auto" and not folder.exists():
            say("resume   there is no multirun with these arguments: a new one begins")
        self.folder = folder
        return str(folder)

    def begin(self, job: Path) -> None:
        """Writes down, before a job of that folder begins, of which multirun it is."""
        if not (job.parent / ABOUT).exists():
            about = {"arguments": self.typed, "fixed": self.fixed}
            write_whole(job.parent / ABOUT, json.dumps(about) + "\n")
        self.note(job, "began")

    def job_name(self, number: int, overrides: Sequence[str]) -> str:
        """`0_lr-0.001_seed-0` for a job whose optimizer.lr and seed are swept: short, and a valid name everywhere."""
        swept = [override for override in overrides if override not in self.fixed]
        names = [name for override in swept if "=" in override for name in _names(*override.split("=", 1))]
        return "_".join([str(number), *names])[:100]

    def note(self, job: Path, outcome: str, value: float | None = None) -> None:
        """Writes down how the job of that folder stands.

        Args:
            outcome: began, done, failed, stopped, or busy: another process is at it.
            value: what it monitors, of one that is done.
        """
        line = json.dumps({"by": self.new, "job": job.name, "outcome": outcome, "value": value}).encode()
        with open(job.parent / JOURNAL, "a+b", buffering=0, opener=regular) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # on a full disk one may have been cut off
            file.write(line + b"\n")

    def noted(self, folder: Path) -> dict[str, dict[str, Any]]:
        """By job, what this multirun's processes noted last."""
        jobs = {}
        with suppress(OSError, UserError):  # there is none, or nothing that could be of this multirun
            for line in read_lines(folder / JOURNAL, LARGEST, LONGEST):
                with suppress(ValueError, LookupError, TypeError):  # a line that was cut off
                    noted = parse_json(line, JOURNAL)
                    if noted["by"] == self.new:
                        jobs[str(noted["job"])] = noted
        return dict(sorted(jobs.items(), key=lambda item: _number(item[0])))

    def is_lost(self) -> bool:
        """Whether what was noted of the jobs is gone; where none began, nothing was."""
        return self.folder is not None and not self._empty and not (self.folder / JOURNAL).is_file()

    def under_way(self) -> list[str]:
        """The jobs that began and haven't ended."""
        jobs = self.noted(self.folder) if self.folder else {}
        return [name for name, noted in jobs.items() if noted["outcome"] == "began"]

    def ended(self) -> list[dict[str, Any]]:
        """What was noted of the jobs that ended."""
        jobs = self.noted(self.folder) if self.folder else {}
        return [noted for noted in jobs.values() if noted["outcome"] != "began"]

    def ask_to_stop(self) -> None:
        """Asks the jobs, in whichever process, to save and end; those that haven't begun don't."""
        assert self.folder is not None
        self._stop_of(self.folder).touch()

    def stopping(self, job: Path) -> bool:
        """Whether the job of that folder was asked to."""
        return self._stop_of(job.parent).exists()

    def tidy(self, *, keep_stop: bool = False) -> None:
        """Removes what is of no use any more: the folder, where no job began in it, and what asked the jobs to stop.

        Args:
            keep_stop: where jobs may still be queued elsewhere.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        if not keep_stop:
            for path in self.folder.glob(f"{STOP}*"):  # also of those that didn't get to
                path.unlink(missing_ok=True)
        if {path.name for path in self.folder.iterdir()} <= {"multirun.yaml"}:
            self._empty = True
            shutil.rmtree(self.folder)

    def _stop_of(self, folder: Path) -> Path:
        return folder / f"{STOP}{self.new}"  # one that a process left that was killed means nobody else's jobs


def arguments(folder: Path) -> list[str]:
    """What the multirun of the folder was started with."""
    return _about(folder, "arguments")


def fixed(folder: Path) -> list[str]:
    """The overrides that are the same in all jobs of the multirun of the folder, as they stand in a job's."""
    return _about(folder, "fixed")


def _about(folder: Path, key: str) -> list[str]:
    """A list of texts that was written down when the multirun began.

    Raises:
        UserError: where there is no such list.
        OSError: where there is no such file.
    """
    about = read_json(folder / ABOUT)
    found = about.get(key) if isinstance(about, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UserError(f"{folder / ABOUT} holds no list of texts '{key}'")
    return found


def _number(job: str) -> float:
    number = job.split("_")[0]
    return float(number) if number.isdecimal() else inf


def _newest_first(root: str) -> Iterator[tuple[Path, list[str]]]:
    for path in sorted(Path(root).glob(f"*/{ABOUT}"), reverse=True):
        try:
            typed = arguments(path.parent)
            check_folder(path.parent)
        except (OSError, UserError) as error:  # it may be anybody's
            log.warning("%s is passed over: %s", path.parent, first_line(error))
            continue
        yield path.parent, typed


def _same(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether both command lines mean the same jobs."""
    return list(_telling(theirs)) == list(_telling(ours))


def _telling(typed: Sequence[str]) -> Iterator[str]:
    for argument in typed:
        key = argument.lstrip("+~").split("=")[0]
        elsewhere = key in ("-m", "--multirun", "hydra/launcher") or key.startswith("hydra.launcher.")
        if not elsewhere and not makes_no_difference(argument):
            yield argument


def makes_no_difference(override: str) -> bool:
    """Whether the override's key has no bearing on a run's numbers."""
    key = override.lstrip("+~").split("=")[0]
    return any(key == name or key.startswith(f"{name}.") for name in IRRELEVANT)


def _names(key: str, value: str) -> list[str]:
    """What of a swept value is shown in the job's name; of a mapping what is in it, of a task's weight the task."""
    parts = key.lstrip("+").split(".")
    if value.startswith("{"):
        plain = OmegaConf.to_container(OmegaConf.create(re.sub(r":(?=\S)", ": ", value)))
        return [f"{_plain(name)}-{_short(str(each))}" for name, each in _leaves(plain)]
    weight = parts[0] == "tasks" and parts[-1] == "weight"
    return [f"{_plain(parts[-2 if weight else -1])}-{_short(value)}"]


def _short(value: str) -> str:
    """A number in few digits, if it isn't a whole one."""
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
