"""From a checked config to objects."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtl.balancers import Balancer
from mtl.data import Fields, Loader, Splits
from mtl.errors import UserError
from mtl.labels import there
from mtl.model import MultiTaskModel, match
from mtl.step import Step
from mtl.targets import find, make
from mtl.task import Task

Config = dict[str, Any]
LOADER_KEYS = ("batch_size", "eval_batch_size", "num_workers")


def add_code_folders(folders: Iterable[str]) -> None:
    """Makes modules in these folders importable, after all others."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)


def choose_device(name: str) -> torch.device:
    """The device that the config means; `auto` is the first GPU, or the CPU.

    Raises:
        UserError: for a GPU that isn't there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: there is no '{name}' here; {torch.cuda.device_count()} GPUs are visible. Try cpu")
    return device


def build_splits(config: Config) -> Splits:
    """The data, whose samples have the fields that model and tasks ask for.

    Raises:
        UserError: where a field is missing, or the target doesn't give splits.
    """
    node = {key: value for key, value in config["data"].items() if key not in LOADER_KEYS}
    splits = make(node, "data")
    if not isinstance(splits, Splits):
        raise UserError(f"data: {node['_target_']} gives a {type(splits).__name__}, not mtl.data.Splits")
    for split, dataset in splits.items():
        fields = list(dataset[0])
        wanted = {f"task '{name}': target": task["target"] for name, task in config["tasks"].items()}
        wanted |= {f"task '{name}': mask": task["mask"] for name, task in config["tasks"].items() if task.get("mask")}
        for where, field in [*wanted.items(), *(("model.inputs:", field) for field in config["model"]["inputs"])]:
            if field not in fields:
                named = "the dataset" if split == "train" else f"the {split} dataset"
                raise UserError(f"{where} '{field}' not in batch; {named} gives: {', '.join(map(str, fields))}")
    return splits


def build_loaders(config: Config, splits: Splits, device: torch.device) -> dict[str, Loader]:
    """A loader for each split; the training's is shuffled."""
    data = config["data"]
    return {
        split: Loader(
            dataset,
            batch_size=data["batch_size" if split == "train" else "eval_batch_size"],
            seed=config["seed"],
            shuffle=split == "train",
            drop_last=split == "train" and config["trainer"]["tail"] == "drop",
            num_workers=data["num_workers"],
            device=device,
        )
        for split, dataset in splits.items()
    }


def build_tasks(config: Config, splits: Splits | None = None) -> list[Task]:
    """The tasks, in the config's order.

    In a head's config `from_trunk` stands for the width of the trunk's features: the number that the trunk's config
    gives as `num_features`, or the attribute of that name of the trunk itself.
    Where a task's `missing` is `auto`, labels may be missing unless the splits are in memory and all labels are there.

    Raises:
        UserError: for `from_trunk` where the trunk has neither.
    """
    tasks = []
    width = cache(partial(_trunk_width, config))
    for name, node in config["tasks"].items():
        where = f"tasks.{name}"
        metrics = node.get("metrics") or {}
        tasks.append(
            Task(
                name,
                head=_module(_filled(node["head"], "from_trunk", width), f"{where}.head"),
                loss=make(node["loss"], f"{where}.loss"),
                target=node["target"],
                metrics={key: partial(make, metric, f"{where}.metrics.{key}") for key, metric in metrics.items()},
                weight=float(node.get("weight", 1.0)),
                count=make(node["count"], f"{where}.count") if node.get("count") else None,
                mask=node.get("mask"),
                missing=bool(node.get("missing", "auto")),
                whole_batch=node.get("whole_batch", False),
            )
        )
        if node.get("missing", "auto") == "auto" and splits is not None:
            tasks[-1].missing = not _complete(tasks[-1], splits)
    return tasks


def _filled(node: Any, word: str, value: Callable[[], Any]) -> Any:
    """The node with the value in place of the word, which is asked for only where that stands."""
    if isinstance(node, Mapping):
        return {key: _filled(each, word, value) for key, each in node.items()}
    if isinstance(node, list):
        return [_filled(each, word, value) for each in node]
    return value() if node == word else node


def _trunk_width(config: Config) -> int:
    node = config["model"]["trunk"]
    width = node.get("num_features")
    if width is None:
        # A trunk for a look. The model's own is made after the heads, as ever, so that each gets the same first values
        # wherever the width is known from.
        with torch.random.fork_rng(devices=[]):
            width = getattr(_trunk(node), "num_features", None)
    if type(width) is not int:
        raise UserError(
            f"model.trunk: heads ask for the width of its features with from_trunk, and {node['_target_']} has neither "
            "a key nor an attribute num_features. Give heads the number itself, such as tasks.….head.in_features=64"
        )
    return width


