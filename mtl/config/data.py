"""Builds the config's data: splits with the required fields, facts for the model, and data loaders."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from zlib import crc32

import torch

from mtl.config.targets import make
from mtl.data import Loader, Mix, Sources, Splits
from mtl.data.fields import first
from mtl.data.lanes import length_of
from mtl.errors import FOREIGN, UserError, describe_error, suggest

Config = dict[str, Any]
Data = Splits | Sources
LOADER_KEYS = ("batch_size", "eval_batch_size", "num_workers", "collate")


def build_splits(config: Config) -> Data:
    """Builds the data and checks that samples have the fields which the model and the tasks use.

    Raises:
        UserError: If a field is missing, or if the callable named by `_target_` doesn't return splits.
    """
    node = {key: value for key, value in config["data"].items() if key not in LOADER_KEYS}
    data = make(node, "data")
    if not isinstance(data, Splits | Sources):
        raise UserError(f"data: {node['_target_']} gives a {type(data).__name__}, not mtl.data.Splits")
    collate = _build_collate(config)
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
                    available = ", ".join(map(str, fields[id(dataset)]))
                    raise UserError(f"{where} '{field}' not in batch; {named} gives: {available}")
    return data


def _collated(sample: Any, collate: Callable[[list[Any]], Any]) -> Mapping[str, Any]:
    try:
        batch = collate([sample])
    except UserError:
        raise
    except FOREIGN as error:
        raise UserError(f"data.collate fails on a list of one sample: {describe_error(error)}") from error
    if not isinstance(batch, Mapping):
        raise UserError(f"data.collate gives a {type(batch).__name__}; a batch must be a dict of fields")
    return batch


def _build_collate(config: Config) -> Callable[[list[Any]], Any] | None:
    """Builds the function that collates a list of samples into a batch; returns None for PyTorch's default.

    Raises:
        UserError: If the object that `data.collate` describes isn't callable.
    """
    node = config["data"].get("collate")
    collate = make(node, "data.collate")
    if not callable(collate) and node is not None:
        kind = type(collate).__name__
        raise UserError(f"data.collate: {node['_target_']} gives a {kind}; for a function add _partial_: true")
    return collate  # type: ignore[no-any-return]


def fill_from_data(config: Config, splits: Data) -> Config:
    """Replaces each value `from_data` of model and tasks with the data's fact of the same key, and returns the config.

    Raises:
        UserError: If the data don't have the fact.
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
    values = {}
    for key, value in node.items():
        if value == "from_data":
            try:
                values[key] = fact(key)
            except UserError as error:
                raise UserError(f"{where}.{key}: from_data, but {error}") from error
        else:
            values[key] = _filled(value, f"{where}.{key}", fact)
    return values


def check_facts(splits: Data, trained_on: Mapping[str, Any]) -> None:
    """Checks that data have the facts that a model was trained with; codes and classes would otherwise change meaning.

    Raises:
        UserError: If a fact differs; the message names the first one.
    """
    different = _difference(trained_on, splits.facts)
    if different:
        where, before, now = different
        raise UserError(
            f"data: they differ from what this run was trained on: {where} was {before!r} and is {now!r}. Use the "
            "same files as before, or train a new run"
        )


def _difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        differences = (
            _difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
            for key in dict.fromkeys([*before, *now])
        )
        return next(filter(None, differences), None)
    numbers = isinstance(before, float) and isinstance(now, float)
    same = math.isclose(before, now, rel_tol=1e-6, abs_tol=1e-12) if numbers else before == now
    return None if same else (where, before, now)  # the last digits of sums depend on the machine


def build_loaders(config: Config, data: Data, device: torch.device) -> dict[str, Loader | Mix]:
    """Builds a data loader for each split; only the training loader shuffles."""
    if isinstance(data, Splits):
        return {split: _loader(config, split, dataset, device, None, data) for split, dataset in data.items()}
    loaders_by_split: dict[str, Loader | Mix] = {}
    sizes = config["data"]["batch_size"]
    for name in sizes if isinstance(sizes, Mapping) else ():
        if name not in data.sources:
            raise UserError(f"data.batch_size: there is no source '{name}'" + suggest(str(name), data.sources))
    tasks = {name: task["source"] for name, task in config["tasks"].items()}
    for split in ("train", "val", "test"):
        loaders = {
            name: _loader(config, split, dataset, device, name, splits)
            for name, splits in data.sources.items()
            for kind, dataset in splits.items()
            if kind == split and name in tasks.values()
        }
        source_of_task = {task: source for task, source in tasks.items() if source in loaders}
        if split == "train":
            loaders_by_split[split] = Mix(
                loaders,
                source_of_task,
                sampling=data.sampling,
                temperature=data.temperature,
                epoch=data.epoch,
                seed=config["seed"],
            )
        elif loaders:
            loaders_by_split[split] = Mix(loaders, source_of_task)
    return loaders_by_split


def _loader(
    config: Config, split: str, dataset: Any, device: torch.device, source: str | None, splits: Splits
) -> Loader:
    node = config["data"]
    if source is not None and (length_of(dataset) is None or splits.epoch is not None):
        raise UserError(
            f"data.sources.{source}.{split}: one of several sources needs a length, with which it begins again; give "
            "it one: {_target_: mtl.data.Stream, dataset: …, length: …}, without `epoch`"
        )
    size = node["batch_size" if split == "train" else "eval_batch_size"]
    if isinstance(size, Mapping):
        if source is None:
            raise UserError(f"data.batch_size is {dict(size)}; the data have one source, so this must be one number")
        if source not in size:
            raise UserError(f"data.batch_size has {', '.join(size)}, but no number for the source '{source}'")
        size = size[source]
    # Sources of equal length would otherwise be read in the same order.
    seed = config["seed"] if source is None else (config["seed"] << 32) + crc32(source.encode())
    return Loader(
        dataset,
        batch_size=size,
        seed=seed,
        shuffle=split == "train",
        drop_last=split == "train" and config["trainer"]["tail"] == "drop",
        num_workers=node["num_workers"],
        device=device,
        collate=_build_collate(config),
        micro_batch_size=config["trainer"].get("micro_batch_size") if split == "train" else None,
        num_micro_batches=config["trainer"].get("num_micro_batches") if split == "train" else None,
        of=split if source is None else f"{split} of {source}",
        steps=splits.epoch if split == "train" else None,
        readers=splits.readers,
    )
