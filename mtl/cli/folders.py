"""The folders of configs, user code and runs."""

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

from mtl.chosen_tasks import narrowed
from mtl.errors import UserError
from mtl.runs.resume import Refused, newest_unfinished
from mtl.safety.regular import check_folder

# In a wheel the configs are inside the package, in a checkout next to it.
CONFIG_DIR = next(
    str(folder)
    for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    if (folder / "train.yaml").is_file()
)
TRAININGS = ("train", "graph")  # configs that `task=` completes


def code_folders() -> list[str]:
    """Returns the folders that may contain the user's modules: the current folder and that of --config-dir."""
    sources = HydraConfig.get().runtime.config_sources
    folders = [source.path for source in sources if source.schema == "file" and source.path != CONFIG_DIR]
    return [os.getcwd(), *folders]


def shadowed() -> list[str]:
    """Returns a line for each file of --config-dir that is shadowed by a file of mtl."""
    return [
        f"{path} is not read: mtl's own file of that name comes first; rename yours"
        for folder in code_folders()[1:]
        for path in sorted(Path(folder).rglob("*.yaml"))
        if (Path(CONFIG_DIR) / path.relative_to(folder)).is_file()
    ]


@cache
def run_id() -> str:
    """Returns a folder name that no other process uses."""
    return time.strftime("%Y-%m-%d_%H-%M-%S-") + secrets.token_hex(2)


def root(value: object) -> str:
    """Checks and returns the folder of runs, before Hydra creates it.

    Raises:
        UserError: If the value isn't the name of a folder.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"output_root is {value!r}; it must be the name of a folder")
    check_name(value, "output_root")
    return value


def check_name(folder: str, what: str) -> None:
    """Raises a UserError for a folder name that Hydra can't handle, however it is quoted.

    Args:
        folder: The name of the folder.
        what: The key or flag that sets the folder.
    """
    if "${" in folder:
        raise UserError(f"{what}: '{folder}' contains '${{', which Hydra would replace by a value; use another name")


def run_dir(folder: str, resume: str | None, *, _root_: DictConfig) -> str:
    """Returns the folder of a new run, or of the run to resume.

    Raises:
        UserError: If there is no such run.
    """
    if resume is None:
        return f"{folder}/{run_id()}"
    if resume == "auto":
        ours: Any = OmegaConf.to_container(
            OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"]), resolve=True
        )
        unfinished = newest_unfinished(Path(folder), narrowed(ours))
        return str(unfinished) if unfinished else f"{folder}/{run_id()}"
    if not os.path.lexists(Path(resume) / "config.yaml"):
        raise UserError(f"resume: '{resume}' is not the folder of a run, which would contain a config.yaml")
    checked(Path(resume))
    check_name(resume, "resume")
    return resume


def checked(folder: Path) -> None:
    """Checks the folder of a run that is to be resumed, see `check_folder`.

    Raises:
        Refused: If the folder contains links, or entries that are neither files nor folders.
    """
    try:
        check_folder(folder)
    except UserError as error:
        raise Refused(f"resume: {error}") from error


def log_file(folder: str) -> str:
    """Returns the path of the run's log. Hydra opens it before the job begins; the job refuses an unsound folder."""
    try:
        check_folder(Path(folder))
    except UserError:
        return os.devnull
    return f"{folder}/train.log"


def forget_what_never_began(folder: Path) -> None:
    """Removes the folder of a new run that failed before the training began; jobs of a sweep keep their folders."""
    hydra_config = HydraConfig.get()
    if not folder.is_dir():  # already removed
        return
    written = {path.name for path in folder.iterdir()} - {"train.log", "metrics.json", "config.yaml"}
    if hydra_config.mode == RunMode.RUN and hydra_config.job.config_name in TRAININGS and not written:
        forget(folder)


def forget(folder: Path) -> None:
    """Removes the folder, closes its log, and removes the parent folder if it is empty afterwards."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)  # or the handler would open its file again
            handler.close()
    shutil.rmtree(folder)
    with suppress(OSError):
        folder.parent.rmdir()
