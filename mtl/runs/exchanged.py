"""A run that goes on with other classes than it began with: whether these take the state that was saved."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.errors import UserError, told
from mtl.step import Step

MOVED = ("lr", "initial_lr", "momentum", "betas")  # options of an optimizer that a scheduler moves


def check(step: Step, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Looks whether model, optimizer, scheduler and balancer take the state, before anything is loaded.

    Args:
        step: that is to take it.
        state: of the trainer, with the config that it was `composed` with.
        config: of `step`.

    Raises:
        UserError: for the first that doesn't.
    """
    _check_model(step.model, state["model"])
    for name, part in {**step.descent.components(), "balancer": step.balancing.balancer}.items():
        if name == "then" or not _is_another(name, state, config):
            continue
        saved = state["step"]["balancing"]["balancer"] if name == "balancer" else state["step"].get(name)
        what = f"{name}: {config[name]['_target_']} can't go on from the state of {_target(state['composed'], name)}"
        if saved is None:
            raise UserError(f"{what}: nothing was saved")
        if isinstance(part, Optimizer):
            own = _tried(part, saved, what)
            saved = {"options": [set(group) for group in saved["param_groups"]], "state": saved["state"]}
        else:
            own = part.state_dict()
        if name == "balancer":  # what is inside may be empty before the first step
            saved, own = dict.fromkeys(saved), dict.fromkeys(own)
            if own and all(str(_target(each, name)).startswith("mtl.") for each in (state["composed"], config)):
                raise UserError(f"{what}: {', '.join(own)} means something else there")
        for difference in _differences(saved, own):
            raise UserError(f"{what}: {difference}")


def options(step: Step, state: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The options of an optimizer of another class that are to be this one's, as `resume_allow` would name them."""
    if not _is_another("optimizer", state, config):
        return []
    kept = MOVED if "scheduler" in step.descent.components() else ()
    return [f"optimizer.{key}" for group in step.descent.param_groups(first=True) for key in group if key not in kept]


def _target(config: Mapping[str, Any], name: str) -> Any:
    return (config.get(name) or {}).get("_target_")


def _is_another(name: str, state: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return bool(_target(state["composed"], name) != _target(config, name))


def _check_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raises a UserError for parameters and buffers of other names or shapes, or in another order."""
    own = model.state_dict()
    for difference in _differences(dict(saved), dict(own)):
        raise UserError(f"the model's parameters and buffers aren't those that were saved: {difference}")
    if list(saved) != list(own):
        raise UserError("the model has its parameters in another order, by which the optimizer's state was saved")


def _tried(optimizer: Optimizer, saved: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What the optimizer keeps, from a step with gradients of zero, after which all is as it was."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    having = {index: each for index, each in enumerate(parameters) if index in saved["state"]}
    values = {index: each.detach().clone() for index, each in having.items()}
    try:
        for parameter in having.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = {index: optimizer.state[parameter] for index, parameter in having.items()}
    except Exception as error:
        raise UserError(f"{what}: it fails in a step: {told(error)}") from error
    finally:
        with torch.no_grad():
            for index, parameter in having.items():
                parameter.copy_(values[index])
                parameter.grad = None
        optimizer.state.clear()
    return {"options": [set(group) for group in optimizer.state_dict()["param_groups"]], "state": state}


def _differences(saved: Any, own: Any, where: str = "") -> Iterator[str]:
    """What isn't the same in two states, in words: names, and the shapes of tensors."""
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        for key in dict.fromkeys([*saved, *own]):
            name = f"{where}.{key}" if where else str(key)
            if key not in own:
                yield f"'{name}' was saved, and there is no such thing here"
            elif key not in saved:
                yield f"'{name}' is needed here, and wasn't saved"
            else:
                yield from _differences(saved[key], own[key], name)
    elif isinstance(saved, Tensor) and isinstance(own, Tensor):
        if saved.shape != own.shape:
            yield f"'{where}' has shape {tuple(saved.shape)} there, and {tuple(own.shape)} here"
    elif isinstance(saved, list) and isinstance(own, list) and where == "options":
        for number, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
            if theirs != ours:
                listed = ", ".join(sorted(theirs ^ ours))
                yield f"group {number} has other options: {listed}"
