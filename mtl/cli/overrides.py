"""Converts the typed command line to the one that Hydra receives."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from mtl import schema
from mtl.cli.unquoted import quoted
from mtl.quoting import as_path

REPLACED = (  # mappings with keys chosen by the user
    *("trainer.monitor", "optimizer.groups", "model.freeze_until", "data.batch_size"),
)
WITH_VALUE = (  # flags that take a value
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c"),
)


def parted(typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the command line into flags (with their values) and overrides."""
    flags: list[str] = []
    rest: list[str] = []
    words = iter(typed)
    for word in words:
        (flags if word.startswith("-") else rest).append(word)
        if word in WITH_VALUE:
            flags += [following] if (following := next(words, None)) is not None else []
    return flags, rest


def flags_first(typed: Sequence[str]) -> list[str]:
    """Moves the flags before the overrides, because argparse accepts no override between two flags."""
    flags, rest = parted(typed)
    return [*flags, *rest]


def gives(typed: Sequence[str], key: str) -> bool:
    """Returns whether the command line overrides the key."""
    return any(argument.split("=")[0].lstrip("+~") == key for argument in parted(typed)[1])


def is_multirun(typed: Sequence[str]) -> bool:
    """Returns whether the command line asks for a multirun."""
    flags, rest = parted(typed)
    return bool({"-m", "--multirun"} & set(flags)) or gives(rest, "sweep") or "hydra.mode=MULTIRUN" in rest


def for_hydra(typed: Sequence[str], config_name: str = "train") -> list[str]:
    """Returns Hydra's equivalent of the typed command line.

    Missing quotes are added to values. A new variable of the user needs no plus. A typed mapping replaces the mapping
    of the task, whereas Hydra would merge the two. If tasks are swept over, each task in `only` becomes a value of the
    sweep. For mtl.evaluate, keys of the data are added to the config, because the keys that may be changed are in the
    run's config.
    """
    flags, rest = parted(typed)
    rest = [quoted(argument, multirun=is_multirun(typed)) for argument in rest]
    if config_name == "evaluate":
        return [*flags, *(f"++{arg.lstrip('+')}" if arg.lstrip("+").startswith("data.") else arg for arg in rest)]
    arguments = [
        *flags,
        *(f"++{argument}" if argument.startswith(("vars.", "vars=")) else argument for argument in rest),
    ]
    if "+sweep=single_task" in arguments:
        arguments = [re.sub(r"^only=\[(.+)\]$", r"only=\1", argument) for argument in arguments]
    for key in REPLACED:
        if any(argument.startswith(f"{key}={{") for argument in arguments):
            remaining = [argument for argument in arguments if not argument.startswith(f"{key}={{")]
            added = [f"+{argument}" for argument in arguments if argument.startswith(f"{key}={{")]
            arguments = [*remaining, *_deleting(key), *added]
    return arguments


def config_folders(typed: Sequence[str]) -> list[str]:
    """Returns a list with the folder of --config-dir, which is empty if the flag isn't used."""
    words = iter(parted(typed)[0])
    folders = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders.append(os.path.abspath(value if equals else next(words, "")))
    return folders[-1:]


def keys(typed: Sequence[str]) -> list[str]:
    """Returns the keys and groups that the overrides name."""
    words = [argument for argument in parted(typed)[1] if "=" in argument or argument[:1] == "~"]
    return [argument.split("=")[0].lstrip("+~") for argument in words]


def _deleting(key: str) -> list[str]:
    """Returns overrides that delete the key; Hydra can't delete a key whose value is null."""
    return [f"++{key}={{x:0}}", f"~{key}"]


def fixed(arguments: Sequence[str]) -> list[str]:
    """Returns the overrides that are the same in all jobs, as Hydra writes them in the overrides of a job."""
    parser = OverridesParser.create()
    overrides = []
    for argument in parted(arguments)[1]:
        with suppress(HydraException):  # an invalid override, which Hydra reports
            override = parser.parse_override(argument)
            if not override.is_sweep_override():
                overrides.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
    return overrides


def arguments() -> list[str]:
    """Returns the command-line arguments of this job, including --config-dir, so that the job can be run again."""
    replaced = tuple(f"+{key}=" for key in REPLACED)
    ours = {spelt for key in REPLACED for spelt in (*_deleting(key), *fixed(_deleting(key)))}
    task = [argument for argument in HydraConfig.get().overrides.task if argument not in ours]
    overrides = [a.removeprefix("+") if a.startswith(replaced) else a for a in task if not a.startswith("+sweep=")]
    overrides = [a.removeprefix("++") if schema.is_known(a.split("=")[0].lstrip("+")) else a for a in overrides]
    folders = [s.path for s in HydraConfig.get().runtime.config_sources if s.provider == "command-line"]
    return [*(part for folder in folders for part in ("--config-dir", as_typed(folder))), *overrides]


def as_typed(folder: str) -> str:
    """Returns the folder as a user would type it in the current folder."""
    return as_path(os.path.relpath(folder) if Path(folder).is_relative_to(Path.cwd()) else folder)
