"""The options that distinguish a run from others, as one flat mapping for tables of runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from mtl import tags

Value = int | float | str
GROUPS = ("balancer", "optimizer", "scheduler", "model", "model/trunk", "data")  # groups shown by their chosen option
ARGUMENTS_OF = ("balancer", "optimizer", "scheduler")  # groups that also show their arguments
NOT_SHOWN = {"optimizer": ("lr", "groups", "then")}  # lr has its own column, the others aren't values
PLAIN = (
    *("seed", "precision", "passes", "only", "on_nonfinite", "deterministic", "device", "init_from"),
    *("gradients", "trainer", "data.batch_size", "data.num_workers", "optimizer.lr", "model.freeze", "log.every"),
    "vars",
)


def options(
    config: Mapping[str, Any], choices: Mapping[str, str], swept: Sequence[str] = ()
) -> tuple[dict[str, Value], list[str]]:
    """Returns the options of a run by name, with the same names for all runs of a problem, and the swept names.

    A table of runs shows only columns that all runs have. The arguments of a balancer are therefore part of the
    balancer's value, and null is shown as a text.

    Args:
        config: The whole config.
        choices: The chosen option of each group.
        swept: The overrides of the job that the multirun sweeps over, `key=value`.
    """
    values: dict[str, Value] = {}
    for override in swept:
        key = override.lstrip("+").split("=", 1)[0]
        node = _at(config, key)
        if key in choices:
            values[key] = _with_arguments(key, choices[key], config)
        elif key == "tasks":
            values |= {f"tasks.{name}.weight": _value(task.get("weight", 1.0)) for name, task in node.items()}
        else:
            values[key] = _value(node)
    names = list(values)
    for group in GROUPS:
        if group in choices:
            values.setdefault(group, _with_arguments(group, choices[group], config))
    for key in PLAIN:
        node = _at(config, key)
        for name, value in node.items() if isinstance(node, Mapping) else [("", node)]:
            values.setdefault(f"{key}.{name}".rstrip("."), _value(value))
    for name, task in config["tasks"].items():
        values.setdefault(f"tasks.{name}.weight", _value(task.get("weight", 1.0)))
    return values, names


def final_tags(config: Mapping[str, Any], val: bool, test: bool) -> list[str]:
    """Returns the tags of a run's results: the monitor, and each task's metrics on validation (best, last) and test."""
    last = val and config["trainer"].get("last_epochs") is not None
    splits = [split for split, exists in (("best", val), ("last", last), ("test", test)) if exists]
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
    arguments = {k: v for k, v in (node or {}).items() if k not in left_out and v is not None}
    return f"{option} ({', '.join(f'{key}={value}' for key, value in arguments.items())})" if arguments else option


def _value(value: Any) -> Value:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str):
        return value
    return "null" if value is None else str(value)
