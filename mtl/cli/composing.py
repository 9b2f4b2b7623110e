"""Extends Hydra's composition of a config with the origin of each key."""

import copy
import os.path
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from mtl.cli.exchanged import History, Origin, decided, exchanged, unused
from mtl.cli.folders import CONFIG_DIR, TRAININGS
from mtl.cli.overrides import as_typed
from mtl.config.targets import Unfit, add_code_folders
from mtl.errors import UserError

TYPED = "the command line"


class Composed:
    """The sources of the most recently composed config.

    Attributes:
        names: The names of the sources, in the order in which they were merged.
        root: The origins of the config's keys.
        notes: A line for each node from which keys were left out.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.root = Origin()
        self.notes: list[str] = []


_last = Composed()


class Composer(ConfigLoaderImpl):
    """Composes configs as Hydra does, and leaves out keys of a node that belong to a class that was replaced."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Composes and returns the config; see the method of the base class."""
        self._read: list[tuple[ResultDefault, ConfigResult, Any]] = []
        config = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if config_name in TRAININGS and run_mode == RunMode.RUN:
            self._leave_out(config, overrides)
        self._read = []
        return config

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        loaded = super()._load_single_config(default, repo)
        if not str(default.config_path).startswith("hydra/"):
            self._read.append(
                (default, loaded, OmegaConf.to_container(loaded.config))
            )  # a copy, since merging changes it
        return loaded

    def _leave_out(self, config: DictConfig, overrides: list[str]) -> None:
        global _last
        _last = composed = Composed()
        for number, (default, loaded, content) in enumerate(self._read):
            composed.names.append(_name(default, loaded))
            composed.root.put({key: value for key, value in content.items() if key != "hydra"}, number)
        choices = self._choices()
        typed = len(self._read)
        composed.names.append(TYPED)
        for override in OverridesParser.create().parse_overrides(overrides):
            value, key = override.value(), override.key_or_group
            if not isinstance(value, dict) and self.repository.group_exists(key):
                if isinstance(value, str):
                    choices.setdefault(override.get_key_element().lstrip("+~"), []).append((typed, value))
            elif override.is_delete():
                composed.root.remove(key.split("."))
            else:
                for part in reversed(key.split(".")):
                    value = {part: value}
                composed.root.put(value, typed)
        chosen = {}
        for number, (default, loaded, _) in enumerate(self._read):
            group, _, option = str(default.config_path).rpartition("/")
            history = choices.get(_key(group, default, loaded), [])
            by = decided(history)
            if by is not None and history[-1][1] == option:
                chosen[number] = by

        def at(path: tuple[str, ...]) -> Any:
            node: Any = config
            for key in path:
                node = node[key if key in node else int(key)]
            return node

        add_code_folders([os.getcwd(), *(source.path for source in self.get_sources() if _is_own(source))])
        composed.notes += self._without_effect(composed, choices)
        if "vars" in composed.root.inner:
            composed.notes += unused(composed.root.inner["vars"], typed, OmegaConf.to_yaml(config))
        for path, keys in exchanged(composed.root, chosen, lambda path: OmegaConf.to_container(at(path))):
            self._drop(composed, at(path), path, keys)

    @staticmethod
    def _drop(composed: Composed, node: DictConfig, path: tuple[str, ...], keys: list[str]) -> None:
        origin = composed.root.at(path)
        assert origin is not None
        of = sorted({composed.names[source] for key in keys for source in origin.inner[key].sources})
        where, target = ".".join(path), origin.targets[-1][1]
        with flag_override(node, ["struct", "readonly"], False):
            for key in keys:
                del node[key]
                composed.root.remove((*path, key))
        composed.notes.append(
            f"{where} is now {target}, without the previous class's arguments that it doesn't accept: {_list(keys)} "
            f"(from {_list(of)})"
        )

    def _without_effect(self, composed: Composed, choices: dict[str, History]) -> Iterator[str]:
        """Yields a line for each typed option whose class isn't used, because a later file names another class."""
        for number, (default, loaded, _) in enumerate(self._read):
            group, _, option = str(default.config_path).rpartition("/")
            key = _key(group, default, loaded)
            node = composed.root.at((default.package or "").split("."))
            targets = [name for source, name in node.targets if source == number] if node is not None else []
            if node is None or not targets or choices.get(key, [])[-1:] != [(len(self._read), option)]:
                continue
            by, target = node.targets[-1]
            if by not in (number, len(self._read)) and target != targets[0]:
                yield (
                    f"{key}={option} doesn't replace the class, because {composed.names[by]} names {target}; add "
                    f"{default.package}._target_={targets[0]} to replace it"
                )

    def _choices(self) -> dict[str, History]:
        """Returns, for each group, the options that files choose, with the number of the choosing file."""
        choices: dict[str, History] = {}
        for number, (default, loaded, _) in enumerate(self._read):
            for each in loaded.defaults_list or []:
                if isinstance(each, GroupDefault) and isinstance(each.value, str) and each.value != "???":
                    entry = copy.copy(each)
                    entry.update_parent(os.path.dirname(str(default.config_path)), default.package)
                    choices.setdefault(entry.get_override_key(), []).append((number, str(each.value)))
        return choices


def _key(group: str, default: ResultDefault, loaded: ConfigResult) -> str:
    """Returns the key that overrides the choice of this file: the group, with the package if that differs."""
    if default.override_key is not None:
        return default.override_key
    package = default.package or ""
    usual = loaded.header["package"] is not None or package == group.replace("/", ".")
    return group if usual else f"{group}@{package or '_global_'}"


def _is_own(source: ConfigSource) -> bool:
    return source.scheme() == "file" and source.path != CONFIG_DIR


def _name(default: ResultDefault, loaded: ConfigResult) -> str:
    folder = loaded.path.removeprefix("file://")
    return os.path.join("configs" if folder == CONFIG_DIR else as_typed(folder), f"{default.config_path}.yaml")


def _list(words: list[str]) -> str:
    return ", ".join(words)


@contextmanager
def composing() -> Iterator[None]:
    """Makes Hydra compose configs with `Composer` within the block."""
    internals: Any = hydra._internal.hydra  # the module in which hydra.main looks up the class
    before = internals.ConfigLoaderImpl
    internals.ConfigLoaderImpl = Composer
    try:
        yield
    finally:
        internals.ConfigLoaderImpl = before


def left_out() -> list[str]:
    """Returns a line for each node from which keys were left out, because they belong to a class that was replaced."""
    return _last.notes


@contextmanager
def naming_origins() -> Iterator[None]:
    """Adds the origins of the arguments in the config to an error about the arguments of a class."""
    try:
        yield
    except UserError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Unfit):
            cause = cause.__cause__
        if cause is not None:
            error.args = (f"{error}{_origins(cause)}",)
        raise


def _origins(error: Unfit) -> str:
    path = re.sub(r"\[(\d+)\]", r".\1", error.where).split(".")
    node = _last.root.at(path)
    if node is None or not node.inner:
        return ""
    by: dict[str, list[str]] = {}
    for key, each in node.inner.items():
        by.setdefault(_last.names[each.sources[-1]], []).append(key)
    text = "; ".join(f"{_list(keys)} from {name}" for name, keys in by.items())
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown and unknown[1] in node.inner and unknown[1] not in by.get(TYPED, []):
        text += f"; ~{error.where}.{unknown[1]} leaves it out"
    return f". The config has {text}"
