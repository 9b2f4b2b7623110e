"""Names of configs, which consist of the values that differ between the configs."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl.reporting.writing import shortened

MISSING = object()
ORDER = ("balancer", "tasks", "model", "optimizer", "scheduler", "trainer")  # the first parts of a name, before others
LONGEST = 40  # the most characters of a value
LONG = 40  # characters of a name; if any name is longer, all names omit keys that aren't needed to distinguish them

Values = list[dict[str, str]]  # for each config, the values by dotted key, as text


@dataclass(frozen=True)
class Name:
    """The name of a config.

    Args:
        text: The name, different for each config.
        settings: The keys that differ between any of the configs, with the values of this config.
        left_out: The keys in `settings` that aren't in the text.
    """

    text: str
    settings: dict[str, str]
    left_out: list[str]


def names(configs: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, str]]) -> list[Name]:
    """Returns a name for each config, such as `upgrad`, `upgrad, lr=0.001` or `weights digit 0.2 / parity 1.8`.

    A name consists of all values that differ. If the class of a component differs, the component's keys are compared
    only between configs with the same class. A user's variable that only repeats another key is left out. If nothing
    differs, the name is that of the balancer. If names would be long, they contain only what distinguishes them.

    Args:
        configs: The configs as plain data, without keys that don't matter for the comparison.
        choices: For each config, the chosen option of each Hydra group; may be empty.
    """
    values = differences(configs, choices)
    short = _shorten(list(dict.fromkeys(key for pieces in values for key in pieces)))
    repeated = _repeated_variables(values)
    shown = [{key: value for key, value in pieces.items() if key not in repeated} for pieces in values]
    joined = [", ".join(_pieces(pieces, short)) for pieces in shown]
    if max(map(len, joined), default=0) > LONG:
        shown = _distinguishing(shown)
        joined = [", ".join(_pieces(pieces, short)) for pieces in shown]
    texts = [
        text or ("equal weights" if pieces else _part(config.get("balancer"), "balancer", chosen)) or "all the same"
        for text, pieces, config, chosen in zip(joined, shown, configs, choices, strict=True)
    ]
    unique = [
        f"{text} (#{texts[:index].count(text) + 1})" if texts.count(text) > 1 else text
        for index, text in enumerate(texts)
    ]
    return [
        Name(text, whole, [k for k in whole if k not in {*least, *repeated} and not _is_default_weight(k, whole)])
        for text, whole, least in zip(unique, values, shown, strict=True)
    ]


def differences(configs: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, str]]) -> Values:
    """Returns, for each config, the keys that differ between any of the configs, with the config's values as text."""
    values: Values = [{} for _ in configs]
    _compare(dict(enumerate(configs)), "", values, choices)
    return values


