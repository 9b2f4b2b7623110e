"""Names for configs, made of what differs between them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl.reporting.writing import shortened

MISSING = object()
ORDER = ("balancer", "tasks", "model", "optimizer", "scheduler", "trainer")  # what comes first in a name; then the rest
LONGEST = 40  # characters of a value

LONG = 40  # characters of a name; where any is longer, keys that it can do without are left out of all

Found = list[dict[str, str]]  # for each config: from a key with dots to what it is there


@dataclass(frozen=True)
class Name:
    """What a config is called.

    Args:
        text: different for every config.
        told: the keys that differ between any of the configs, with this one's values.
        left_out: those of them that aren't in the text.
    """

    text: str
    told: dict[str, str]
    left_out: list[str]


def names(configs: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, str]]) -> list[Name]:
    """A name for each config, `upgrad`, `upgrad, lr=0.001`, `weights digit 0.2 / parity 1.8`, and all that differs.

    Where the class of a part differs, its own keys are told only among those that have that class. A variable of the
    user's own that another key repeats isn't told. Without any difference the balancer's name is taken. Where names
    would get long they hold no more than tells them apart.

    Args:
        configs: plain, without what has no bearing on the comparison.
        choices: of each config, from Hydra's groups to the options taken; may be empty.
    """
    found = differences(configs, choices)
    short = _shorten(list(dict.fromkeys(key for pieces in found for key in pieces)))
    echoes = _echoes(found)
    kept = [{key: value for key, value in pieces.items() if key not in echoes} for pieces in found]
    told = [", ".join(_told(pieces, short)) for pieces in kept]
    if max(map(len, told), default=0) > LONG:
        kept = _least(kept)
        told = [", ".join(_told(pieces, short)) for pieces in kept]
    texts = [
        text or ("equal weights" if pieces else _part(config.get("balancer"), "balancer", chosen)) or "all the same"
        for text, pieces, config, chosen in zip(told, kept, configs, choices, strict=True)
    ]
    unique = [
        f"{text} (#{texts[:index].count(text) + 1})" if texts.count(text) > 1 else text
        for index, text in enumerate(texts)
    ]
    return [
        Name(text, whole, [k for k in whole if k not in {*least, *echoes} and not _goes_without_saying(k, whole)])
        for text, whole, least in zip(unique, found, kept, strict=True)
    ]


def differences(configs: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, str]]) -> Found:
    """For each config the keys that differ between any, with its own values as text."""
    found: Found = [{} for _ in configs]
    _look(dict(enumerate(configs)), "", found, choices)
    return found


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
    """A part's name: the option that was taken, or its class; a plain value, such as a weight, is its own."""
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
    """As few of a key's last parts as tell it from the others; a balancer's own keys say so."""
    short: dict[str, str] = {}
    left = {key: key.split(".") for key in keys}
    count = 0
    while left:
        count += 1
        times = Counter(".".join(parts[-count:]) for parts in left.values())
        for key, parts in list(left.items()):
            # `device` isn't told from `data.device` by any of its parts
            if times[".".join(parts[-count:])] == 1 or len(parts) == count:
                least = 2 if parts[0] in ("balancer", "tasks") else 1
                short[key] = ".".join(parts[-max(count, least) :])
                del left[key]
    return short


def _rank(key: str) -> int:
    first = key.split(".")[0]
    return ORDER.index(first) if first in ORDER else len(ORDER)


def _least(found: Found) -> Found:
    """Of the pieces those that tell the configs apart: a key is told where it parts some that are alike so far."""
    kept: Found = [{} for _ in found]
    alike = [list(range(len(found)))]
    for key in sorted(dict.fromkeys(key for pieces in found for key in pieces), key=_rank):
        parted: list[list[int]] = []
        for group in alike:
            parts: dict[str | None, list[int]] = {}
            for index in group:
                parts.setdefault(found[index].get(key), []).append(index)
            parted += parts.values()
            for index in group if len(parts) > 1 else []:
                if key in found[index]:
                    kept[index][key] = found[index][key]
        alike = parted
    for index, pieces in enumerate(kept):
        if any(map(_is_weight, pieces)):
            kept[index] |= {key: value for key, value in found[index].items() if _is_weight(key)}
    return kept


def _told(pieces: Mapping[str, str], short: Mapping[str, str]) -> list[str]:
    """One config's pieces, the weights of its tasks as one; weights of 1 needn't be told."""
    told = []
    weights = [(key.split(".")[1], value) for key, value in pieces.items() if _is_weight(key)]
    for key in sorted(pieces, key=_rank):
        if key == "balancer":
            told.append(pieces[key])
        elif key == "tasks":
            told.append(f"tasks {pieces[key]}")
        elif not _is_weight(key):
            told.append(f"{short[key]}={pieces[key]}")
        elif any(value != "1" for _, value in weights):
            told.append("weights " + " / ".join(f"{task} {value}" for task, value in weights))
            weights = []
    return told


def _echoes(found: Found) -> set[str]:
    """The user's variables that have, in every config, the value of a key that they are filled in for."""
    keys = dict.fromkeys(key for pieces in found for key in pieces)
    own = [key for key in keys if key.startswith("vars.")]
    others = [[pieces.get(key) for pieces in found] for key in keys if not key.startswith("vars.")]
    return {key for key in own if [pieces.get(key) for pieces in found] in others}


def _goes_without_saying(key: str, told: Mapping[str, str]) -> bool:
    return _is_weight(key) and told[key] == "1"


def _is_weight(key: str) -> bool:
    return key.startswith("tasks.") and key.endswith(".weight") and key.count(".") == 2
