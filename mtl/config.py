"""From a checked config to objects."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any
from zlib import crc32

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtl.balancers import Balancer
from mtl.data import Fields, Loader, Mix, Sources, Splits
from mtl.data.fields import first
from mtl.errors import UserError, suggest, told
from mtl.labels import BY_ELEMENT, there
from mtl.model import MultiTaskModel, match
from mtl.step import Step
from mtl.targets import find, make
from mtl.task import Task

Config = dict[str, Any]
Data = Splits | Sources
LOADER_KEYS = ("batch_size", "eval_batch_size", "num_workers", "collate")


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


def build_splits(config: Config) -> Data:
    """The data, whose samples have the fields that model and tasks ask for.

    Raises:
        UserError: where a field is missing, or the target doesn't give splits.
    """
    node = {key: value for key, value in config["data"].items() if key not in LOADER_KEYS}
    data = make(node, "data")
    if not isinstance(data, Splits | Sources):
        raise UserError(f"data: {node['_target_']} gives a {type(data).__name__}, not mtl.data.Splits")
    collate = build_collate(config)
    fields: dict[int, list[Any]] = {}
    for name, task in config["tasks"].items():
        wanted = {} if task.get("objective") else {key: task.get(key) for key in ("target", "mask")}
        asked = [(f"task '{name}': {key}", field) for key, field in wanted.items() if field]
        measured = [(f"task '{name}': target", task["target"])] if task.get("objective") and task.get("metrics") else []
        if not task.get("objective"):
            asked += [("model.inputs:", field) for field in config["model"]["inputs"]]
        for split, dataset in data.of_task(name, task.get("source")).items():
            if id(dataset) not in fields:
                sample = first(dataset)
                fields[id(dataset)] = list(sample if collate is None else _collated(sample, collate))
            for where, field in asked if split == "train" else asked + measured:
                if field not in fields[id(dataset)]:
                    named = "the dataset" if split == "train" else f"the {split} dataset"
                    there = ", ".join(map(str, fields[id(dataset)]))
                    raise UserError(f"{where} '{field}' not in batch; {named} gives: {there}")
    return data


def _collated(sample: Any, collate: Callable[[list[Any]], Any]) -> Mapping[str, Any]:
    try:
        batch = collate([sample])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data.collate fails on a list of one sample: {told(error)}") from error
    if not isinstance(batch, Mapping):
        raise UserError(f"data.collate gives a {type(batch).__name__}; a batch must be a dict of fields")
    return batch


def build_collate(config: Config) -> Callable[[list[Any]], Any] | None:
    """What makes a batch of a list of samples, None for PyTorch's own.

    Raises:
        UserError: where the target gives nothing that can be called.
    """
    node = config["data"].get("collate")
    collate = make(node, "data.collate")
    if not callable(collate) and node is not None:
        kind = type(collate).__name__
        raise UserError(f"data.collate: {node['_target_']} gives a {kind}; for a function add _partial_: true")
    return collate  # type: ignore[no-any-return]


def fill_from_data(config: Config, splits: Data) -> Config:
    """The config with each value `from_data` of model and tasks replaced by the fact of the data that its key names.

    Raises:
        UserError: for a fact that the data don't have.
    """
    tasks = {
        name: _filled(task, f"tasks.{name}", partial(splits.fact, source=task.get("source")))
        for name, task in config["tasks"].items()
    }
    return {**config, "model": _filled(config["model"], "model", partial(splits.fact, source=None)), "tasks": tasks}


def _filled(node: Any, where: str, fact: Callable[[str], Any]) -> Any:
    if isinstance(node, list):
        return [_filled(item, f"{where}[{index}]", fact) for index, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    found = {}
    for key, value in node.items():
        if value == "from_data":
            try:
                found[key] = fact(key)
            except UserError as error:
                raise UserError(f"{where}.{key}: from_data, but {error}") from error
        else:
            found[key] = _filled(value, f"{where}.{key}", fact)
    return found


def check_facts(splits: Data, trained_on: Mapping[str, Any]) -> None:
    """Refuses data that aren't those a model was trained on: codes and classes would mean something else.

    Raises:
        UserError: for the first fact that differs.
    """
    different = _difference(trained_on, splits.facts)
    if different:
        where, before, now = different
        raise UserError(
            f"data: they aren't what this run was trained on: {where} was {before!r} and is {now!r}. Give the files as "
            "they were, or train anew"
        )


def _difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = (
            _difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
            for key in dict.fromkeys([*before, *now])
        )
        return next(filter(None, found), None)
    numbers = isinstance(before, float) and isinstance(now, float)
    same = math.isclose(before, now, rel_tol=1e-6, abs_tol=1e-12) if numbers else before == now
    return None if same else (where, before, now)  # sums differ in the last digits from machine to machine


def build_loaders(config: Config, data: Data, device: torch.device) -> dict[str, Loader | Mix]:
    """A loader for each split; the training's is shuffled."""
    if isinstance(data, Splits):
        return {split: _loader(config, split, dataset, device, None) for split, dataset in data.items()}
    found: dict[str, Loader | Mix] = {}
    sizes = config["data"]["batch_size"]
    for name in sizes if isinstance(sizes, Mapping) else ():
        if name not in data.sources:
            raise UserError(f"data.batch_size: there is no source '{name}'" + suggest(str(name), data.sources))
    tasks = {name: task["source"] for name, task in config["tasks"].items()}
    for split in ("train", "val", "test"):
        loaders = {
            name: _loader(config, split, dataset, device, name)
            for name, splits in data.sources.items()
            for kind, dataset in splits.items()
            if kind == split and name in tasks.values()
        }
        its = {task: source for task, source in tasks.items() if source in loaders}
        if split == "train":
            found[split] = Mix(
                loaders,
                its,
                sampling=data.sampling,
                temperature=data.temperature,
                epoch=data.epoch,
                seed=config["seed"],
            )
        elif loaders:
            found[split] = Mix(loaders, its)
    return found


