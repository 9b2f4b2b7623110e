"""Where configs, code and runs are."""

import logging
import os
import secrets
import shutil
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mtl import schema
from mtl.errors import UserError
from mtl.runs.resume import Refused, newest_unfinished
from mtl.safety.regular import check_folder

# In a wheel the configs are inside the package, in a checkout beside it.
CONFIG_DIR = next(
    str(folder)
    for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    if (folder / "train.yaml").is_file()
)
TRAININGS = ("train", "graph")  # configs that `task=` completes


def code_folders() -> list[str]:
    """Where modules of the user's own may be: the current folder, and that of --config-dir."""
    sources = HydraConfig.get().runtime.config_sources
    own = [source.path for source in sources if source.schema == "file" and source.path != CONFIG_DIR]
    return [os.getcwd(), *own]


def shadowed() -> list[str]:
    """A line for each file of --config-dir that isn't read."""
    return [
        f"{path} is not read: mtl's own file of that name comes first; rename yours"
        for folder in code_folders()[1:]
        for path in sorted(Path(folder).rglob("*.yaml"))
        if (Path(CONFIG_DIR) / path.relative_to(folder)).is_file()
    ]


@cache
def run_id() -> str:
    """The name of a folder that no other process has."""
    return time.strftime("%Y-%m-%d_%H-%M-%S-") + secrets.token_hex(2)


def root(value: object) -> str:
    """The folder for runs, looked over before Hydra makes it.

    Raises:
        UserError: for what isn't the name of a folder.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"output_root is {value!r}; it must be the name of a folder")
    check_name(value, "output_root")
    return value


def check_name(folder: str, what: str) -> None:
    """Raises a UserError for a folder that Hydra can't work in, by whatever quotes.

    Args:
        folder: its name.
        what: the key or flag that gives it.
    """
    if "${" in folder:
        raise UserError(f"{what}: '{folder}' holds '${{', in whose place Hydra would put a value; give another name")


def run_dir(folder: str, resume: str | None, *, _root_: DictConfig) -> str:
    """The run's folder: a new one, or that of the run that is to go on.

    Raises:
        UserError: where there is no such run.
    """
    if resume is None:
        return f"{folder}/{run_id()}"
    if resume == "auto":
        ours: Any = OmegaConf.to_container(
            OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"]), resolve=True
        )
        found = newest_unfinished(Path(folder), schema.narrowed(ours))
        return str(found) if found else f"{folder}/{run_id()}"
    if not os.path.lexists(Path(resume) / "config.yaml"):
        raise UserError(f"resume: '{resume}' is not the folder of a run; it would hold a config.yaml")
    checked(Path(resume))
    check_name(resume, "resume")
    return resume


def checked(folder: Path) -> None:
    """Looks over a folder that is to go on, see `check_folder`.

    Raises:
        Refused: where there is something in it that would lead elsewhere.
    """
    try:
        check_folder(folder)
    except UserError as error:
        raise Refused(f"resume: {error}") from error


def log_file(folder: str) -> str:
    """The file of a run's log, which Hydra opens before the job begins; the job refuses a folder that isn't sound."""
    try:
        check_folder(Path(folder))
    except UserError:
        return os.devnull
    return f"{folder}/train.log"


def forget_what_never_began(folder: Path) -> None:
    """Removes the folder of a new run that failed before anything was trained; in a sweep it stays, to say so."""
    hydra_config = HydraConfig.get()
    if not folder.is_dir():  # somebody has removed it
        return
    kept = {path.name for path in folder.iterdir()} - {"train.log", "metrics.json", "config.yaml"}
    if hydra_config.mode == RunMode.RUN and hydra_config.job.config_name in TRAININGS and not kept:
        forget(folder)


def forget(folder: Path) -> None:
    """Removes the folder, whose log is open, and the one that it is in, if that is then empty."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)  # it would open its file again
            handler.close()
    shutil.rmtree(folder)
    with suppress(OSError):
        folder.parent.rmdir()
