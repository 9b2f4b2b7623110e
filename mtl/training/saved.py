"""Checks that the content of a checkpoint fits the model and the components that load it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mtl.distributed.collectives import any_process, world_size
from mtl.distributed.replicas import check_replicas
from mtl.distributed.sharding import local
from mtl.errors import UserError, describe_error

MOST = 8  # the largest number of names in a message
MODEL = {  # the keys of a checkpoint that are needed to load its model
    **{"config": dict, "config.model": dict, "config.model._target_": str, "config.model.inputs": list},
    **{"config.model.trunk": dict, "config.model.trunk._target_": str, "config.tasks": dict},
    **{"model": dict, "code_folders": list},
}
RUN = {  # the keys that are needed to resume its run
    **MODEL,
    **{"composed": dict, "versions": dict, "step": dict, "step.optimizer": dict, "step.optimizer.state": dict},
    **{"step.optimizer.param_groups": list, "random": dict, "loggers": dict, "faults": dict, "data": dict},
    **{"readings": dict, "epoch": int, "global_step": int, "position": int | None, "best": float | int | None},
    **{"memory_per_step": float | int | None},
}


def check(state: Mapping[str, Any], where: str, wanted: Mapping[str, type | UnionType]) -> None:
    """Checks that the state of a checkpoint has the expected keys and types.

    Args:
        state: The state.
        where: The name of the checkpoint, for messages.
        wanted: The expected type for each key; a dot in a key separates levels.

    Raises:
        UserError: If a key is missing, or if the value has another type.
    """
    for key, kind in wanted.items():
        value: Any = state
        for part in key.split("."):
            if part not in value:
                raise UserError(f"{where} can't be used: it has no '{key}'")
            value = value[part]
        if not isinstance(value, kind):
            name = kind.__name__ if isinstance(kind, type) else kind
            raise UserError(f"{where} can't be used: its '{key}' is {_kind(value)}, not a {name}")


@contextmanager
def built_from(where: str) -> Iterator[None]:
    """Raises a UserError if the code within the context can't build an object from the config of a checkpoint."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{where} can't be used: nothing can be built from its config: {describe_error(error)}"
        ) from error


def load_into(model: nn.Module, tensors: Mapping[str, Any], where: str) -> None:
    """Loads saved parameters and buffers into a model.

    Args:
        model: The model.
        tensors: The saved parameters and buffers, by name.
        where: The name of the checkpoint, for messages.

    Raises:
        UserError: If the names, shapes or types differ from those of the model.
    """
    ours = model.state_dict()
    wrong = [line for name in ours if name in tensors and (line := _other_type(name, tensors[name], ours[name]))]
    try:
        if not wrong:
            model.load_state_dict(dict(tensors))
            return
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = describe_error(error)
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)} in the checkpoint and {tuple(ours[name].shape)} in the model"
        for name in ours
        if _is_tensor(ours[name]) and isinstance(saved := tensors.get(name), Tensor) and saved.shape != ours[name].shape
    ]
    lines = [_listed(wrong, "; ")] if wrong else []
    for place, names in (
        ("checkpoint", [n for n in tensors if n not in ours]),
        ("model", [n for n in ours if n not in tensors]),
    ):
        lines += [f"only in the {place}: {_listed(names, ', ')}"] if names else []
    raise UserError(
        f"{where} doesn't fit this model: {'; '.join(lines) or reason}. The model's code or config has changed since"
    )


def check_parameters(model: nn.Module, step: int) -> None:
    """Checks that all parameters are finite after the step with this number, and the same in all processes.

    Raises:
        UserError: If one isn't; the message names those that are not finite.
    """
    parameters = dict(model.named_parameters())
    finite = torch.stack([local(parameter.detach()).isfinite().all() for parameter in parameters.values()])
    (broken_somewhere,) = any_process([not finite.all()])
    if broken_somewhere:
        flags = any_process([not right for right in finite.tolist()])
        broken = ", ".join(name for name, is_broken in zip(parameters, flags, strict=True) if is_broken)
        raise UserError(f"parameters aren't finite after step {step}, and are not saved: {broken}")
    if world_size() > 1:
        check_replicas(model)


def unusable(tensors: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Returns a line for each parameter or buffer of the model for which the saved value is not a tensor."""
    return [
        f"{name} is {_kind(tensors[name])} in the checkpoint, not a tensor"
        for name in ours
        if name in tensors and _is_tensor(ours[name]) and not isinstance(tensors[name], Tensor)
    ]


def fits(saved: Any, ours: Any) -> bool:
    """Returns whether a saved tensor can be loaded into a tensor: they have the same shape and the same kind of number.

    The kinds of number are floating-point, complex and integer.
    """
    return (
        isinstance(saved, Tensor)
        and _is_tensor(ours)
        and saved.shape == ours.shape
        and (saved.is_floating_point(), saved.is_complex()) == (ours.is_floating_point(), ours.is_complex())
    )


def described(value: Any) -> str:
    """Returns a description of a tensor: the shape, and the data type unless it is float32."""
    if not _is_tensor(value):
        return _kind(value)
    return f"shape {tuple(value.shape)}" + ("" if _short(value) == "float32" else f", {_short(value)}")


def check_kinds(theirs: Any, ours: Any, where: str = "") -> None:
    """Checks that each saved value is of the same kind as the current one, such as a tensor, a text or a list.

    Keys that only one side has are not checked; the code that loads the values has to handle them.

    Raises:
        UserError: If the kinds of a value differ.
    """
    if theirs is None or ours is None:
        return
    if _kind(theirs) != _kind(ours):
        raise UserError(f"'{where}' of the saved state is {_kind(theirs)}, not {_kind(ours)}")
    if isinstance(ours, Mapping):
        for key in ours:
            if key in theirs:
                check_kinds(theirs[key], ours[key], f"{where}.{key}" if where else str(key))
    elif isinstance(ours, list | tuple) and len(theirs) == len(ours):
        for index, (saved, current) in enumerate(zip(theirs, ours, strict=True)):
            check_kinds(saved, current, f"{where}[{index}]")


def _other_type(name: str, saved: Any, ours: Any) -> str:
    """Returns a message if loading would change the values because of the data types, else an empty string."""
    if not _is_tensor(ours):
        return ""  # a module's extra state may be anything
    if not isinstance(saved, Tensor):
        return f"{name} is {_kind(saved)} in the checkpoint, not a tensor"
    alike = saved.is_floating_point() == ours.is_floating_point() and saved.is_complex() == ours.is_complex()
    if saved.dtype == ours.dtype or (alike and saved.dtype.itemsize < ours.dtype.itemsize):
        return ""
    return f"{name} has type {_short(saved)} in the checkpoint and {_short(ours)} in the model"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_lazy(value)


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(names: Sequence[str], between: str) -> str:
    rest = f"{between}and {len(names) - MOST} more" if len(names) > MOST else ""
    return between.join(names[:MOST]) + rest


def _kind(value: Any) -> str:
    for kind, name in ((Tensor, "a tensor"), (Mapping, "a dict"), (str, "a text"), (list | tuple, "a list")):
        if isinstance(value, kind):
            return name
    return "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
