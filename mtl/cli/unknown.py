"""Overrides of keys that aren't in the config: optional keys are added, all others are explained to the user."""

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from mtl import schema
from mtl.cli.folders import CONFIG_DIR
from mtl.cli.overrides import config_folders, parted
from mtl.errors import UserError, suggest
from mtl.quoting import as_value, command

NOT_OVERRIDDEN = re.compile(r"Could not (?:override '|delete from config\. ')([^']+)'")
# The number of a target's first arguments that mtl passes itself.
NUM_PASSED_ARGUMENTS = {"optimizer": 1, "scheduler": 1, "logger": 2}
GROUPS = ("balancer", "data", "model", "model.trunk", "optimizer", "scheduler", "trainer")
OWN = ["_target_", "_args_", "_partial_"]


def with_plus(typed: Sequence[str], error: Exception, config_name: str) -> list[str] | None:
    """Returns the command line with the pluses that add a missing key, if the config may have the key.

    This applies to keys of the schema, and to keys inside a mapping on the command line.

    Args:
        typed: The command line that Hydra received.
        error: Hydra's error.
        config_name: The config name of the command.

    Returns:
        The new command line; None for other errors, or if the key can't be added.
    """
    key = key_of(error)
    if key is None or "/" in key or "@" in key or not any(word.split("=")[0] == key for word in typed):
        return None
    config = _composed(typed, config_name, key)
    if config is None:
        return None
    node, path = _nearest(config, key)
    missing = key.split(".")[len(path) :]
    may_be = not missing or (len(missing) == 1 and schema.is_known(key) and isinstance(node, DictConfig))
    return [f"++{word}" if may_be and word.split("=")[0] == key else word for word in typed] if may_be else None


def key_of(error: Exception) -> str | None:
    """Returns the key that Hydra didn't find, or None for other errors."""
    match = NOT_OVERRIDDEN.match(str(error).strip()) if isinstance(error, HydraException) else None
    return match[1] if match else None


def without_a_job(typed: Sequence[str]) -> str:
    """Returns the override that sweeps over no value, with the reason; `-m` if there is no such override."""
    parser = OverridesParser.create()
    for word in parted(typed)[1]:
        override = parser.parse_override(word)
        if isinstance(override.value(), Glob) and override.key_or_group in _groups(typed):
            return f"{word}: no option of the group matches"
        if isinstance(override.value(), Glob):
            return f"{word}: glob(…) selects options of a group, and {override.key_or_group} is not a group"
        if isinstance(override.value(), RangeSweep) and not list(override.sweep_iterator()):
            return f"{word}: no number is in this range"
    return "-m"


def nameless(typed: Sequence[str]) -> list[str]:
    """Returns the overrides of groups whose value is a number, null or a boolean, and so no name of an option."""
    parser = OverridesParser.create()
    words = [word for word in parted(typed)[1] if word.partition("=")[0] in ("", *_groups(typed))]
    return [word for word in words if isinstance(parser.parse_override(word).value(), int | float | None)]


def why_not(key: str, typed: Sequence[str], config_name: str) -> str:
    """Explains why the key can't be overridden, and what is possible instead.

    Args:
        key: The dotted key, or a group.
        typed: The command line.
        config_name: The config name of the command.
    """
    override = next((word for word in typed if word.split("=")[0].lstrip("~") == key), f"{key}=…")
    if key in _groups(typed) or "/" in key or "@" in key:
        return f"{key}: {why_no_group(key, typed, override)}"
    composed = _composed(typed, config_name, key)
    if composed is None:
        return f"there is no key '{key}'"
    node, path = _nearest(composed, key)
    where, word = ".".join(path), [*key.split("."), ""][len(path)]
    value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
    if not isinstance(value, Mapping) or not word:
        return _of_value(key, where, value)
    return _of_node(key, where, word, value, override, typed, config_name, is_fixed=_is_structured(node))


def inside_a_list(typed: Sequence[str], config_name: str) -> str | None:
    """Returns a message if an override names an item of a list, on which OmegaConf fails; None otherwise."""
    for word in parted(typed)[1]:
        key = word.partition("=")[0].lstrip("~+")
        config = _composed(typed, config_name, key) if "." in key else None
        node, path = (None, []) if config is None else _nearest(config, key)
        if isinstance(node, ListConfig):
            return _of_value(key, ".".join(path), OmegaConf.to_container(node))
    return None


def why_no_group(key: str, typed: Sequence[str], override: str = "") -> str:
    """Explains why an option of the group can't be overridden.

    Args:
        key: The group, with or without the package of its options.
        typed: The command line.
        override: The override on the command line, if there is one.
    """
    group = key.split("@")[0]
    groups = _groups(typed)
    if group not in groups:
        return f"there is no group '{group}'" + suggest(group, groups)
    if key == "objective":
        return "a task's objective is chosen for a task: " + override.replace("objective", "+objective@tasks.NAME", 1)
    inside = [other for other in groups if key.startswith(f"{other}/")]
    first = f", or choose an option of {inside[0]} that has one" if inside else ""
    how = f"with a plus: {_for_a_shell(f'+{override}')}" if override else f"without `override`: /{key}: …"
    return f"the config has no option of this group yet; add one {how}{first}"


