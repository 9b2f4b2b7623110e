"""Builds the config's tasks, and fills in values that only the trunk and the data determine."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from mtl.config.data import Config, Data
from mtl.config.model import build_module, build_trunk
from mtl.config.targets import make
from mtl.data import Fields, Splits
from mtl.data.cells import written_otherwise
from mtl.errors import UserError
from mtl.labels import label_mask
from mtl.task import BY_ELEMENT, Task


def build_tasks(config: Config, splits: Data | None = None) -> list[Task]:
    """Builds the tasks, in the order of the config.

    In a task's head, loss and objective, `from_trunk` is replaced by the number of the trunk's features, which is
    `num_features` in the trunk's config or the attribute of that name of the trunk. If a task's `missing` is `auto`,
    labels may be missing unless the splits are in memory and all labels are present.

    Raises:
        UserError: If `from_trunk` is used and the trunk has no `num_features`.
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
                output=node.get("output"),
                mean_over=node.get("mean_over"),
                missing=None if node.get("objective") else bool(node.get("missing", "auto")),
                whole_batch=node.get("whole_batch", False),
            )
        )
        if splits is not None:
            _check_kind(tasks[-1], splits.of_task(name, node.get("source")))
        if node.get("missing", "auto") == "auto" and splits is not None and not node.get("objective"):
            tasks[-1].missing = not _complete(tasks[-1], splits.of_task(name, node.get("source")))
    return tasks


def _replaced(node: Any, word: str, value: Callable[[], Any]) -> Any:
    """Returns the node with `value()` in place of the word; `value` is called only if the word occurs."""
    if isinstance(node, Mapping):
        return {key: _replaced(each, word, value) for key, each in node.items()}
    if isinstance(node, list):
        return [_replaced(each, word, value) for each in node]
    return value() if node == word else node


def _trunk_width(config: Config) -> int:
    node = config["model"]["trunk"]
    width = node.get("num_features")
    if width is None:
        # Build a temporary trunk. The model's trunk is built after the heads in any case, so that initial values don't
        # depend on where the number of features comes from.
        with torch.random.fork_rng(devices=[]):
            width = getattr(build_trunk(node), "num_features", None)
    if type(width) is not int:
        raise UserError(
            f"model.trunk: heads use from_trunk, the number of its features, but {node['_target_']} has neither a key "
            "nor an attribute num_features. Set the number in the heads, such as tasks.….head.in_features=64"
        )
    return width


def _own_parts(node: Config, where: str) -> dict[str, Any]:
    """Returns which of head, loss, target and objective the task sets."""
    parts: dict[str, Any] = {}
    if node.get("head"):
        parts["head"] = build_module(node["head"], f"{where}.head")
    for key in ("loss", "objective"):
        if node.get(key):
            parts[key] = make(node[key], f"{where}.{key}")
    if node.get("target"):
        parts["target"] = node["target"]
    return parts


def _check_kind(task: Task, splits: Splits) -> None:
    """Raises a UserError if a regression loss is used for a column of classes, or a classification loss for numbers."""
    facts = splits.facts.get("targets", {}).get(task.target, {})
    numbers = isinstance(task.loss, BY_ELEMENT) and not isinstance(task.loss, nn.BCEWithLogitsLoss)
    loss = type(task.loss).__name__
    if numbers and facts.get("kind") == "class":
        plain = "write plain numbers into the column, or " if written_otherwise(facts["vocabulary"]) else ""
        raise UserError(
            f"task '{task.name}': its target '{task.target}' has classes ({', '.join(facts['vocabulary'][:5])}, …), "
            f"and {loss} compares numbers; {plain}use /objective@tasks.{task.name}: classification"
        )
    if isinstance(task.loss, nn.CrossEntropyLoss | nn.NLLLoss) and facts.get("kind") == "number":
        raise UserError(
            f"task '{task.name}': its target '{task.target}' has numbers, and {loss} expects classes; list "
            f"'{task.target}' in data.classes, or use /objective@tasks.{task.name}: regression"
        )


def _complete(task: Task, splits: Splits) -> bool:
    """Returns whether all labels of the task are known to be present."""
    if task.mask is not None or not all(isinstance(dataset, Fields) for _, dataset in splits.items()):
        return False
    masks = [label_mask(task, dataset.fields) for _, dataset in splits.items()]
    return all(labels is None or bool(labels.all()) for labels in masks)
