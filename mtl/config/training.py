"""Builds the config's optimizer step: balancer, optimizer and scheduler."""

import inspect
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from mtl.balancers import Balancer
from mtl.config.data import Config
from mtl.config.scheduler import build_scheduler, interval_of
from mtl.config.targets import find, make
from mtl.data import Loader, Mix
from mtl.distributed import world_size
from mtl.errors import UserError, first_line
from mtl.model import MultiTaskModel, match
from mtl.step import Gradients, Step, Update
from mtl.step.learned import parameters_of
from mtl.task import Task


def build_step(config: Config, model: MultiTaskModel, tasks: list[Task], total_steps: int) -> Step:
    """Builds the step with balancer, optimizer and scheduler.

    Args:
        config: The config of the run.
        model: The model to train.
        tasks: The tasks of the model.
        total_steps: The number of optimizer steps in the run.
    """
    balancer = make(config["balancer"], "balancer")
    if not isinstance(balancer, Balancer):
        target = config["balancer"]["_target_"]
        raise UserError(f"balancer: {target} gives a {type(balancer).__name__}, not a mtl.balancers.Balancer")
    learned = _parameters_of(balancer, model, tasks)
    optimizer = _build_optimizer(config, model, learned)
    then = _build_then(config, [*model.parameters(), *learned])
    return Step(
        model,
        tasks,
        optimizer,
        balancer=balancer,
        passes=config["passes"],
        gradients=Gradients(**config["gradients"]),
        micro_batch_size=config["trainer"]["micro_batch_size"],
        num_micro_batches=config["trainer"]["num_micro_batches"],
        update=Update(
            scheduler=build_scheduler(config, optimizer, min(total_steps, then[0]) if then else total_steps),
            interval=interval_of(config["scheduler"]),
            clip_norm=config["trainer"]["clip_norm"],
            clip_shared_norm=config["trainer"]["clip_shared_norm"],
            then=then,
        ),
        precision=config["precision"],
        on_nonfinite=config["on_nonfinite"],
        compile=config["model"].get("compile") or False,
    )


def _parameters_of(balancer: Balancer, model: nn.Module, tasks: list[Task]) -> list[nn.Parameter]:
    """Returns the balancer's learned parameters that the model's optimizer updates."""
    try:
        return parameters_of(balancer, len(tasks), next(model.parameters()))
    except ValueError as error:
        raise UserError(f"balancer: {first_line(error)}") from error


def _build_optimizer(config: Config, model: nn.Module, learned: list[nn.Parameter]) -> Optimizer:
    """Builds the optimizer for all parameters of the model, in the config's groups, and for the balancer's parameters.

    A parameter belongs to the first group, in the order of the config, whose pattern matches the parameter's name.

    Raises:
        UserError: If a pattern matches nothing, or if all parameters of a group belong to earlier groups.
    """
    node = {key: value for key, value in config["optimizer"].items() if key not in ("groups", "then")}
    if node.get("lr", 0) is None:
        del node["lr"]  # use the optimizer's default
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = []
    taken: dict[str, str] = {}
    takes = inspect.signature(find(node["_target_"], "optimizer")).parameters
    for pattern, values in (config["optimizer"].get("groups") or {}).items():
        where = f"optimizer.groups.{pattern}"
        matching = match(model, [pattern], where)
        names = [name for name in matching if name not in taken]
        if not names:
            earlier = ", ".join(f"'{other}'" for other in dict.fromkeys(taken[name] for name in matching))
            raise UserError(
                f"{where}: no parameter is left for this group. A parameter belongs to the first pattern that matches "
                f"it, and all that match '{pattern}' belong to {earlier} already; write '{pattern}' first"
            )
        taken |= dict.fromkeys(names, pattern)
        for key in values:
            if key not in takes:
                raise UserError(f"{where}.{key}: {node['_target_']} has no '{key}'; it takes: {', '.join(takes)}")
        groups.append({"params": [named[name] for name in names], "name": pattern, **values})
    rest = [parameter for name, parameter in named.items() if name not in taken]
    if rest:
        groups.insert(0, {"params": rest, "name": "default"})
    if learned:
        groups.append({"params": learned, "name": "balancer"})
    optimizer = make(node, "optimizer", groups)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer: {node['_target_']} gives a {type(optimizer).__name__}, not a torch Optimizer")
    return optimizer


def _build_then(config: Config, parameters: list[nn.Parameter]) -> tuple[int, Optimizer] | None:
    """Returns the number of steps before the second optimizer, and this optimizer; None if the config has none."""
    node = config["optimizer"].get("then")
    if node is None:
        return None
    arguments = {key: value for key, value in node.items() if key != "after"}
    optimizer = make(arguments, "optimizer.then", parameters)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer.then: {node['_target_']} gives a {type(optimizer).__name__}, not a torch Optimizer")
    return node["after"], optimizer


def without_effect(config: Config, step: Step, train: Loader | Mix, total_steps: int) -> list[str]:
    """Returns a sentence for each option that is set but has no effect."""
    sentences = []
    name = type(step.balancing.balancer).__name__
    if step.balancing.collects and step.balancing.source == "layerwise" and step.compiled.names:
        sentences.append(
            f"gradients.source=layerwise has no effect in {', '.join(step.compiled.names)}, whose layers model.compile "
            f"hides; with {name}, eager modules may be faster"
        )
    if not step.balancing.collects and config["gradients"] != {"source": "auto", "every": 1}:
        sentences.append(f"gradients.* has no effect with {name} and these tasks")
    if step.balancing.collects and isinstance(train, Mix) and train.sampling != "all":
        sources = list(train.tasks.values())
        if all(sources.count(source) == 1 for source in sources):
            sentences.append(
                f"{name} has nothing to balance: with data.sampling={train.sampling} and a source for each task, every "
                "step has one task; use data.sampling=all"
            )
    if config.get("distributed") in ("fsdp", "hsdp") and world_size() == 1:
        sentences.append(f"distributed={config['distributed']} has no effect in one process; start several by torchrun")
    if config["trainer"]["clip_shared_norm"] is not None and len(step.tasks) == 1:
        sentences.append("trainer.clip_shared_norm has no effect with one task, which shares no parameter")
    clips = [name for name in ("clip_norm", "clip_shared_norm") if config["trainer"][name] is not None]
    if clips and isinstance(step.descent.first, LBFGS):
        sentences.append(f"trainer.{clips[0]} has no effect with LBFGS, whose line search uses the unclipped gradient")
    then = config["optimizer"].get("then")
    if then and then["after"] >= total_steps:
        sentences.append(f"optimizer.then takes over after {then['after']} steps, but the run has {total_steps}")
    for pattern, until in (config["model"].get("freeze_until") or {}).items():
        if until >= total_steps:
            sentences.append(f"model.freeze_until.{pattern} is {until} steps, but the run has {total_steps}")
    return sentences
