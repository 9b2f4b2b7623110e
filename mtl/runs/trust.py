"""Checks which code a run's checkpoint names, because the run may come from somebody else."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mtl.config.targets import find
from mtl.errors import UserError, is_users
from mtl.runs.listed import LISTED, OF_TENSORS, PACKAGES, listed, names_of

Trusted = bool | str | Sequence[str]


@dataclass(frozen=True)
class Own:
    """The folders of the user's own code.

    Args:
        run: The folder of the run, which may come from somebody else.
        project: The current folder and the folder of the program; files next to the run don't count as the user's own.
        named: Folders that the user has named, such as that of --config-dir.
    """

    run: Path
    project: Sequence[Path]
    named: Sequence[Path] = ()

    def has(self, file: str | None) -> bool:
        """Returns whether the file is in one of the folders, and not next to the run or in an installed package."""
        if file is None:
            return False
        paths = _both(Path(file))
        installed = any(not {"site-packages", "dist-packages"}.isdisjoint(path.parts) for path in paths)
        if installed or not is_users(file):
            return False
        if any(_is_in(path, folder) for path in paths for folder in self.named):
            return True
        return all(
            any(_is_in(path, folder) and not self._is_beside(path, folder) for folder in self.project) for path in paths
        )

    def hints(self, named: Any) -> list[str]:
        """Returns those folders named by a checkpoint that are in the project and not next to the run."""
        folders = (
            [Path(os.path.abspath(each)) for each in named if isinstance(each, str)] if type(named) is list else []
        )
        return [str(f) for f in folders if f.is_dir() and not _is_hidden(f, self.project) and self.has(str(f / "x.py"))]

    def _is_beside(self, path: Path, project: Path) -> bool:
        """Returns whether the path is in the folder directly below the project that contains the run.

        All paths count if the run's folder contains the project, or is directly below it. A run that was downloaded may
        have come with further files, which are next to it.
        """
        for run in _both(self.run):
            for folder in _both(project):
                if _is_in(folder, run) or run.parent == folder:
                    return True
                if _is_in(run, folder) and _is_in(path, folder / run.relative_to(folder).parts[0]):
                    return True
        return False


def project() -> list[Path]:
    """Returns the folder of the program, and the current folder unless that contains the user's home folder."""
    current = Path.cwd()
    main = sys.modules.get("__main__")
    program = getattr(main, "__file__", None) if getattr(main, "__spec__", None) is None else None
    folders = [] if _is_in(Path.home(), current) and Path.home() != current else [current]
    return [*folders, *([Path(program).resolve().parent] if program else [])]


def check(config: Mapping[str, Any], *, own: Own, trust: Trusted) -> None:
    """Checks each `_target_` in the config of a run before any of them is built.

    Args:
        config: The part of the checkpoint's config that will be built.
        own: The folders of the user's own code, all of which may be used.
        trust: Modules, or names in modules, that may be used in addition to the listed ones; True trusts everything.

    Raises:
        UserError: If a name is neither listed nor trusted; the message shows how to trust it.
    """
    if trust is True:
        return
    names = trusted_names(trust)
    for where, text in _texts(config):
        if "${" in text:
            raise UserError(
                f"the config of the run '{own.run}' has {text!r} in {where}: runs write values, no interpolations"
            )
    refused: dict[str, str] = {}
    for where, node in _calls(config):
        if not _is_allowed(node, where, names, own):
            refused.setdefault(str(node["_target_"]), where)
    if refused:
        raise _refusal(own.run, refused)


def _refusal(run: Path, refused: Mapping[str, str]) -> UserError:
    lines = "".join(f"\n  {where}: {target}" for target, where in refused.items())
    others = [name for name in refused if _is_plain(name) and name.split(".")[0] not in sys.stdlib_module_names]
    way = f" If you know this code, allow it with trust=[{','.join(others)}]." if others else ""
    python = (
        " A run doesn't need Python's standard library, with which it could do whatever you can."
        if len(others) < len(refused)
        else ""
    )
    return UserError(
        f"the config of the run '{run}' names code that isn't trusted:{lines}\nBy default, a run may use modules of "
        f"{LISTED}, and code in the current folder or in the folder of --config-dir that isn't next to the run.{way}"
        f"{python} trust=true allows everything that the run names"
    )


def trusted_names(trust: Trusted) -> tuple[str, ...]:
    """Returns the names in `trust`; none if it is True, False or None.

    Raises:
        UserError: If `trust` is something else than a boolean or names of modules.
    """
    if trust is None or isinstance(trust, bool):
        return ()
    names = (trust,) if isinstance(trust, str) else tuple(trust) if isinstance(trust, list | tuple) else (trust,)
    for name in names:
        if not isinstance(name, str) or not _is_plain(name):
            raise UserError(f"trust: {name!r} is not the name of a module; write trust=[mine.models] or trust=true")
    return names


def loads_nothing(node: Any) -> None:
    """Changes a checked config so that building it loads no initial values of a model and downloads no data.

    The checkpoint contains the values, and a run must not decide what is written to the disk.
    """
    for _, value in _children(node):
        loads_nothing(value)
    if not isinstance(node, dict) or "_target_" not in node:
        return
    target = find(node["_target_"], "config")
    home = _home(target)
    if home.startswith(("mtl.trunks.", "torchvision.models.")):
        node.update({key: None for key in ("weights", "weights_backbone") if key in node})
        node.update({key: False for key in ("pretrained", "pretrained_backbone") if key in node})
    if home.startswith("mtl.data.") and "download" in inspect.signature(target).parameters:
        node["download"] = False