def natural(label: str) -> list[tuple[int, float, str]]:
    """Returns a sort key that orders numbers in labels by value, such as 0.5 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", label)
    return [(1, float(part), "") if index % 2 else (0, 0.0, part) for index, part in enumerate(parts)]


def _compare(nodes: Mapping[int, Any], where: str, result: Values, choices: Sequence[Mapping[str, str]]) -> None:
    """Records the differences between nodes of the configs in `result`.

    Args:
        nodes: The node for each config that has one, by the index of the config.
        where: The dotted key of the nodes.
        result: The differences by config and key, to which those of these nodes are added.
        choices: For each config, the chosen option of each Hydra group.
    """
    values = list(nodes.values())
    if all(value == values[0] for value in values):
        return
    present = {index: node for index, node in nodes.items() if node is not MISSING}
    if where == "tasks":
        if len({tuple(node) for node in present.values()}) > 1:
            for index, node in present.items():
                names = list(node)
                result[index]["tasks"] = "+".join(names) if len(names) <= 4 else f"{len(names)} tasks"
        for task in dict.fromkeys(task for node in present.values() for task in node):
            having = {index: node[task] for index, node in present.items() if task in node}
            _compare(having, f"tasks.{task}", result, choices)
        return
    targets = {index: node.get("_target_") if isinstance(node, dict) else None for index, node in nodes.items()}
    if any(targets.values()):
        options = {index: choices[index].get(where.replace(".", "/")) for index in nodes}
        known = all(options.values())
        kinds = {index: (targets[index], options[index] if known else None) for index in nodes}
        by_kind: dict[Any, dict[int, Any]] = {}
        for index, node in nodes.items():
            by_kind.setdefault(kinds[index], {})[index] = node
        for same in by_kind.values():
            for index, node in same.items():
                if len(by_kind) > 1:
                    result[index][where] = _part(node, where, choices[index])
            _compare_keys(same, where, result, choices)
    elif all(isinstance(value, dict) for value in values):
        _compare_keys(nodes, where, result, choices)
    else:
        for index, node in nodes.items():
            result[index][where] = _value(node)


def _compare_keys(nodes: Mapping[int, Any], where: str, result: Values, choices: Sequence[Mapping[str, str]]) -> None:
    mappings = {index: node for index, node in nodes.items() if isinstance(node, dict)}
    for key in dict.fromkeys(key for node in mappings.values() for key in node if key != "_target_"):
        inner = {index: node.get(key, MISSING) for index, node in mappings.items()}
        _compare(inner, f"{where}.{key}" if where else str(key), result, choices)


def _part(node: Any, where: str, chosen: Mapping[str, str]) -> str:
    """Returns the name of a component: the chosen option or the class; a plain value, such as a weight, as text."""
    if node is None or node is MISSING:
        return "none"
    if not isinstance(node, dict):
        return _value(node)
    return chosen.get(where.replace(".", "/")) or str(node.get("_target_", "none")).rsplit(".", 1)[-1]


def _value(value: Any) -> str:
    if value is MISSING:
        return "not set"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    text = "+".join(map(str, value)) or "[]" if isinstance(value, list) else str(value)
    return shortened(re.sub(r"[\x00-\x1f\x7f]", " ", text), LONGEST)


def _shorten(keys: Sequence[str]) -> dict[str, str]:
    """Returns, for each key, as few of its last parts as distinguish it from other keys.

    Keys of balancers and tasks have at least two parts.
    """
    short: dict[str, str] = {}
    left = {key: key.split(".") for key in keys}
    count = 0
    while left:
        count += 1
        times = Counter(".".join(parts[-count:]) for parts in left.values())
        for key, parts in list(left.items()):
            # A key such as `device` has no more parts, though `data.device` ends with the same part.
            if times[".".join(parts[-count:])] == 1 or len(parts) == count:
                least = 2 if parts[0] in ("balancer", "tasks") else 1
                short[key] = ".".join(parts[-max(count, least) :])
                del left[key]
    return short


def _rank(key: str) -> int:
    first = key.split(".")[0]
    return ORDER.index(first) if first in ORDER else len(ORDER)


def _distinguishing(values: Values) -> Values:
    """Returns the values that distinguish the configs.

    Keys are added in order. A key is added to the configs that agree in all previous keys and differ in this one.
    """
    chosen: Values = [{} for _ in values]
    groups = [list(range(len(values)))]  # the configs that agree in all previous keys
    for key in sorted(dict.fromkeys(key for pieces in values for key in pieces), key=_rank):
        divided: list[list[int]] = []
        for group in groups:
            by_value: dict[str | None, list[int]] = {}
            for index in group:
                by_value.setdefault(values[index].get(key), []).append(index)
            divided += by_value.values()
            for index in group if len(by_value) > 1 else []:
                if key in values[index]:
                    chosen[index][key] = values[index][key]
        groups = divided
    for index, pieces in enumerate(chosen):
        if any(map(_is_weight, pieces)):
            chosen[index] |= {key: value for key, value in values[index].items() if _is_weight(key)}
    return chosen


def _pieces(values: Mapping[str, str], short: Mapping[str, str]) -> list[str]:
    """Returns the pieces of a config's name; the weights of tasks are one piece, left out if all weights are 1."""
    pieces = []
    weights = [(key.split(".")[1], value) for key, value in values.items() if _is_weight(key)]
    for key in sorted(values, key=_rank):
        if key == "balancer":
            pieces.append(values[key])
        elif key == "tasks":
            pieces.append(f"tasks {values[key]}")
        elif not _is_weight(key):
            pieces.append(f"{short[key]}={values[key]}")
        elif any(value != "1" for _, value in weights):
            pieces.append("weights " + " / ".join(f"{task} {value}" for task, value in weights))
            weights = []
    return pieces


def _repeated_variables(values: Values) -> set[str]:
    """Returns the user's variables that have, in every config, the value of another key."""
    keys = dict.fromkeys(key for pieces in values for key in pieces)
    variables = [key for key in keys if key.startswith("vars.")]
    others = [[pieces.get(key) for pieces in values] for key in keys if not key.startswith("vars.")]
    return {key for key in variables if [pieces.get(key) for pieces in values] in others}


def _is_default_weight(key: str, values: Mapping[str, str]) -> bool:
    return _is_weight(key) and values[key] == "1"


def _is_weight(key: str) -> bool:
    return key.startswith("tasks.") and key.endswith(".weight") and key.count(".") == 2
