"""From a config node with a `_target_` to the object that it names."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType, NoneType
from typing import Any

from mtl.errors import UserError, suggest, told
from mtl.shadows import shadowed


def make(node: Any, where: str, /, *args: Any, **kwargs: Any) -> Any:
    """Builds what the node describes: calls its `_target_` with its other keys, nodes inside it first.

    The keys are those of Hydra's instantiate: `_target_` is a dotted name, `_args_` a list of positional arguments,
    and with `_partial_: true` the result is a callable that still has to be called. Whatever has no `_target_` is
    given back with the nodes inside it built.

    Args:
        node: plain dicts, lists and values.
        where: the node's place in the config, for messages.
        args, kwargs: further arguments of the call.

    Raises:
        UserError: where the name can't be imported or the call fails, with what was possible.
    """
    if isinstance(node, list):
        return [make(item, f"{where}[{index}]") for index, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    if "_target_" not in node:
        return {key: make(value, f"{where}.{key}") for key, value in node.items()}
    target = find(node["_target_"], where)
    built = {key: make(value, f"{where}.{key}") for key, value in node.items() if key not in _OWN_KEYS}
    args = (*args, *(make(item, f"{where}._args_") for item in node.get("_args_") or []))
    if node.get("_partial_"):
        return partial(call, target, node["_target_"], where, *args, **built, **kwargs)
    return call(target, node["_target_"], where, *args, **{**built, **kwargs})


PLAIN = (str, int, float, bool, list, tuple, NoneType)  # what is short enough for a message
_OWN_KEYS = ("_target_", "_args_", "_partial_")


def find(name: Any, where: str) -> Callable[..., Any]:
    """The callable with this dotted name.

    Raises:
        UserError: where it can't be imported or isn't callable.
    """
    if not isinstance(name, str) or "." not in name:
        raise UserError(f"{where}._target_: {name!r} is not a dotted name, such as torch.nn.Linear")
    parts = name.split(".")
    found: Any = _import(parts[0], where, name)
    for depth, part in enumerate(parts[1:], start=1):
        if not hasattr(found, part) and isinstance(found, ModuleType) and hasattr(found, "__path__"):
            path = ".".join(parts[: depth + 1])
            try:
                found = import_module(path)
                continue
            except ModuleNotFoundError as error:
                if error.name != path:
                    raise UserError(f"{where}._target_: '{path}' can't be imported: {error}") from error
            except Exception as error:
                raise UserError(f"{where}._target_: importing '{path}' failed: {told(error)}") from error
        if not hasattr(found, part):
            public = [key for key in dir(found) if not key.startswith("_")]
            near = suggest(part, public).split(" (possible")[0] if len(public) > 20 else suggest(part, public)
            instead = shadowed(parts, defining=False)
            raise UserError(f"{where}._target_: '{'.'.join(parts[:depth])}' has no '{part}'{instead or near}")
        found = getattr(found, part)
    if instead := shadowed(parts, defining=True):
        raise UserError(f"{where}._target_: '{name}' may mean two things{instead}")
    if not callable(found):
        raise UserError(f"{where}._target_: '{name}' is a {type(found).__name__}, which can't be called")
    result: Callable[..., Any] = found
    return result


def call(target: Callable[..., Any], name: str, where: str, /, *args: Any, **kwargs: Any) -> Any:
    """Calls the target.

    Raises:
        UserError: where it doesn't take these arguments, or fails on them.
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some built-ins have none
        signature = None
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            names = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            raise UserError(f"{where}: {name} {error}; it takes: {', '.join(names) or 'nothing'}") from error
    try:
        return target(*args, **kwargs)
    except UserError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if isinstance(value, PLAIN))
        raise UserError(f"{where}: {name}({given}) failed: {told(error)}") from error


def _import(module: str, where: str, name: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise UserError(f"{where}._target_: '{module}' can't be imported: {error}") from error
        raise UserError(
            f"{where}._target_: '{name}' can't be imported: there is no module '{module}'; a module of one's own is "
            "looked for in the current folder and in the folder of --config-dir"
        ) from None
    except Exception as error:
        raise UserError(f"{where}._target_: importing '{module}' failed: {told(error)}") from error


def add_code_folders(folders: Iterable[str]) -> None:
    """Makes modules in these folders importable, after all others."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)
