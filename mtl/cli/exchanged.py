"""The origins of a config's keys, and which keys belong to a class that was replaced by another one."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from mtl import schema
from mtl.config.targets import find, takes
from mtl.errors import UserError
from mtl.process.signals import held

History = list[tuple[int, Any]]  # pairs of source number and decision, in order


@dataclass
class Origin:
    """The origins of a key of the config: the sources that set it, in order, and the origins of inner keys.

    Attributes:
        sources: The numbers of the sources.
        targets: The `_target_` of this node that each source set.
        inner: The origins of the keys below this one, or of the items of a list.
    """

    sources: list[int] = field(default_factory=list)
    targets: History = field(default_factory=list)
    inner: "dict[str, Origin]" = field(default_factory=dict)

    def put(self, value: Any, source: int) -> None:
        """Merges the value from a source into this node, as configs are merged."""
        if value == "???" and self.sources:
            return
        self.sources.append(source)
        if not isinstance(value, Mapping):
            self.inner, self.targets = {}, []
        elif isinstance(value.get("_target_"), str) and value["_target_"] != "???":
            self.targets.append((source, value["_target_"]))
        items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, each in items:
            self.inner.setdefault(str(key), Origin()).put(each, source)

    def remove(self, path: Sequence[str]) -> None:
        """Removes a key."""
        parent = self.at(path[:-1])
        if parent is not None:
            parent.inner.pop(path[-1], None)

    def at(self, path: Sequence[str]) -> "Origin | None":
        """Returns the origins of the key at this path, or None if there is no such key."""
        origin: Origin | None = self
        for key in path:
            origin = origin.inner.get(key) if origin is not None else None
        return origin

    def nodes(self, path: tuple[str, ...] = ()) -> "Iterator[tuple[tuple[str, ...], Origin]]":
        """Yields path and origins of all inner nodes that have a `_target_`."""
        if self.targets:
            yield path, self
        for key, each in list(self.inner.items()):
            yield from each.nodes((*path, key))


def decided(history: History) -> int | None:
    """Returns the source that first made the last decision, or None if there was no other decision before."""
    number = len(history) - 1
    while number > 0 and history[number - 1][1] == history[-1][1]:
        number -= 1
    return history[number][0] if number > 0 else None


def leftovers(origin: Origin, chosen: Mapping[int, int]) -> list[str]:
    """Returns the keys of a node that were set for a class which was replaced later.

    A key that a source sets together with the class isn't one of them.

    Args:
        origin: The node.
        chosen: For each source that is a file of a group, the source that chose this file in place of another.
    """
    setter, target = origin.targets[-1]
    exchanges = [each for each in (decided(origin.targets), chosen.get(setter)) if each is not None]
    if not exchanges:
        return []
    owners = {source for source, name in origin.targets if name == target}
    return [
        key
        for key, each in origin.inner.items()
        if max(each.sources) < max(exchanges) and not owners.intersection(each.sources)
    ]


def unfit(target: Callable[..., Any], keys: Sequence[str], remaining: Mapping[str, Any]) -> list[str]:
    """Returns the keys that the callable doesn't accept, or that are given by position already.

    Args:
        target: The callable named by `_target_`.
        keys: Keys that were set for another callable.
        remaining: The other keys of the node.
    """
    names = takes(target)
    args = remaining.get("_args_")
    by_position = list(names or ())[: len(args)] if isinstance(args, list) else []
    return [key for key in keys if key == "_args_" or (names is not None and (key not in names or key in by_position))]


def exchanged(root: Origin, chosen: Mapping[int, int], config: Any) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yields the path of each node whose class was replaced, with the keys that don't fit the new class.

    Classes are imported only for nodes that may have such keys.

    Args:
        root: The origins of the whole config.
        chosen: See `leftovers`.
        config: Returns the plain node at a path.
    """
    for path, origin in root.nodes():
        keys = [key for key in leftovers(origin, chosen) if not _is_ours(path, key)]
        if not keys:
            continue
        try:
            with held():
                target = find(origin.targets[-1][1], ".".join(path))
        except UserError:
            continue  # building the node reports the error
        node = config(path)
        remaining = {key: value for key, value in node.items() if key not in keys}
        if gone := unfit(target, keys, remaining):
            yield path, gone


def unused(variables: Origin, typed: int, config: str) -> Iterator[str]:
    """Yields a line for each unused variable on the command line that is named similarly to a variable of a file.

    Args:
        variables: The origins of `vars`.
        typed: The number of the command line among the sources.
        config: The config as YAML, with unresolved interpolations.
    """
    of_files = [key for key, each in variables.inner.items() if each.sources[0] != typed]
    for key in variables.inner.keys() - of_files:
        near = get_close_matches(key, of_files, n=1)
        if near and not re.search(rf"\$\{{[^}}]*\bvars\.{re.escape(key)}\b", config):
            yield f"nothing refers to vars.{key}; did you mean vars.{near[0]}?"


def _is_ours(path: tuple[str, ...], key: str) -> bool:
    """Returns whether the key belongs to mtl and isn't an argument of the node's callable."""
    if key.startswith("_"):
        return key != "_args_"
    if path == ("optimizer", "then"):
        return key == "after"
    # The numbers of a scheduler are valid only for the interval (steps or epochs) that they were written for.
    return len(path) == 1 and f"{path[0]}.{key}" in schema.SCHEMA.keys() - {"optimizer.lr", "scheduler.interval"}
