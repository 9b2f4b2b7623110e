"""What was typed, and what Hydra is given of it."""

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

REPLACED = (  # mappings whose keys are the user's
    *("trainer.monitor", "optimizer.groups", "model.freeze_until", "data.batch_size"),
)
WITH_VALUE = (  # flags
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c"),
)


def parted(typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line's flags, with their values, and its overrides."""
    flags: list[str] = []
    rest: list[str] = []
    words = iter(typed)
    for word in words:
        (flags if word.startswith("-") else rest).append(word)
        if word in WITH_VALUE:
            flags += [following] if (following := next(words, None)) is not None else []
    return flags, rest


def flags_first(typed: Sequence[str]) -> list[str]:
    """The command line with its flags before its overrides: argparse takes no override after another flag."""
    flags, rest = parted(typed)
    return [*flags, *rest]


def gives(typed: Sequence[str], key: str) -> bool:
    """Whether there is an override of that key."""
    return any(argument.split("=")[0].lstrip("+~") == key for argument in parted(typed)[1])


def is_multirun(typed: Sequence[str]) -> bool:
    """Whether values may be swept over."""
    flags, rest = parted(typed)
    return bool({"-m", "--multirun"} & set(flags)) or gives(rest, "sweep") or "hydra.mode=MULTIRUN" in rest


def for_hydra(typed: Sequence[str], config_name: str = "train") -> list[str]:
    """The command line that does in Hydra what the one that was typed means here.

    Values get the quotes that they lack. A variable of the user's own needs no plus. A mapping that is typed takes the
    place of the task's own; Hydra would merge the two. Each of several tasks that `only` names is swept over, where the
    sweep is that of tasks alone. For mtl.evaluate, keys of the data are added to its config: those that may be changed
    are in the run's.
    """
    flags, rest = parted(typed)
    rest = [quoted(argument, multirun=is_multirun(typed)) for argument in rest]
    if config_name == "evaluate":
        return [*flags, *(f"++{arg.lstrip('+')}" if arg.lstrip("+").startswith("data.") else arg for arg in rest)]
    given = [*flags, *(f"++{argument}" if argument.startswith(("vars.", "vars=")) else argument for argument in rest)]
    if "+sweep=single_task" in given:
        given = [re.sub(r"^only=\[(.+)\]$", r"only=\1", argument) for argument in given]
    for key in REPLACED:
        if any(argument.startswith(f"{key}={{") for argument in given):
            others = [argument for argument in given if not argument.startswith(f"{key}={{")]
            added = [f"+{argument}" for argument in given if argument.startswith(f"{key}={{")]
            given = [*others, *_deleting(key), *added]
    return given


def config_folders(typed: Sequence[str]) -> list[str]:
    """The folder of --config-dir, if it is given."""
    words = iter(parted(typed)[0])
    found = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            found.append(os.path.abspath(value if equals else next(words, "")))
    return found[-1:]


def keys(typed: Sequence[str]) -> list[str]:
    """The keys and groups that overrides name."""
    words = [argument for argument in parted(typed)[1] if "=" in argument or argument[:1] == "~"]
    return [argument.split("=")[0].lstrip("+~") for argument in words]


def _deleting(key: str) -> list[str]:
    """Overrides that take the key away: Hydra can't delete one that is null."""
    return [f"++{key}={{x:0}}", f"~{key}"]


def fixed(given: Sequence[str]) -> list[str]:
    """Those overrides of the command line that are the same in all jobs, as Hydra spells them in a job's."""
    parser = OverridesParser.create()
    found = []
    for argument in parted(given)[1]:
        with suppress(HydraException):  # a slip, which Hydra tells
            override = parser.parse_override(argument)
            if not override.is_sweep_override():
                found.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
    return found


def arguments() -> list[str]:
    """What this job was given on the command line, the folder of --config-dir included, to be given again."""
    replaced = tuple(f"+{key}=" for key in REPLACED)
    ours = {spelt for key in REPLACED for spelt in (*_deleting(key), *fixed(_deleting(key)))}
    task = [argument for argument in HydraConfig.get().overrides.task if argument not in ours]
    given = [a.removeprefix("+") if a.startswith(replaced) else a for a in task if not a.startswith("+sweep=")]
    given = [a.removeprefix("++") if schema.is_known(a.split("=")[0].lstrip("+")) else a for a in given]
    folders = [s.path for s in HydraConfig.get().runtime.config_sources if s.provider == "command-line"]
    return [*(part for folder in folders for part in ("--config-dir", as_typed(folder))), *given]


def as_typed(folder: str) -> str:
    """The folder as one would type it here."""
    return as_path(os.path.relpath(folder) if Path(folder).is_relative_to(Path.cwd()) else folder)
