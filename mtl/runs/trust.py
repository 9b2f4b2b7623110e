"""Which code a run's checkpoint may name, since the run may be somebody else's."""

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
    """Where the user's own code is.

    Args:
        run: the folder of the run, which may be somebody else's.
        project: the current folder, and that of the program; what lies beside the run in them isn't the user's own.
        named: folders that the user has named, such as that of --config-dir.
    """

    run: Path
    project: Sequence[Path]
    named: Sequence[Path] = ()

    def has(self, file: str | None) -> bool:
        """Whether the file is in one of these folders, and not beside the run or in an installed package."""
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
        """Those of the folders a checkpoint names that lie in the project, and not beside the run."""
        folders = (
            [Path(os.path.abspath(each)) for each in named if isinstance(each, str)] if type(named) is list else []
        )
        return [str(f) for f in folders if f.is_dir() and not _is_hidden(f, self.project) and self.has(str(f / "x.py"))]

    def _is_beside(self, path: Path, project: Path) -> bool:
        """Whether the path lies in that folder of the project that the run lies in, or the project in the run's.

        A run that was downloaded may have come with more files, which lie around it.
        """
        for run in _both(self.run):
            for folder in _both(project):
                if _is_in(folder, run) or run.parent == folder:
                    return True
                if _is_in(run, folder) and _is_in(path, folder / run.relative_to(folder).parts[0]):
                    return True
        return False


def project() -> list[Path]:
    """The current folder, unless it is the root of all files or holds the users' folders, and that of the program."""
    current = Path.cwd()
    main = sys.modules.get("__main__")
    program = getattr(main, "__file__", None) if getattr(main, "__spec__", None) is None else None
    folders = [] if _is_in(Path.home(), current) and Path.home() != current else [current]
    return [*folders, *([Path(program).resolve().parent] if program else [])]


def check(config: Mapping[str, Any], *, own: Own, trust: Trusted) -> None:
    """Looks over each `_target_` in the config of a run before any of them is built.

    Args:
        config: of the run's checkpoint, as far as it is to be built.
        own: where the user's own code is; all in it may be used.
        trust: modules, or names in modules, that may be used besides those that are listed; true for everything.

    Raises:
        UserError: for names that are neither listed nor trusted, with the way to trust them.
    """
    if trust is True:
        return
    names = trusted_names(trust)
    for where, text in _texts(config):
        if "${" in text:
            raise UserError(
                f"the config of the run '{own.run}' has {text!r} in {where}: runs write values, and no interpolations"
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
    way = f" If you know this code, allow it by trust=[{','.join(others)}]." if others else ""
    python = (
        " A run has no need of Python's own library, by which it can do whatever you can."
        if len(others) < len(refused)
        else ""
    )
    return UserError(
        f"the config of the run '{run}' names code that isn't trusted:{lines}\nWithout being asked, a run uses modules "
        f"of {LISTED}, and code in the current folder or in that of --config-dir that doesn't lie beside the run.{way}"
        f"{python} trust=true allows whatever the run names"
    )


def trusted_names(trust: Trusted) -> tuple[str, ...]:
    """The names that `trust` has.

    Raises:
        UserError: where it is neither true or false nor names.
    """
    if trust is None or isinstance(trust, bool):
        return ()
    names = (trust,) if isinstance(trust, str) else tuple(trust) if isinstance(trust, list | tuple) else (trust,)
    for name in names:
        if not isinstance(name, str) or not _is_plain(name):
            raise UserError(f"trust: {name!r} is not the name of a module; write trust=[mine.models] or trust=true")
    return names


def loads_nothing(node: Any) -> None:
    """Takes out of a checked config what would load first values of a model or download data.

    The values are in the checkpoint, and their file may be gone; and a run doesn't decide what is written where.
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
            found = _walked(
                target,
                where,
                imports=lambda module, _, name=name: _is_below(module, name) or _is_below(name, module),  # type: ignore[misc]
                passes=lambda value, package=package: _home(value).split(".")[0] == package,  # type: ignore[misc]
            )
            home = f"{_home(found)}.{getattr(found, '__qualname__', '')}"
            if found is not None and (target == name or _is_below(home, name)):
                return True
    package = target.split(".")[0]
    if package in PACKAGES:
        return target in names_of(package) and not _computes(names_of(package)[target], node)

    def passes(value: Any) -> bool:
        home = sys.modules.get(_home(value))
        return home is not None and (own.has(getattr(home, "__file__", None)) or _is_namespace(home))

    found = _walked(target, where, imports=lambda _, file: own.has(file), passes=passes)
    return found is not None and (passes(found) or (_is_listed(found) and not _computes(found, node)))


def _computes(found: Any, node: Mapping[Any, Any]) -> bool:
    """Whether a function of tensors would be called while a run is loaded, or later with tensors of the run's choice.

    Some of these functions believe the numbers in a tensor, and read beyond the memory by them.
    """
    if not inspect.isroutine(found):
        return False
    both = [*listed("torch").items(), *listed("torchvision").items()]
    if not any(found is value for name, value in both if name.startswith(OF_TENSORS)):
        return False
    return node.get("_partial_") is not True or any(_calls({key: node[key] for key in node if key != "_target_"}))


def _walked(
    target: str, where: str, *, imports: Callable[[str, str | None], bool], passes: Callable[[Any], bool]
) -> Any | None:
    """What the name stands for, None where the way there isn't allowed; nothing else is imported to find out.

    Args:
        target: a dotted name.
        where: its place in the config.
        imports: whether the module of that name and file may be imported.
        passes: whether an attribute of this module or class may be taken.

    Raises:
        UserError: where there is nothing of this name.
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
                return find(target, where)  # which says what isn't there
            is_folder = spec.origin is None and spec.submodule_search_locations is not None  # importing it runs nothing
            if not is_folder and not imports(module, spec.origin if spec.has_location else None):
                return None
            try:
                value = import_module(module)
            except Exception:
                return find(target, where)  # which says what failed
        else:
            value = getattr(value, part)
    return value


def _is_plain(name: str) -> bool:
    """Whether it is a dotted name, without the attributes by which Python reaches from one module into others."""
    return name.isascii() and all(part.isidentifier() and not part.startswith("__") for part in name.split("."))


def _is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _is_listed(found: Any) -> bool:
    package = _home(found).split(".")[0]
    return package in PACKAGES and any(found is each for each in listed(package).values())


def _is_namespace(module: Any) -> bool:
    return isinstance(module, ModuleType) and getattr(module, "__file__", None) is None and hasattr(module, "__path__")


def _both(path: Path) -> tuple[Path, Path]:
    """The path as it is given, and without links."""
    return Path(os.path.abspath(path)), path.resolve()


def _is_in(path: Path, folder: Path) -> bool:
    return Path(os.path.normcase(path)).is_relative_to(os.path.normcase(folder))


def _is_hidden(path: Path, folders: Sequence[Path]) -> bool:
    return any(
        part.startswith(".") for folder in folders if _is_in(path, folder) for part in path.relative_to(folder).parts
    )


def _home(found: Any) -> str:
    """The module itself, or the module that defines the class, the function, or what a partial calls."""
    if isinstance(found, ModuleType):
        return found.__name__
    while isinstance(found, partial):
        found = found.func
    home = getattr(found, "__module__", None) or getattr(getattr(found, "__self__", None), "__name__", None)
    return home if isinstance(home, str) else str(type(found).__module__)


def _calls(node: Any, where: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All nodes with a `_target_`, with their places."""
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