def _loader(config: Config, split: str, dataset: Any, device: torch.device, source: str | None) -> Loader:
    node = config["data"]
    size = node["batch_size" if split == "train" else "eval_batch_size"]
    if isinstance(size, Mapping):
        if source is None:
            raise UserError(f"data.batch_size is {dict(size)}; the data have one source, so it must be one number")
        if source not in size:
            raise UserError(f"data.batch_size: it has {', '.join(size)}, and no number for the source '{source}'")
        size = size[source]
    # Sources of one length would otherwise be gone through in one order.
    seed = config["seed"] if source is None else (config["seed"] << 32) + crc32(source.encode())
    return Loader(
        dataset,
        batch_size=size,
        seed=seed,
        shuffle=split == "train",
        drop_last=split == "train" and config["trainer"]["tail"] == "drop",
        num_workers=node["num_workers"],
        device=device,
        collate=build_collate(config),
    )


def build_tasks(config: Config, splits: Data | None = None) -> list[Task]:
    """The tasks, in the config's order.

    In a task's head, loss and objective `from_trunk` stands for the width of the trunk's features: the number that the
    trunk's config gives as `num_features`, or the attribute of that name of the trunk itself.
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
                **_own_parts(_replaced(node, "from_trunk", width), where),
                metrics={key: partial(make, each, f"{where}.metrics.{key}") for key, each in metrics.items() if each},
                weight=make(node.get("weight", 1.0), f"{where}.weight"),
                count=make(node["count"], f"{where}.count") if node.get("count") else None,
                mask=node.get("mask"),
                missing=bool(node.get("missing", "auto")) and not node.get("objective"),
                whole_batch=node.get("whole_batch", False),
            )
        )
        if splits is not None:
            _check_kind(tasks[-1], splits.of_task(name, node.get("source")))
        if node.get("missing", "auto") == "auto" and splits is not None and not node.get("objective"):
            tasks[-1].missing = not _complete(tasks[-1], splits.of_task(name, node.get("source")))
    return tasks


def _replaced(node: Any, word: str, value: Callable[[], Any]) -> Any:
    """The node with the value in place of the word, which is asked for only where that stands."""
    if isinstance(node, Mapping):
        return {key: _replaced(each, word, value) for key, each in node.items()}
    if isinstance(node, list):
        return [_replaced(each, word, value) for each in node]
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


def _own_parts(node: Config, where: str) -> dict[str, Any]:
    """What a task has of head, loss, target and objective."""
    parts: dict[str, Any] = {}
    if node.get("head"):
        parts["head"] = _module(node["head"], f"{where}.head")
    for key in ("loss", "objective"):
        if node.get(key):
            parts[key] = make(node[key], f"{where}.{key}")
    if node.get("target"):
        parts["target"] = node["target"]
    return parts


def _check_kind(task: Task, splits: Splits) -> None:
    """Raises a UserError for a loss of numbers on a column of classes."""
    known = splits.facts.get("targets", {}).get(task.target, {})
    numbers = isinstance(task.loss, BY_ELEMENT) and not isinstance(task.loss, nn.BCEWithLogitsLoss)
    if numbers and known.get("kind") == "class":
        raise UserError(
            f"task '{task.name}': its target '{task.target}' is of classes ({', '.join(known['vocabulary'][:5])}, …), "
            f"and {type(task.loss).__name__} compares numbers; take /objective@tasks.{task.name}: classification"
        )


def _complete(task: Task, splits: Splits) -> bool:
    """Whether it is known that every label is there."""
    if task.mask is not None or not all(isinstance(dataset, Fields) for _, dataset in splits.items()):
        return False
    found = [there(task, dataset.fields) for _, dataset in splits.items()]
    return all(labels is None or bool(labels.all()) for labels in found)


def build_model(config: Config, tasks: list[Task]) -> MultiTaskModel:
    """The model, with what is frozen frozen."""
    node = {key: value for key, value in config["model"].items() if key not in ("freeze", "freeze_until", "trunk")}
    trunk_node = config["model"]["trunk"]
    # With partial, whoever makes several trunks gets several of the modules inside them too.
    trunk = partial(_trunk, trunk_node) if trunk_node.get("_partial_") else _trunk(trunk_node)
    model = make(node, "model", trunk=trunk, tasks=tasks)
    if not isinstance(model, MultiTaskModel):
        raise UserError(f"model: {node['_target_']} is a {type(model).__name__}, not a mtl.MultiTaskModel")
    for pattern, until in (config["model"].get("freeze_until") or {}).items():
        model.freeze([pattern], until=until)
    model.freeze(config["model"].get("freeze") or [])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze takes every parameter out of the training; there is nothing to train")
    return model


def build_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """The optimizer over all of the model's parameters, with the config's groups.

    Raises:
        UserError: for a pattern that nothing matches, and for a parameter in two groups.
    """
    node = {key: value for key, value in config["optimizer"].items() if key not in ("groups", "then")}
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


def build_then(config: Config, model: nn.Module) -> tuple[int, Optimizer] | None:
    """From how many steps on which other optimizer is to take over, None for never."""
    node = config["optimizer"].get("then")
    if node is None:
        return None
    kept = {key: value for key, value in node.items() if key != "after"}
    optimizer = make(kept, "optimizer.then", list(model.parameters()))
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer.then: {node['_target_']} gives a {type(optimizer).__name__}, not a torch Optimizer")
    return node["after"], optimizer


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
    then = build_then(config, model)
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
        scheduler=build_scheduler(config, optimizer, min(total_steps, then[0]) if then else total_steps),
        clip_norm=config["trainer"]["clip_norm"],
        precision=config["precision"],
        on_nonfinite=config["on_nonfinite"],
        then=then,
    )


def final_tags(config: Config, val: bool, test: bool) -> list[str]:
    """The tags of a finished run's figures: what was monitored, and each task's on validation, then best, and test."""
    splits = [split for split, there in (("best", val), ("test", test)) if there]
    tags = ["monitor/best"] if val else []
    for split in splits:
        for name, task in config["tasks"].items():
            metrics = [metric for metric, node in (task.get("metrics") or {}).items() if node]
            tags += [f"metric/{name}/{metric}/{split}" for metric in metrics]
    return tags + [f"loss/{name}/{split}" for split in splits for name in config["tasks"]]


def without_effect(config: Config, step: Step, train: Loader | Mix, total_steps: int) -> list[str]:
    """What is set and changes nothing, a sentence each."""
    found = []
    name = type(step.balancing.balancer).__name__
    if step.balancing.collects and isinstance(train, Mix) and train.sampling != "all":
        sources = list(train.tasks.values())
        if all(sources.count(source) == 1 for source in sources):
            found.append(
                f"{name} has nothing to balance: with data.sampling={train.sampling} and a source for each task, every "
                "step is of one task; take data.sampling=all"
            )
    then = config["optimizer"].get("then")
    if then and then["after"] >= total_steps:
        found.append(f"optimizer.then takes over after {then['after']} steps, and the run has {total_steps}")
    for pattern, until in (config["model"].get("freeze_until") or {}).items():
        if until >= total_steps:
            found.append(f"model.freeze_until.{pattern}: {until} steps, and the run has {total_steps}")
    return found


def _module(node: Any, where: str) -> nn.Module:
    module = make(node, where)
    if not isinstance(module, nn.Module):
        raise UserError(f"{where}: {node['_target_']} gives a {type(module).__name__}, not a torch.nn.Module")
    return module