def _trunk(node: Mapping[str, Any]) -> nn.Module:
    return _module({key: value for key, value in node.items() if key != "_partial_"}, "model.trunk")


def _complete(task: Task, splits: Splits) -> bool:
    """Whether it is known that every label is there."""
    if task.mask is not None or not all(isinstance(dataset, Fields) for _, dataset in splits.items()):
        return False
    found = [there(task, dataset.fields) for _, dataset in splits.items()]
    return all(labels is None or bool(labels.all()) for labels in found)


def build_model(config: Config, tasks: list[Task]) -> MultiTaskModel:
    """The model, with what is frozen frozen."""
    node = {key: value for key, value in config["model"].items() if key not in ("freeze", "trunk")}
    trunk_node = config["model"]["trunk"]
    # With partial, whoever makes several trunks gets several of the modules inside them too.
    trunk = partial(_trunk, trunk_node) if trunk_node.get("_partial_") else _trunk(trunk_node)
    model = make(node, "model", trunk=trunk, tasks=tasks)
    if not isinstance(model, MultiTaskModel):
        raise UserError(f"model: {node['_target_']} is a {type(model).__name__}, not a mtl.MultiTaskModel")
    model.freeze(config["model"].get("freeze") or [])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze takes every parameter out of the training; there is nothing to train")
    return model


def build_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """The optimizer over all of the model's parameters, with the config's groups.

    Raises:
        UserError: for a pattern that nothing matches, and for a parameter in two groups.
    """
    node = {key: value for key, value in config["optimizer"].items() if key != "groups"}
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = []
    taken: dict[str, str] = {}
    takes = inspect.signature(find(node["_target_"], "optimizer")).parameters
    for pattern, values in (config["optimizer"].get("groups") or {}).items():
        where = f"optimizer.groups.{pattern}"
        names = match(model, [pattern], where)
        for name in names:
            if name in taken:
                raise UserError(f"{where}: '{name}' is in the group '{taken[name]}' too")
            taken[name] = pattern
        for key in values:
            if key not in takes:
                raise UserError(f"{where}.{key}: {node['_target_']} has no '{key}'; it takes: {', '.join(takes)}")
        groups.append({"params": [named[name] for name in names], "name": pattern, **values})
    rest = [parameter for name, parameter in named.items() if name not in taken]
    if rest:
        groups.insert(0, {"params": rest, "name": "default"})
    optimizer = make(node, "optimizer", groups)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer: {node['_target_']} gives a {type(optimizer).__name__}, not a torch Optimizer")
    return optimizer


def reset_optimizer(optimizer: Optimizer | None, config: Config, allowed: Iterable[str]) -> None:
    """Gives an optimizer whose state was loaded those of the config's options that were allowed to change."""
    for key in allowed:
        group, _, name = key.partition(".")
        if optimizer is not None and group == "optimizer" and name in config["optimizer"]:
            for options in optimizer.param_groups:
                options[name] = config["optimizer"][name]


def build_scheduler(config: Config, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
    """The learning-rate scheduler, or None; in its arguments the word `total_steps` stands for that number."""
    node = config["scheduler"]
    if node is None:
        return None
    node = {key: total_steps if value == "total_steps" else value for key, value in node.items()}
    scheduler = make(node, "scheduler", optimizer)
    if not isinstance(scheduler, LRScheduler) or "metrics" in inspect.signature(scheduler.step).parameters:
        raise UserError(f"scheduler: {node['_target_']} can't be stepped once a step, as torch's LRSchedulers can")
    return scheduler


def build_step(config: Config, model: MultiTaskModel, tasks: list[Task], total_steps: int) -> Step:
    """The step, with balancer, optimizer and scheduler."""
    optimizer = build_optimizer(config, model)
    balancer = make(config["balancer"], "balancer")
    if not isinstance(balancer, Balancer):
        target = config["balancer"]["_target_"]
        raise UserError(f"balancer: {target} gives a {type(balancer).__name__}, not a mtl.balancers.Balancer")
    return Step(
        model,
        tasks,
        optimizer,
        balancer=balancer,
        passes=config["passes"],
        source=config["gradients"]["source"],
        every=config["gradients"]["every"],
        micro_batch_size=config["trainer"]["micro_batch_size"],
        num_micro_batches=config["trainer"]["num_micro_batches"],
        scheduler=build_scheduler(config, optimizer, total_steps),
        clip_norm=config["trainer"]["clip_norm"],
        precision=config["precision"],
        on_nonfinite=config["on_nonfinite"],
    )


def _module(node: Any, where: str) -> nn.Module:
    module = make(node, where)
    if not isinstance(module, nn.Module):
        raise UserError(f"{where}: {node['_target_']} gives a {type(module).__name__}, not a torch.nn.Module")
    return module
