"""Keys that aren't in the config: those that may be left out of it are added, of all others it is said why."""

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
GIVEN = {"optimizer": 1, "scheduler": 1, "logger": 2}  # how many of a target's first arguments no config gives
GROUPS = ("balancer", "data", "model", "model.trunk", "optimizer", "scheduler", "trainer")
OWN = ["_target_", "_args_", "_partial_"]


def with_plus(given: Sequence[str], error: Exception, config_name: str) -> list[str] | None:
    """The command line with the pluses by which a key is added that the config lacks and may have.

    That is one of the schema, or one inside a mapping that was typed.

    Args:
        given: the command line, as Hydra was given it.
        error: what Hydra said of it.
        config_name: of the command.

    Returns:
        None where the error is of something else, or the key is none that could be added.
    """
    key = key_of(error)
    if key is None or "/" in key or "@" in key or not any(word.split("=")[0] == key for word in given):
        return None
    config = _composed(given, config_name, key)
    if config is None:
        return None
    node, path = _nearest(config, key)
    missing = key.split(".")[len(path) :]
    may_be = not missing or (len(missing) == 1 and schema.is_known(key) and isinstance(node, DictConfig))
    return [f"++{word}" if may_be and word.split("=")[0] == key else word for word in given] if may_be else None


def key_of(error: Exception) -> str | None:
    """The key that Hydra didn't find, None where it complains of something else."""
    found = NOT_OVERRIDDEN.match(str(error).strip()) if isinstance(error, HydraException) else None
    return found[1] if found else None


def without_a_job(given: Sequence[str]) -> str:
    """The override that is a sweep over nothing, and why it is."""
    parser = OverridesParser.create()
    for word in parted(given)[1]:
        override = parser.parse_override(word)
        if isinstance(override.value(), Glob) and override.key_or_group in _groups(given):
            return f"{word}: no option of the group matches"
        if isinstance(override.value(), Glob):
            return f"{word}: glob(…) chooses among the options of a group, and this is none"
        if isinstance(override.value(), RangeSweep) and not list(override.sweep_iterator()):
            return f"{word}: no number is in this range"
    return "-m"


def nameless(given: Sequence[str]) -> list[str]:
    """Overrides of groups that give a number, null, or true or false, which no option is called."""
    parser = OverridesParser.create()
    words = [word for word in parted(given)[1] if word.partition("=")[0] in ("", *_groups(given))]
    return [word for word in words if isinstance(parser.parse_override(word).value(), int | float | None)]


def why_not(key: str, given: Sequence[str], config_name: str) -> str:
    """Why there is no such key to be changed, and what could be given instead.

    Args:
        key: with dots, or a group.
        given: the command line.
        config_name: of the command.
    """
    typed = next((word for word in given if word.split("=")[0].lstrip("~") == key), f"{key}=…")
    if key in _groups(given) or "/" in key or "@" in key:
        return f"{key}: {why_no_group(key, given, typed)}"
    composed = _composed(given, config_name, key)
    if composed is None:
        return f"there is no key '{key}'"
    node, path = _nearest(composed, key)
    where, word = ".".join(path), [*key.split("."), ""][len(path)]
    value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
    if not isinstance(value, Mapping) or not word:
        return _of_value(key, where, value)
    return _of_node(key, where, word, value, typed, given, config_name, is_fixed=_is_structured(node))


def inside_a_list(given: Sequence[str], config_name: str) -> str | None:
    """What there is to say of an override of something inside a list, on which OmegaConf fails; None without one."""
    for word in parted(given)[1]:
        key = word.partition("=")[0].lstrip("~+")
        config = _composed(given, config_name, key) if "." in key else None
        node, path = (None, []) if config is None else _nearest(config, key)
        if isinstance(node, ListConfig):
            return _of_value(key, ".".join(path), OmegaConf.to_container(node))
    return None


def why_no_group(key: str, given: Sequence[str], typed: str = "") -> str:
    """Why no other option of a group can be chosen.

    Args:
        key: the group, perhaps with the place of its options.
        given: the command line.
        typed: the override, if it was typed.
    """
    group = key.split("@")[0]
    groups = _groups(given)
    if group not in groups:
        return f"there is no group '{group}'" + suggest(group, groups)
    if key == "objective":
        return "a task's objective is chosen with its place: " + typed.replace("objective", "+objective@tasks.NAME", 1)
    inside = [other for other in groups if key.startswith(f"{other}/")]
    first = f", or an option of {inside[0]} that has one is chosen first" if inside else ""
    how = f"with a plus: {_for_a_shell(f'+{typed}')}" if typed else f"without `override`: /{key}: …"
    return f"no option of this group is in the config so far; one is added {how}{first}"


