"""Builds the object that a config node with a `_target_` describes."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType, NoneType
from typing import Any, get_args, get_type_hints

from mtl.config.shadows import shadowed
from mtl.errors import FOREIGN, UserError, describe_error, first_line, suggest


@dataclass(frozen=True)
class Ready:
    """A finished value that `make` returns unchanged, whatever keys it contains."""

    value: Any


def make(node: Any, where: str, /, *args: Any, **kwargs: Any) -> Any:
    """Builds the object that the node describes: builds inner nodes first, then calls `_target_` with the other keys.

    The special keys are those of Hydra's `instantiate`: `_target_` is a dotted name, `_args_` a list of positional
    arguments, and with `_partial_: true` the result is a callable that still has to be called. A node without
    `_target_` is returned with its inner nodes built. Where a class of torch.nn or mtl.losses, or a function of
    torch.nn.functional, expects a tensor, such as the class weights of a loss, numbers are converted to tensors.

    Args:
        node: Plain dicts, lists and values.
        where: The node's path in the config, such as `model.trunk`, for error messages.
        args, kwargs: Further arguments of the call.

    Raises:
        UserError: If the name can't be imported, with similar names, or if the call fails.
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
    """Raised if no module of this name exists on the import path."""


class Unfit(UserError):
    """Raised if the arguments in a config don't fit the callable named by `_target_`.

    Args:
        message: The error message.
        where: The node's path in the config.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.where = where


PLAIN = (str, int, float, bool, list, tuple, NoneType)  # types whose values are short enough for a message
_OWN_KEYS = ("_target_", "_args_", "_partial_")


def find(name: Any, where: str) -> Callable[..., Any]:
    """Returns the callable with this dotted name.

    Raises:
        UserError: If the name can't be imported or isn't callable.
    """
    if not isinstance(name, str) or "." not in name:
        raise UserError(f"{where}._target_: {name!r} is not a dotted name, such as torch.nn.Linear")
    parts = name.split(".")
    target: Any = _import(parts[0], where, name)
    for depth, part in enumerate(parts[1:], start=1):
        if not hasattr(target, part) and isinstance(target, ModuleType) and hasattr(target, "__path__"):
            path = ".".join(parts[: depth + 1])
            try:
                target = import_module(path)
                continue
            except ModuleNotFoundError as error:
                if error.name != path:
                    raise UserError(f"{where}._target_: '{path}' can't be imported: {first_line(error)}") from error
            except FOREIGN as error:
                raise UserError(f"{where}._target_: importing '{path}' failed: {describe_error(error)}") from error
        if not hasattr(target, part):
            public = [key for key in dir(target) if not key.startswith("_")]
            near = suggest(part, public).split(" (possible")[0] if len(public) > 20 else suggest(part, public)
            instead = shadowed(parts, defining=False)
            raise UserError(f"{where}._target_: '{'.'.join(parts[:depth])}' has no '{part}'{instead or near}")
        target = getattr(target, part)
    if instead := shadowed(parts, defining=True):
        raise UserError(f"{where}._target_: '{name}' is ambiguous{instead}")
    if not callable(target):
        raise UserError(f"{where}._target_: '{name}' is a {type(target).__name__}, which can't be called")
    result: Callable[..., Any] = target
    return result


def call(target: Callable[..., Any], name: str, where: str, /, *args: Any, **kwargs: Any) -> Any:
    """Calls the callable named by `_target_` with the arguments.

    Raises:
        UserError: If the callable doesn't accept the arguments, or if the call fails.
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some built-in functions have no signature
        signature = None
    if signature is not None:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            names = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            text = f"{where}: {name} {error}; it takes: {', '.join(names) or 'nothing'}"
            if inspect.isroutine(target) and not args and str(error).startswith("missing"):
                text += "; for a function that is called later with the missing arguments, add _partial_: true"
            raise Unfit(text, where) from error
        if tensors := _as_tensors(target, bound.arguments, where):
            bound.arguments.update(tensors)
            args, kwargs = bound.args, bound.kwargs
    try:
        return target(*args, **kwargs)
    except UserError:
        raise
    except FOREIGN as error:
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if isinstance(value, PLAIN))
        raise Unfit(f"{where}: {name}({arguments}) failed: {describe_error(error)}", where) from error


def takes(target: Callable[..., Any]) -> list[str] | None:
    """Returns the names of the arguments that the callable accepts, in order; None if it accepts arbitrary ones.

    Classes of torch and torchmetrics pass unnamed arguments to their base classes, which are therefore inspected too.
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


_OF_METRICS = (  # the keyword arguments of torchmetrics.Metric
    *("compute_on_cpu", "dist_sync_on_step", "process_group", "dist_sync_fn", "distributed_available_fn"),
    *("sync_on_compute", "compute_with_cache"),
)


_hints = cache(get_type_hints)  # cached, because a function may be called in every step


def _as_tensors(target: Any, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Converts numbers to tensors where torch.nn or mtl.losses expects a tensor, and returns the converted arguments.

    The tensors of a class are buffers, which move with the model; those of a function are created on the device of the
    other tensors in the call.

    Raises:
        UserError: If a list contains something else than numbers.
    """
    plain = {name: value for name, value in arguments.items() if isinstance(value, int | float | list)}
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    made_in = str(getattr(function, "__module__", ""))
    if not plain or not inspect.isfunction(function) or not made_in.startswith(("torch.nn.", "mtl.losses.")):
        return {}
    import torch

    hints = _hints(function)
    tensors = [each for each in arguments.values() if isinstance(each, torch.Tensor) and each.is_floating_point()]
    kind = torch.promote_types(torch.get_default_dtype(), tensors[0].dtype) if tensors else torch.get_default_dtype()
    device = tensors[0].device if tensors else None
    converted = {}
    for name, value in plain.items():
        if hints.get(name) is not torch.Tensor and torch.Tensor not in get_args(hints.get(name)):
            continue
        try:
            if isinstance(value, bool):
                raise TypeError
            converted[name] = torch.tensor(value, dtype=kind, device=device)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{where}.{name} is {value!r}; it must be a number, or a list of numbers") from None
    return converted


def _import(module: str, where: str, name: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise UserError(f"{where}._target_: '{module}' can't be imported: {first_line(error)}") from error
        raise Absent(
            f"{where}._target_: '{name}' can't be imported: there is no module '{module}'; your own modules are "
            "imported from the current folder and from the folder of --config-dir"
        ) from None
    except FOREIGN as error:
        raise UserError(f"{where}._target_: importing '{module}' failed: {describe_error(error)}") from error


def add_code_folders(folders: Iterable[str]) -> None:
    """Appends the folders to the import path, after all other folders."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)
