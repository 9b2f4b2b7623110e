"""Checks whether a resumed run with other classes than before can load the saved state."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.errors import UserError, describe_error
from mtl.step import Step

MOVED = ("lr", "initial_lr", "momentum", "betas")  # options of an optimizer that a scheduler changes


def check(step: Step, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Checks that model, optimizer, scheduler and balancer can load the state, before anything is loaded.

    Args:
        step: The step that will load the state.
        state: The state of the trainer, including the config that it was `composed` with.
        config: The config of `step`.

    Raises:
        UserError: For the first component that can't load the state.
    """
    _check_model(step.model, state["model"])
    for name, component in {**step.descent.components(), "balancer": step.balancing.balancer}.items():
        if name == "then" or not _is_another(name, state, config):
            continue
        saved = state["step"]["balancing"]["balancer"] if name == "balancer" else state["step"].get(name)
        what = f"{name}: {config[name]['_target_']} can't continue from the state of {_target(state['composed'], name)}"
        if saved is None:
            raise UserError(f"{what}: nothing was saved")
        if isinstance(component, Optimizer):
            current = _tried(component, saved, what)
            saved = {"options": [set(group) for group in saved["param_groups"]], "state": saved["state"]}
        else:
            current = component.state_dict()
        if name == "balancer":  # entries may be empty before the first step
            saved, current = dict.fromkeys(saved), dict.fromkeys(current)
            if current and all(str(_target(each, name)).startswith("mtl.") for each in (state["composed"], config)):
                raise UserError(f"{what}: {', '.join(current)} has another meaning in the saved state")
        for difference in _differences(saved, current):
            raise UserError(f"{what}: {difference}")


def options(step: Step, state: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Returns the options to take from the config if the optimizer's class differs, as `resume_allow` names them."""
    if not _is_another("optimizer", state, config):
        return []
    fixed = MOVED if "scheduler" in step.descent.components() else ()
    return [f"optimizer.{key}" for group in step.descent.param_groups(first=True) for key in group if key not in fixed]


def _target(config: Mapping[str, Any], name: str) -> Any:
    return (config.get(name) or {}).get("_target_")


def _is_another(name: str, state: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return bool(_target(state["composed"], name) != _target(config, name))


def _check_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raises a UserError if parameters and buffers differ in names, shapes or order."""
    current = model.state_dict()
    for difference in _differences(dict(saved), dict(current)):
        raise UserError(f"the model's parameters and buffers differ from the saved ones: {difference}")
    if list(saved) != list(current):
        raise UserError("the model's parameters have another order than in the saved state, which the optimizer needs")


def _tried(optimizer: Optimizer, saved: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Returns the optimizer's state after a trial step with zero gradients, which is undone afterwards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with_state = {index: each for index, each in enumerate(parameters) if index in saved["state"]}
    values = {index: each.detach().clone() for index, each in with_state.items()}
    try:
        for parameter in with_state.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = {index: optimizer.state[parameter] for index, parameter in with_state.items()}
    except Exception as error:
        raise UserError(f"{what}: a step fails: {describe_error(error)}") from error
    finally:
        with torch.no_grad():
            for index, parameter in with_state.items():
                parameter.copy_(values[index])
                parameter.grad = None
        optimizer.state.clear()
    return {"options": [set(group) for group in optimizer.state_dict()["param_groups"]], "state": state}


def _differences(saved: Any, current: Any, where: str = "") -> Iterator[str]:
    """Yields descriptions of the differences between two states: names, and shapes of tensors."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in dict.fromkeys([*saved, *current]):
            name = f"{where}.{key}" if where else str(key)
            if key not in current:
                yield f"'{name}' was saved, and isn't part of the current state"
            elif key not in saved:
                yield f"'{name}' is part of the current state, and wasn't saved"
            else:
                yield from _differences(saved[key], current[key], name)
    elif isinstance(saved, Tensor) and isinstance(current, Tensor):
        if saved.shape != current.shape:
            yield f"'{where}' was saved with shape {tuple(saved.shape)}, and has shape {tuple(current.shape)} now"
    elif isinstance(saved, list) and isinstance(current, list) and where == "options":
        for number, (saved_option, current_option) in enumerate(zip(saved, current, strict=True)):
            if saved_option != current_option:
                listed = ", ".join(sorted(saved_option ^ current_option))
                yield f"group {number} has other options: {listed}"
