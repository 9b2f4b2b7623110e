"""Names for configs, made of what differs between them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = object()
ORDER = ("balancer", "tasks", "model", "optimizer", "scheduler", "trainer")  # what comes first in a name; then the rest
LONGEST = 40  # characters of a value

Found = list[dict[str, str]]  # for each config: from a key with dots to what it is there


def labels(configs: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, str]]) -> list[str]:
    """A name for each config: `upgrad`, `upgrad, lr=0.001`, `weights digit 0.2 / parity 1.8`.

    Where the class of a part differs, its own keys are told only among those that have that class. Without any
    difference the balancer's name is taken.

    Args:
        configs: plain, without what has no bearing on the comparison.
        choices: of each config, from Hydra's groups to the options taken; may be empty.
    """
    found: Found = [{} for _ in configs]
    _look(dict(enumerate(configs)), "", found, choices)
    short = _shorten(list(dict.fromkeys(key for pieces in found for key in pieces)))
    names = []
    for config, chosen, pieces in zip(configs, choices, found, strict=True):
        text = ", ".join(_told(pieces, short))
        names.append(text or _part(config.get("balancer"), "balancer", chosen) or "all the same")
    return [
        f"{name} (#{names[:index].count(name) + 1})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two configs differ."""
    found: Found = [{}, {}]
    _look({0: one, 1: other}, "", found, [{}, {}])
    return list(dict.fromkeys([*found[0], *found[1]]))


def natural(label: str) -> list[tuple[int, float, str]]:
    """A key to sort by that puts 0.5 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", label)
    return [(1, float(part), "") if index % 2 else (0, 0.0, part) for index, part in enumerate(parts)]


def _look(nodes: Mapping[int, Any], where: str, found: Found, choices: Sequence[Mapping[str, str]]) -> None:
    """Notes down how the nodes that stand at one place of the configs differ."""
    values = list(nodes.values())
    if all(value == values[0] for value in values):
        return
    there = {index: node for index, node in nodes.items() if node is not MISSING}
    if where == "tasks":
        if len({tuple(node) for node in there.values()}) > 1:
            for index, node in there.items():
                names = list(node)
                found[index]["tasks"] = "+".join(names) if len(names) <= 4 else f"{len(names)} tasks"
        for task in dict.fromkeys(task for node in there.values() for task in node):
            having = {index: node[task] for index, node in there.items() if task in node}
            _look(having, f"tasks.{task}", found, choices)
        return
    targets = {index: node.get("_target_") if isinstance(node, dict) else None for index, node in nodes.items()}
    if any(targets.values()):
        options = {index: choices[index].get(where.replace(".", "/")) for index in nodes}
        known = all(options.values())
        kinds = {index: (targets[index], options[index] if known else None) for index in nodes}
        alike: dict[Any, dict[int, Any]] = {}
        for index, node in nodes.items():
            alike.setdefault(kinds[index], {})[index] = node
        for same in alike.values():
            for index, node in same.items():
                if len(alike) > 1:
                    found[index][where] = _part(node, where, choices[index])
            _look_inside(same, where, found, choices)
    elif all(isinstance(value, dict) for value in values):
        _look_inside(nodes, where, found, choices)
    else:
        for index, node in nodes.items():
            found[index][where] = _value(node)


def _look_inside(nodes: Mapping[int, Any], where: str, found: Found, choices: Sequence[Mapping[str, str]]) -> None:
    parts = {index: node for index, node in nodes.items() if isinstance(node, dict)}
    for key in dict.fromkeys(key for node in parts.values() for key in node if key != "_target_"):
        inner = {index: node.get(key, MISSING) for index, node in parts.items()}
        _look(inner, f"{where}.{key}" if where else str(key), found, choices)


def _part(node: Any, where: str, chosen: Mapping[str, str]) -> str:
    """A part's name: the option that was taken, or its class."""
    if node is None or node is MISSING:
        return "none"
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
    text = re.sub(r"[\x00-\x1f\x7f]", " ", text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _shorten(keys: Sequence[str]) -> dict[str, str]:
    """As few of a key's last parts as tell it from the others; a balancer's own keys say so."""
    short = {}
    for key in keys:
        parts = key.split(".")
        least = 2 if parts[0] in ("balancer", "tasks") and len(parts) > 1 else 1
        tails = [".".join(parts[-count:]) for count in range(least, len(parts) + 1)]
        short[key] = next(
            tail for tail in tails if not any(other != key and f".{other}".endswith(f".{tail}") for other in keys)
        )
    return short


def _told(pieces: Mapping[str, str], short: Mapping[str, str]) -> list[str]:
    """One config's pieces, the weights of its tasks as one."""

    def rank(key: str) -> int:
        first = key.split(".")[0]
        return ORDER.index(first) if first in ORDER else len(ORDER)

    told = []
    weights = [(key.split(".")[1], value) for key, value in pieces.items() if _is_weight(key)]
    for key in sorted(pieces, key=rank):
        if key == "balancer":
            told.append(pieces[key])
        elif key == "tasks":
            told.append(f"tasks {pieces[key]}")
        elif not _is_weight(key):
            told.append(f"{short[key]}={pieces[key]}")
        elif weights:
            told.append("weights " + " / ".join(f"{task} {value}" for task, value in weights))
            weights = []
    return told


def _is_weight(key: str) -> bool:
    return key.startswith("tasks.") and key.endswith(".weight") and key.count(".") == 2
