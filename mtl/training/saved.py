"""What a checkpoint holds, compared with what is to take it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mtl.errors import UserError, told

MOST = 8  # names in a message
MODEL = {  # what is needed of a checkpoint to have its model
    **{"config": dict, "config.model": dict, "config.model._target_": str, "config.model.inputs": list},
    **{"config.model.trunk": dict, "config.model.trunk._target_": str, "config.tasks": dict},
    **{"model": dict, "code_folders": list},
}
RUN = {  # and to go on with its run
    **MODEL,
    **{"composed": dict, "versions": dict, "step": dict, "step.optimizer": dict, "step.optimizer.state": dict},
    **{"step.optimizer.param_groups": list, "random": dict, "loggers": dict, "faults": dict, "data": dict},
    **{"readings": dict, "epoch": int, "global_step": int, "position": int | None, "best": float | int | None},
    **{"memory_per_step": float | int | None},
}


def check(state: Mapping[str, Any], where: str, wanted: Mapping[str, type | UnionType]) -> None:
    """Raises a UserError where the state lacks a key, or has something else under it.

    Args:
        state: of a checkpoint.
        where: which one it is of.
        wanted: keys with dots, and the type of what is under each.
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
    """Raises a UserError where what is within can't be built from the config of a checkpoint."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError) as error:
        raise UserError(f"{where} can't be used: nothing can be built from its config: {told(error)}") from error


def load_into(model: nn.Module, tensors: Mapping[str, Any], where: str) -> None:
    """Gives the model the parameters and buffers that were saved.

    Raises:
        UserError: where they aren't those of this model, with their names, shapes and types.
    """
    ours = model.state_dict()
    wrong = [line for name in ours if name in tensors and (line := _other_type(name, tensors[name], ours[name]))]
    try:
        if not wrong:
            model.load_state_dict(dict(tensors))
            return
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = told(error)
    wrong += [
        f"{name} is of shape {tuple(tensors[name].shape)} there and {tuple(ours[name].shape)} here"
        for name in ours
        if _is_tensor(ours[name]) and isinstance(there := tensors.get(name), Tensor) and there.shape != ours[name].shape
    ]
    parts = [_listed(wrong, "; ")] if wrong else []
    for word, names in (
        ("there", [n for n in tensors if n not in ours]),
        ("here", [n for n in ours if n not in tensors]),
    ):
        parts += [f"only {word}: {_listed(names, ', ')}"] if names else []
    raise UserError(
        f"{where} doesn't fit this model: {'; '.join(parts) or reason}. The model's code or config has changed since"
    )


def check_finite(parameters: Mapping[str, Tensor], step: int) -> None:
    """Raises a UserError that names the parameters which aren't finite after the step of this number, if any."""
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters.values()])
    if not finite.all():
        broken = ", ".join(name for name, right in zip(parameters, finite.tolist(), strict=True) if not right)
        raise UserError(f"parameters aren't finite after step {step}, and are not saved: {broken}")


def unusable(tensors: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A line for each of our parameters and buffers in whose place there is something that is no tensor."""
    return [
        f"{name} is {_kind(tensors[name])} there, not a tensor"
        for name in ours
        if name in tensors and _is_tensor(ours[name]) and not isinstance(tensors[name], Tensor)
    ]


def fits(there: Any, here: Any) -> bool:
    """Whether one tensor can take the other's values: of one shape, and both of floats or both not."""
    return (
        isinstance(there, Tensor)
        and _is_tensor(here)
        and there.shape == here.shape
        and (there.is_floating_point(), there.is_complex()) == (here.is_floating_point(), here.is_complex())
    )


def described(value: Any) -> str:
    """The shape of a tensor, and its type where that isn't float32."""
    if not _is_tensor(value):
        return _kind(value)
    return f"shape {tuple(value.shape)}" + ("" if _short(value) == "float32" else f", {_short(value)}")


def check_kinds(theirs: Any, ours: Any, where: str = "") -> None:
    """Raises a UserError where what was saved is of another kind than what is here, such as a text for a tensor.

    What is there in one of them alone is left to those who load it.
    """
    if theirs is None or ours is None:
        return
    if _kind(theirs) != _kind(ours):
        raise UserError(f"'{where}' of what was saved is {_kind(theirs)}, not {_kind(ours)}")
    if isinstance(ours, Mapping):
        for key in ours:
            if key in theirs:
                check_kinds(theirs[key], ours[key], f"{where}.{key}" if where else str(key))
    elif isinstance(ours, list | tuple) and len(theirs) == len(ours):
        for index, (there, here) in enumerate(zip(theirs, ours, strict=True)):
            check_kinds(there, here, f"{where}[{index}]")


def _other_type(name: str, there: Any, here: Any) -> str:
    """What there is to say of a type whose values the tensor here would change; the empty text for another one."""
    if not _is_tensor(here):
        return ""  # a module's extra state may be anything
    if not isinstance(there, Tensor):
        return f"{name} is {_kind(there)} there, not a tensor"
    alike = there.is_floating_point() == here.is_floating_point() and there.is_complex() == here.is_complex()
    if there.dtype == here.dtype or (alike and there.dtype.itemsize < here.dtype.itemsize):
        return ""
    return f"{name} is of type {_short(there)} there and {_short(here)} here"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_lazy(value)


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(names: Sequence[str], between: str) -> str:
    more = f"{between}and {len(names) - MOST} more" if len(names) > MOST else ""
    return between.join(names[:MOST]) + more


def _kind(value: Any) -> str:
    for kind, name in ((Tensor, "a tensor"), (Mapping, "a dict"), (str, "a text"), (list | tuple, "a list")):
        if isinstance(value, kind):
            return name
    return "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
