"""Builds the config's model: a trunk and the tasks' heads, some of which may be frozen."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from mtl.config.data import Config
from mtl.config.targets import make
from mtl.distributed import sync_batchnorm
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.recompute import recompute
from mtl.step.lazy import lazy
from mtl.task import Task

# Keys that aren't arguments of the model's class.
OWN = ("checkpoint", "compile", "freeze", "freeze_until", "sync_batchnorm", "trunk")


def build_model(config: Config, tasks: list[Task]) -> MultiTaskModel:
    """Builds the model, in which modules that the config names are frozen or recompute their activations."""
    node = {key: value for key, value in config["model"].items() if key not in OWN}
    trunk_node = config["model"]["trunk"]
    # With a partial node, an architecture that makes several trunks gets new inner modules for each of them.
    trunk = partial(build_trunk, trunk_node) if trunk_node.get("_partial_") else build_trunk(trunk_node)
    model = make(node, "model", trunk=trunk, tasks=tasks)
    if not isinstance(model, MultiTaskModel):
        raise UserError(f"model: {node['_target_']} is a {type(model).__name__}, not a mtl.MultiTaskModel")
    if config["model"].get("sync_batchnorm") and not lazy(model):
        sync_batchnorm(model)
    recompute(model, config["model"].get("checkpoint") or [])
    for pattern, until in (config["model"].get("freeze_until") or {}).items():
        model.freeze([pattern], until=until)
    model.freeze(config["model"].get("freeze") or [])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze freezes every parameter; there is nothing to train")
    return model


def build_trunk(node: Mapping[str, Any]) -> nn.Module:
    """Builds the trunk that the node describes; builds one instance if the node is partial.

    Raises:
        UserError: If the callable named by `_target_` doesn't return a module.
    """
    return build_module({key: value for key, value in node.items() if key != "_partial_"}, "model.trunk")


def build_module(node: Any, where: str) -> nn.Module:
    """Builds the module that the config node at the path `where` describes.

    Raises:
        UserError: If the callable named by `_target_` doesn't return a module.
    """
    module = make(node, where)
    if not isinstance(module, nn.Module):
        raise UserError(f"{where}: {node['_target_']} gives a {type(module).__name__}, not a torch.nn.Module")
    return module
