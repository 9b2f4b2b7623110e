"""Where each key of a config comes from, and which of them belonged to a class that another one took the place of."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from mtl import schema
from mtl.config.targets import find, takes
from mtl.errors import UserError
from mtl.process.signals import held

History = list[tuple[int, Any]]  # what was decided by which source, in their order


@dataclass
class Origin:
    """A key of the config: the sources that gave it, in their order, and what is below it.

    Attributes:
        givers: sources, by number.
        targets: the `_target_` of this node that each source gave.
        inner: the keys below it, or the numbers of a list.
    """

    givers: list[int] = field(default_factory=list)
    targets: History = field(default_factory=list)
    inner: "dict[str, Origin]" = field(default_factory=dict)

    def put(self, value: Any, source: int) -> None:
        """Puts what a source gives on top of what is here, as configs are merged."""
        if value == "???" and self.givers:
            return
        self.givers.append(source)
        if not isinstance(value, Mapping):
            self.inner, self.targets = {}, []
        elif isinstance(value.get("_target_"), str) and value["_target_"] != "???":
            self.targets.append((source, value["_target_"]))
        items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, each in items:
            self.inner.setdefault(str(key), Origin()).put(each, source)

    def remove(self, path: Sequence[str]) -> None:
        """Takes a key away."""
        parent = self.at(path[:-1])
        if parent is not None:
            parent.inner.pop(path[-1], None)

    def at(self, path: Sequence[str]) -> "Origin | None":
        """What is known of the key, None where it isn't there."""
        found: Origin | None = self
        for key in path:
            found = found.inner.get(key) if found is not None else None
        return found

    def nodes(self, path: tuple[str, ...] = ()) -> "Iterator[tuple[tuple[str, ...], Origin]]":
        """Everything below that has a `_target_`, with its place."""
        if self.targets:
            yield path, self
        for key, each in list(self.inner.items()):
            yield from each.nodes((*path, key))


def decided(history: History) -> int | None:
    """The source that first made the last decision, where there was another one before; else None."""
    number = len(history) - 1
    while number > 0 and history[number - 1][1] == history[-1][1]:
        number -= 1
    return history[number][0] if number > 0 else None


def leftovers(origin: Origin, chosen: Mapping[int, int]) -> list[str]:
    """The keys of a node that were given for another class than it has: those from before the class was exchanged.

    A key that a source gives beside the class itself isn't one of them.

    Args:
        origin: the node.
        chosen: by a source that is a file of a group, the source that chose that file in the place of another.
    """
    setter, target = origin.targets[-1]
    exchanges = [each for each in (decided(origin.targets), chosen.get(setter)) if each is not None]
    if not exchanges:
        return []
    owners = {source for source, name in origin.targets if name == target}
    return [
        key
        for key, each in origin.inner.items()
        if max(each.givers) < max(exchanges) and not owners.intersection(each.givers)
    ]


def unfit(target: Callable[..., Any], keys: Sequence[str], others: Mapping[str, Any]) -> list[str]:
    """Those of the keys that aren't for the target: it doesn't take them, or has them from a position already.

    Args:
        target: what is called.
        keys: that were for another one.
        others: the node's other keys.
    """
    names = takes(target)
    args = others.get("_args_")
    by_position = list(names or ())[: len(args)] if isinstance(args, list) else []
    return [key for key in keys if key == "_args_" or (names is not None and (key not in names or key in by_position))]


def exchanged(root: Origin, chosen: Mapping[int, int], config: Any) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """The places of nodes whose class was exchanged, and their keys that were for the one before and don't fit.

    Only where there may be such keys is the class imported.

    Args:
        root: of the whole config.
        chosen: see `leftovers`.
        config: gives the plain node at a place.
    """
    for path, origin in root.nodes():
        keys = [key for key in leftovers(origin, chosen) if not _is_ours(path, key)]
        if not keys:
            continue
        try:
            with held():
                target = find(origin.targets[-1][1], ".".join(path))
        except UserError:
            continue  # whoever builds it says so
        node = config(path)
        others = {key: value for key, value in node.items() if key not in keys}
        if gone := unfit(target, keys, others):
            yield path, gone


def unused(variables: Origin, typed: int, config: str) -> Iterator[str]:
    """A line for each variable that was typed, named nearly like one of a file, and that nothing refers to.

    Args:
        variables: `vars`.
        typed: the number of the command line.
        config: as YAML, unresolved.
    """
    of_files = [key for key, each in variables.inner.items() if each.givers[0] != typed]
    for key in variables.inner.keys() - of_files:
        near = get_close_matches(key, of_files, n=1)
        if near and not re.search(rf"\$\{{[^}}]*\bvars\.{re.escape(key)}\b", config):
            yield f"nothing refers to vars.{key}; did you mean vars.{near[0]}?"


def _is_ours(path: tuple[str, ...], key: str) -> bool:
    """Whether the key is no argument of the node's target."""
    if key.startswith("_"):
        return key != "_args_"
    if path == ("optimizer", "then"):
        return key == "after"
    # A scheduler's numbers are of the steps or epochs that it was written for.
    return len(path) == 1 and f"{path[0]}.{key}" in schema.SCHEMA.keys() - {"optimizer.lr", "scheduler.interval"}