def _groups(given: Sequence[str]) -> set[str]:
    folders = [Path(CONFIG_DIR), *map(Path, config_folders(given))]
    found = ((path, folder) for folder in folders for kind in ("*/*.yaml", "*/*/*.yaml") for path in folder.glob(kind))
    return {path.parent.relative_to(folder).as_posix() for path, folder in found}


def _of_value(key: str, where: str, value: Any) -> str:
    """Of a key below one that has a value of its own."""
    if value is None and where in GROUPS:
        return f"there is no key '{key}', since {where} is null: first choose one with {where.replace('.', '/')}=…"
    if value is None:
        return f"there is no key '{key}', since {where} is null: give the whole of it, '{where}={{…}}', or +{key}=…"
    return f"there is no key '{key}': {where} is {value!r}, in which there are no keys; that is changed with {where}=…"


def _of_node(
    key: str,
    where: str,
    word: str,
    node: Mapping[Any, Any],
    typed: str,
    given: Sequence[str],
    config_name: str,
    *,
    is_fixed: bool,
) -> str:
    names = [str(name) for name in node if name not in OWN and (where or name != "hydra")]
    if where == "tasks":
        return f"there is no task '{word}'" + suggest(word, names)
    known = below(where, config_name)
    target = node.get("_target_")
    plus = _for_a_shell(f"+{typed}")
    taken, anything = _takes(where, target, given) if target else ([], False)
    if typed.startswith("~"):
        return f"there is no key '{key}' to be taken away" + _possible(word, where, [str(name) for name in node])
    if word in (*known, *taken, *(OWN if target else ())):
        return f"'{key}' isn't in the config so far, though {target or where} can have it; add it with a plus: {plus}"
    of = f": {where} is {target}" if target else ""
    text = f"there is no key '{key}'{of}" + _possible(word, where, list(dict.fromkeys([*names, *known, *taken])))
    if not where and config_name != "evaluate":
        return f"{text}; {schema.VARIABLE}: {_for_a_shell(f'vars.{typed}')}"
    return text if not anything and (target or known or is_fixed) else f"{text}; others are added with a plus: {plus}"


def _for_a_shell(override: str) -> str:
    """The override as one would type it; … stands for a value that wasn't typed."""
    return override if override.endswith("=…") else command(override)


def below(where: str, config_name: str) -> list[str]:
    """The keys that a config may have below this one, as far as they are the same for every problem.

    Args:
        where: with dots; empty for the top.
        config_name: of the command.
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
    """Like `suggest`, with the nearest name written as one would type it."""
    near = get_close_matches(word, [name for name in names if name != word], n=1)
    hint = f"; did you mean '{where}{'.' if where else ''}{near[0]}'?" if near else ""
    return f"{hint} (possible{f' in {where}' if where else ''}: {', '.join(sorted(names)) or 'nothing'})"


def _takes(where: str, target: Any, given: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments that a config can give the target, and whether it takes others besides."""
    from mtl.config.targets import add_code_folders, find  # what it finds may import torch, which takes seconds

    add_code_folders([os.getcwd(), *config_folders(given)])
    try:
        parameters = list(inspect.signature(find(target, where)).parameters.values())
    except (UserError, TypeError, ValueError):  # the name is wrong, or a built-in's, of which nothing is known
        return [], False
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    names = [each.name for each in named[GIVEN.get(where.split(".")[0], 0) :]]
    if where == "model":
        names.remove("tasks") if "tasks" in names else None
    return names, any(each.kind == each.VAR_KEYWORD for each in parameters)


def _composed(given: Sequence[str], config_name: str, left_out: str) -> DictConfig | None:
    """The config of the command line without the overrides of that key, nor others that can't be followed."""
    parser = OverridesParser.create()
    words = []
    for word in parted(given)[1]:
        override = parser.parse_override(word)
        if not override.is_sweep_override():
            words.append(word)
        elif override.is_choice_sweep() and hasattr(override.value(), "list"):
            words.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}")
    searched = ",".join(as_value(f"file://{folder}") for folder in config_folders(given))
    if searched:
        words.append(f"hydra.searchpath=[{searched}]")
    while True:
        words = [word for word in words if word.split("=")[0].lstrip("~") != left_out]
        try:
            with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
                return compose(config_name, words, return_hydra_config=True)
        except (ValueError, IndexError, TypeError):  # another override fails too
            return None
        except HydraException as error:
            another = key_of(error)
            if another is None or another == left_out:
                return None
            left_out = another


def _nearest(config: DictConfig, key: str) -> tuple[Any, list[str]]:
    """Of what stands above a key, and is in the config, the lowest: its node, and its own key in parts."""
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
