"""The config's model: a trunk, the tasks' heads, and what of them is frozen."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from mtl.config.data import Config
from mtl.config.targets import make
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.task import Task


def build_model(config: Config, tasks: list[Task]) -> MultiTaskModel:
    """The model, with what is frozen frozen."""
    node = {key: value for key, value in config["model"].items() if key not in ("freeze", "freeze_until", "trunk")}
    trunk_node = config["model"]["trunk"]
    # With partial, whoever makes several trunks gets several of the modules inside them too.
    trunk = partial(build_trunk, trunk_node) if trunk_node.get("_partial_") else build_trunk(trunk_node)
    model = make(node, "model", trunk=trunk, tasks=tasks)
    if not isinstance(model, MultiTaskModel):
        raise UserError(f"model: {node['_target_']} is a {type(model).__name__}, not a mtl.MultiTaskModel")
    for pattern, until in (config["model"].get("freeze_until") or {}).items():
        model.freeze([pattern], until=until)
    model.freeze(config["model"].get("freeze") or [])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze takes every parameter out of the training; there is nothing to train")
    return model


def build_trunk(node: Mapping[str, Any]) -> nn.Module:
    """The trunk of the node, one of them where it is partial.

    Raises:
        UserError: where the target gives no module.
    """
    return build_module({key: value for key, value in node.items() if key != "_partial_"}, "model.trunk")


def build_module(node: Any, where: str) -> nn.Module:
    """The module of the node at that place in the config.

    Raises:
        UserError: where the target gives no module.
    """
    module = make(node, where)
    if not isinstance(module, nn.Module):
        raise UserError(f"{where}: {node['_target_']} gives a {type(module).__name__}, not a torch.nn.Module")
    return module