def _is_allowed(node: Mapping[Any, Any], where: str, names: Sequence[str], own: Own) -> bool:
    target = node["_target_"]
    if type(target) is not str or not _is_plain(target):
        return False
    for name in names:
        if _is_below(target, name):
            package = name.split(".")[0]
            value = _walked(
                target,
                where,
                imports=lambda module, _, name=name: _is_below(module, name) or _is_below(name, module),  # type: ignore[misc]
                passes=lambda value, package=package: _home(value).split(".")[0] == package,  # type: ignore[misc]
            )
            home = f"{_home(value)}.{getattr(value, '__qualname__', '')}"
            if value is not None and (target == name or _is_below(home, name)):
                return True
    package = target.split(".")[0]
    if package in PACKAGES:
        return target in names_of(package) and not _computes(names_of(package)[target], node)

    def passes(value: Any) -> bool:
        home = sys.modules.get(_home(value))
        return home is not None and (own.has(getattr(home, "__file__", None)) or _is_namespace(home))

    value = _walked(target, where, imports=lambda _, file: own.has(file), passes=passes)
    return value is not None and (passes(value) or (_is_listed(value) and not _computes(value, node)))


def _computes(function: Any, node: Mapping[Any, Any]) -> bool:
    """Returns whether loading a run would call a function of tensors, or the run chooses such a function's tensors.

    Some of these functions don't check numbers in a tensor, such as indices, and would read beyond its memory.
    """
    if not inspect.isroutine(function):
        return False
    both = [*listed("torch").items(), *listed("torchvision").items()]
    if not any(function is value for name, value in both if name.startswith(OF_TENSORS)):
        return False
    return node.get("_partial_") is not True or any(_calls({key: node[key] for key in node if key != "_target_"}))


def _walked(
    target: str, where: str, *, imports: Callable[[str, str | None], bool], passes: Callable[[Any], bool]
) -> Any | None:
    """Returns the object with this name, or None if a module or attribute on the way isn't allowed.

    Args:
        target: A dotted name.
        where: The path of the name in the config.
        imports: Returns whether the module with this name and file may be imported.
        passes: Returns whether attributes of this module or class may be used.

    Raises:
        UserError: If nothing has this name.
    """
    parts = target.split(".")
    value: Any = None
    for depth, part in enumerate(parts, start=1):
        module = ".".join(parts[:depth])
        if value is not None and not (isinstance(value, ModuleType | type) and passes(value)):
            return None
        if value is None or (isinstance(value, ModuleType) and not hasattr(value, part)):
            try:
                spec = getattr(sys.modules.get(module), "__spec__", None) or find_spec(module)
            except (ImportError, AttributeError, ValueError):
                spec = None
            if spec is None:
                return find(target, where)  # raises an error that names what is missing
            is_folder = spec.origin is None and spec.submodule_search_locations is not None  # importing it runs nothing
            if not is_folder and not imports(module, spec.origin if spec.has_location else None):
                return None
            try:
                value = import_module(module)
            except Exception:
                return find(target, where)  # raises an error that names what failed
        else:
            value = getattr(value, part)
    return value


def _is_plain(name: str) -> bool:
    """Returns whether it is a dotted name without attributes such as `__globals__`, which lead to other modules."""
    return name.isascii() and all(part.isidentifier() and not part.startswith("__") for part in name.split("."))


def _is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _is_listed(value: Any) -> bool:
    package = _home(value).split(".")[0]
    return package in PACKAGES and any(value is each for each in listed(package).values())


def _is_namespace(module: Any) -> bool:
    return isinstance(module, ModuleType) and getattr(module, "__file__", None) is None and hasattr(module, "__path__")


def _both(path: Path) -> tuple[Path, Path]:
    """Returns the absolute path, with and without resolved links."""
    return Path(os.path.abspath(path)), path.resolve()


def _is_in(path: Path, folder: Path) -> bool:
    return Path(os.path.normcase(path)).is_relative_to(os.path.normcase(folder))


def _is_hidden(path: Path, folders: Sequence[Path]) -> bool:
    return any(
        part.startswith(".") for folder in folders if _is_in(path, folder) for part in path.relative_to(folder).parts
    )


def _home(value: Any) -> str:
    """Returns the name of a module, or of the module that defines a class, a function, or the function of a partial."""
    if isinstance(value, ModuleType):
        return value.__name__
    while isinstance(value, partial):
        value = value.func
    home = getattr(value, "__module__", None) or getattr(getattr(value, "__self__", None), "__name__", None)
    return home if isinstance(home, str) else str(type(value).__module__)


def _calls(node: Any, where: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yields the path and the node of each node with a `_target_`."""
    if isinstance(node, Mapping) and "_target_" in node:
        yield where or "config", node
    for key, value in _children(node):
        inner = f"{where}.{key}" if where and isinstance(node, Mapping) else f"{where}[{key}]" if where else str(key)
        if key != "_target_" or not isinstance(node, Mapping):
            yield from _calls(value, inner)


def _texts(node: Any, where: str = "config") -> Iterator[tuple[str, str]]:
    for key, value in _children(node):
        yield from ((where, text) for text in (key, value) if isinstance(text, str))
        yield from _texts(value, f"{where}.{key}")


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list | tuple) else []
