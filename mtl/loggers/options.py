"""A run's options in one flat mapping: what distinguishes it from other runs, for tables of runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from mtl import tags

Value = int | float | str
GROUPS = ("balancer", "optimizer", "scheduler", "model", "model/trunk", "data")  # shown by the option chosen
ARGUMENTS_OF = ("balancer", "optimizer", "scheduler")  # and these with what they are given
NOT_SHOWN = {"optimizer": ("lr", "groups", "then")}  # the first has a column of its own, the others are no values
PLAIN = (
    *("seed", "precision", "passes", "only", "on_nonfinite", "deterministic", "device", "init_from"),
    *("gradients", "trainer", "data.batch_size", "data.num_workers", "optimizer.lr", "model.freeze", "log.every"),
    "vars",
)


def options(
    config: Mapping[str, Any], choices: Mapping[str, str], swept: Sequence[str] = ()
) -> tuple[dict[str, Value], list[str]]:
    """The options of a run by name, the same names for all runs of a problem; and those that its multirun sweeps over.

    A table of runs has a column for a name that all have; so a balancer's arguments stand beside its name, and what is
    null is there as a text.

    Args:
        config: the whole of it.
        choices: by group, the option chosen.
        swept: a job's overrides that its multirun sweeps over, `key=value`.
    """
    found: dict[str, Value] = {}
    for override in swept:
        key = override.lstrip("+").split("=", 1)[0]
        node = _at(config, key)
        if key in choices:
            found[key] = _with_arguments(key, choices[key], config)
        elif key == "tasks":
            found |= {f"tasks.{name}.weight": _value(task.get("weight", 1.0)) for name, task in node.items()}
        else:
            found[key] = _value(node)
    names = list(found)
    for group in GROUPS:
        if group in choices:
            found.setdefault(group, _with_arguments(group, choices[group], config))
    for key in PLAIN:
        node = _at(config, key)
        for name, value in node.items() if isinstance(node, Mapping) else [("", node)]:
            found.setdefault(f"{key}.{name}".rstrip("."), _value(value))
    for name, task in config["tasks"].items():
        found.setdefault(f"tasks.{name}.weight", _value(task.get("weight", 1.0)))
    return found, names


def final_tags(config: Mapping[str, Any], val: bool, test: bool) -> list[str]:
    """The tags of a finished run's figures: what was monitored, and each task's on validation, then best, and test."""
    splits = [split for split, there in (("best", val), ("test", test)) if there]
    finals = [tags.BEST] if val else []
    for split in splits:
        for name, task in config["tasks"].items():
            metrics = [metric for metric, node in (task.get("metrics") or {}).items() if node]
            finals += [tags.metric(name, metric, split) for metric in metrics]
    return finals + [tags.loss(name, split) for split in splits for name in config["tasks"]]


def _at(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _with_arguments(group: str, option: str, config: Mapping[str, Any]) -> str:
    node = config.get(group) if group in ARGUMENTS_OF else None
    left_out = ("_target_", *NOT_SHOWN.get(group, ()))
    given = {k: v for k, v in (node or {}).items() if k not in left_out and v is not None}
    return f"{option} ({', '.join(f'{key}={value}' for key, value in given.items())})" if given else option


def _value(value: Any) -> Value:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str):
        return value
    return "null" if value is None else str(value)
