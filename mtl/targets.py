"""From a config node with a `_target_` to the object that it names."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType, NoneType
from typing import Any, get_args, get_type_hints

from mtl.errors import FOREIGN, UserError, first_line, suggest, told
from mtl.shadows import shadowed


@dataclass(frozen=True)
class Ready:
    """A value that `make` gives as it is, whatever is in it."""

    value: Any


def make(node: Any, where: str, /, *args: Any, **kwargs: Any) -> Any:
    """Builds what the node describes: calls its `_target_` with its other keys, nodes inside it first.

    The keys are those of Hydra's instantiate: `_target_` is a dotted name, `_args_` a list of positional arguments,
    and with `_partial_: true` the result is a callable that still has to be called. Whatever has no `_target_` is
    given back with the nodes inside it built. Where a class of torch.nn or mtl.losses, or a function of
    torch.nn.functional, takes a tensor, such as the weights of a loss, a number or a list of numbers becomes one.

    Args:
        node: plain dicts, lists and values.
        where: the node's place in the config, for messages.
        args, kwargs: further arguments of the call.

    Raises:
        UserError: where the name can't be imported or the call fails, with what was possible.
    """
    if isinstance(node, Ready):
        return node.value
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


class Absent(UserError):
    """There is no module of this name where modules are looked for."""


class Unfit(UserError):
    """What a config gives a target doesn't fit it.

    Args:
        message: what is wrong.
        where: the node's place in the config.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.where = where


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
                    raise UserError(f"{where}._target_: '{path}' can't be imported: {first_line(error)}") from error
            except FOREIGN as error:
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
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            names = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            text = f"{where}: {name} {error}; it takes: {', '.join(names) or 'nothing'}"
            if inspect.isroutine(target) and not args and str(error).startswith("missing"):
                text += "; a function that is called later, with what is missing, has _partial_: true beside _target_"
            raise Unfit(text, where) from error
        if tensors := _as_tensors(target, bound.arguments, where):
            bound.arguments.update(tensors)
            args, kwargs = bound.args, bound.kwargs
    try:
        return target(*args, **kwargs)
    except UserError:
        raise
    except FOREIGN as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if isinstance(value, PLAIN))
        raise Unfit(f"{where}: {name}({given}) failed: {told(error)}", where) from error


def takes(target: Callable[..., Any]) -> list[str] | None:
    """The names of the arguments that the target takes, in their order; None where it may take any.

    Classes of torch and torchmetrics hand what they don't name to the class that they are derived from.
    """
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        return names
    if not isinstance(target, type) or target.__module__.split(".")[0] not in ("torch", "torchmetrics"):
        return None
    for base in target.__mro__:
        if base.__name__ in ("Metric", "Module"):
            return names + list(_OF_METRICS if base.__name__ == "Metric" else ())
        if "__init__" in vars(base):
            inner = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
            names += [each.name for each in inner if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
            if not any(each.kind is each.VAR_KEYWORD for each in inner):
                break
    return names


_OF_METRICS = (  # what torchmetrics.Metric takes from its keyword arguments
    *("compute_on_cpu", "dist_sync_on_step", "process_group", "dist_sync_fn", "distributed_available_fn"),
    *("sync_on_compute", "compute_with_cache"),
)


_hints = cache(get_type_hints)  # a function may be called in every step


def _as_tensors(target: Any, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those of the arguments that are numbers where torch.nn or mtl.losses takes a tensor, as tensors.

    A class's tensors are its own, and go where the model goes; a function's are put where its other tensors are.

    Raises:
        UserError: for a list that isn't of numbers.
    """
    plain = {name: value for name, value in arguments.items() if isinstance(value, int | float | list)}
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    made_in = str(getattr(function, "__module__", ""))
    if not plain or not inspect.isfunction(function) or not made_in.startswith(("torch.nn.", "mtl.losses.")):
        return {}
    import torch

    hints = _hints(function)
    others = [each for each in arguments.values() if isinstance(each, torch.Tensor) and each.is_floating_point()]
    kind = torch.promote_types(torch.get_default_dtype(), others[0].dtype) if others else torch.get_default_dtype()
    device = others[0].device if others else None
    found = {}
    for name, value in plain.items():
        if hints.get(name) is not torch.Tensor and torch.Tensor not in get_args(hints.get(name)):
            continue
        try:
            if isinstance(value, bool):
                raise TypeError
            found[name] = torch.tensor(value, dtype=kind, device=device)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{where}.{name} is {value!r}; it must be a number, or a list of numbers") from None
    return found


def _import(module: str, where: str, name: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise UserError(f"{where}._target_: '{module}' can't be imported: {first_line(error)}") from error
        raise Absent(
            f"{where}._target_: '{name}' can't be imported: there is no module '{module}'; a module of one's own is "
            "looked for in the current folder and in the folder of --config-dir"
        ) from None
    except FOREIGN as error:
        raise UserError(f"{where}._target_: importing '{module}' failed: {told(error)}") from error


def add_code_folders(folders: Iterable[str]) -> None:
    """Makes modules in these folders importable, after all others."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)