def _groups(typed: Sequence[str]) -> set[str]:
    folders = [Path(CONFIG_DIR), *map(Path, config_folders(typed))]
    files = ((path, folder) for folder in folders for kind in ("*/*.yaml", "*/*/*.yaml") for path in folder.glob(kind))
    return {path.parent.relative_to(folder).as_posix() for path, folder in files}


def _of_value(key: str, where: str, value: Any) -> str:
    """Explains why there is no key below a key whose value isn't a mapping."""
    if value is None and where in GROUPS:
        return f"there is no key '{key}', since {where} is null: first choose one with {where.replace('.', '/')}=…"
    if value is None:
        return f"there is no key '{key}', since {where} is null: set the whole mapping, '{where}={{…}}', or +{key}=…"
    return f"there is no key '{key}': {where} is {value!r}, which has no keys; change it with {where}=…"


def _of_node(
    key: str,
    where: str,
    word: str,
    node: Mapping[Any, Any],
    override: str,
    typed: Sequence[str],
    config_name: str,
    *,
    is_fixed: bool,
) -> str:
    names = [str(name) for name in node if name not in OWN and (where or name != "hydra")]
    if where == "tasks":
        return f"there is no task '{word}'" + suggest(word, names)
    known = below(where, config_name)
    target = node.get("_target_")
    plus = _for_a_shell(f"+{override}")
    taken, anything = _takes(where, target, typed) if target else ([], False)
    if override.startswith("~"):
        return f"there is no key '{key}' to remove" + _possible(word, where, [str(name) for name in node])
    if word in (*known, *taken, *(OWN if target else ())):
        return f"'{key}' isn't in the config yet, though {target or where} can have it; add it with a plus: {plus}"
    of = f": {where} is {target}" if target else ""
    text = f"there is no key '{key}'{of}" + _possible(word, where, list(dict.fromkeys([*names, *known, *taken])))
    if not where and config_name != "evaluate":
        return f"{text}; {schema.VARIABLE}: {_for_a_shell(f'vars.{override}')}"
    return text if not anything and (target or known or is_fixed) else f"{text}; others are added with a plus: {plus}"


def _for_a_shell(override: str) -> str:
    """Returns the override as a user would type it; … stands for a value that is missing on the command line."""
    return override if override.endswith("=…") else command(override)


def below(where: str, config_name: str) -> list[str]:
    """Returns the keys that a config of any problem may have below this one.

    Args:
        where: The dotted key; empty for the top level.
        config_name: The config name of the command.
    """
    if config_name == "evaluate":
        return [] if where else schema.EVALUATE
    if where.startswith("tasks.") and where.count(".") == 1:
        return list(schema.TASK)
    prefix = f"{where}." if where else ""
    rest = [name.removeprefix(prefix) for name in schema.SCHEMA if name.startswith(prefix)]
    of_graph = {"": ["graph"], "graph": list(schema.GRAPH)}.get(where, []) if config_name == "graph" else []
    return [name for name in rest if "." not in name] + of_graph


def _possible(word: str, where: str, names: Sequence[str]) -> str:
    """Returns the same as `suggest`, but the most similar name is a whole config path."""
    near = get_close_matches(word, [name for name in names if name != word], n=1)
    hint = f"; did you mean '{where}{'.' if where else ''}{near[0]}'?" if near else ""
    return f"{hint} (possible{f' in {where}' if where else ''}: {', '.join(sorted(names)) or 'nothing'})"


def _takes(where: str, target: Any, typed: Sequence[str]) -> tuple[list[str], bool]:
    """Returns the arguments of the callable that a config can set, and whether it also accepts arbitrary ones."""
    from mtl.config.targets import add_code_folders, find

    add_code_folders([os.getcwd(), *config_folders(typed)])
    try:
        parameters = list(inspect.signature(find(target, where)).parameters.values())
    except (UserError, TypeError, ValueError):  # the name is wrong, or a built-in has no signature
        return [], False
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    names = [each.name for each in named[NUM_PASSED_ARGUMENTS.get(where.split(".")[0], 0) :]]
    if where == "model":
        names.remove("tasks") if "tasks" in names else None
    return names, any(each.kind == each.VAR_KEYWORD for each in parameters)


def _composed(typed: Sequence[str], config_name: str, left_out: str) -> DictConfig | None:
    """Returns the config of the command line without the overrides of that key and of other missing keys."""
    parser = OverridesParser.create()
    words = []
    for word in parted(typed)[1]:
        override = parser.parse_override(word)
        if not override.is_sweep_override():
            words.append(word)
        elif override.is_choice_sweep() and hasattr(override.value(), "list"):
            words.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}")
    searched = ",".join(as_value(f"file://{folder}") for folder in config_folders(typed))
    if searched:
        words.append(f"hydra.searchpath=[{searched}]")
    while True:
        words = [word for word in words if word.split("=")[0].lstrip("~") != left_out]
        try:
            with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
                return compose(config_name, words, return_hydra_config=True)
        except (ValueError, IndexError, TypeError):  # another override is wrong too
            return None
        except HydraException as error:
            another = key_of(error)
            if another is None or another == left_out:
                return None
            left_out = another


def _nearest(config: DictConfig, key: str) -> tuple[Any, list[str]]:
    """Returns the node of the longest part of the key that is in the config, and this part of the key."""
    node: Any = config
    path: list[str] = []
    for part in key.split("."):
        if not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation() or part not in node:
            break
        node = node._get_node(part)
        path.append(part)
    return node, path


def _is_structured(node: Any) -> bool:
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is not dict
