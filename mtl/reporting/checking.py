"""What the files of a run must hold to be compared with others: anybody may have written them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mtl.errors import UserError
from mtl.safety.bounded import leaves
from mtl.text import plain

LARGEST = 1e40  # of a figure: beyond what float32 holds; squares of such numbers, and of their ratios, are finite
LONGEST = 100_000  # characters of a text
LONGEST_NAME = 200  # characters of a task's or a figure's name
MOST_TASKS = 1_000  # a report of as many takes a quarter of a minute
MOST_FIGURES = 5_000  # of a split
MOST_VALUES = 20_000  # of a config
Check = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Whether it is a text."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on, or not known."""
    return value is None or (type(value) is int and value >= 0)


def is_number(value: Any) -> bool:
    """Whether it is a number that can be calculated with, one that isn't finite, or not known."""
    known = type(value) in (int, float)
    return value is None or (known and (not math.isfinite(value) or abs(value) <= LARGEST))


def is_finite(value: Any) -> bool:
    """Whether it is a number that can be calculated with, or not known."""
    return is_number(value) and (value is None or math.isfinite(value))


def mapping(check: Check) -> Check:
    """Whether it is a mapping of such values, with names that aren't too long."""
    return lambda value: (
        isinstance(value, dict) and all(len(name) <= LONGEST_NAME and check(each) for name, each in value.items())
    )


def of(check: Check) -> Check:
    """Whether it is a mapping of such values, or not known."""
    return or_none(mapping(check))


def with_keys(**checks: Check) -> Check:
    """Whether it is a mapping that has such values under these keys, where it has them, or not known."""
    return lambda value: (
        value is None or (isinstance(value, dict) and all(check(value.get(name)) for name, check in checks.items()))
    )


def or_none(check: Check) -> Check:
    """Whether it is such a value, or not known."""
    return lambda value: value is None or check(value)


def is_list_of(check: Check) -> Check:
    """Whether it is a list of such values, or not known."""
    return lambda value: value is None or (isinstance(value, list) and all(map(check, value)))


def is_scalar(value: Any) -> bool:
    """Whether it is neither a list nor a mapping."""
    return not isinstance(value, list | dict)


def is_cosine(value: Any) -> bool:
    """Whether it is what a run says of the gradients of two tasks; runs that are older than `steps` have none."""
    needed = isinstance(value, dict) and all(value.get(name) is not None for name in ("mean", "below_zero"))
    return needed and all(map(is_finite, value.values()))


def is_mode(value: Any) -> bool:
    """Whether it says which way is better, or that this isn't known."""
    return value in ("max", "min", None)


def are_figures(value: Any) -> bool:
    """Whether it is figures by task, and not more than a report can show, or not known."""
    return of(mapping(is_number))(value) and sum(map(len, (value or {}).values())) <= MOST_FIGURES


METRICS: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(["status", "problem", "error", "launcher"], (or_none(is_text), "a text")),
    "arguments": (is_list_of(is_text), "a list of texts"),
    "choices": (of(or_none(is_text)), "names, each with a text"),
    **dict.fromkeys(["steps", "epochs"], (is_count, "a whole number")),
    **dict.fromkeys(["seconds_per_step", "memory_per_step"], (is_finite, f"a finite number up to {LARGEST:g}")),
    "best": (
        with_keys(epoch=is_count, monitor=is_scalar, value=is_number, mode=is_mode),
        "an epoch, what was monitored, its value and which way is better",
    ),
    **dict.fromkeys(
        ["val", "test"],
        (are_figures, f"tasks, each with figures that are numbers up to {LARGEST:g}, in all {MOST_FIGURES:,} at most"),
    ),
    "kinds": (of(is_mode), "figures, each with max, min or null"),
    "samples": (of(is_count), "splits, each with a whole number"),
    "fingerprints": (of(or_none(is_text)), "splits, each with a text"),
    "versions": (of(is_scalar), "names, each with a version"),
    "cosine": (of(is_cosine), "pairs of tasks, each with finite numbers"),
}


def is_task(value: Any) -> bool:
    """Whether it is what a config says of a task."""
    return isinstance(value, dict) and (isinstance(value.get("weight"), dict) or is_number(value.get("weight", 1)))


def _is_monitor(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and not any(isinstance(each, list) for each in value.values()))


_PART: tuple[Check, str] = (or_none(lambda value: isinstance(value, dict)), "a mapping")
CONFIG: dict[str, tuple[Check, str]] = {
    "seed": (lambda value: type(value) is int, "a whole number"),
    "tasks": (
        lambda value: isinstance(value, dict) and all(map(is_task, value.values())),
        "names, each with a mapping",
    ),
    "trainer": (lambda value: isinstance(value, dict) and _is_monitor(value.get("monitor")), "a mapping"),
    "only": (lambda value: value is None or is_text(value) or is_list_of(is_text)(value), "a task's name, or several"),
    "log": (with_keys(every=is_count), "a mapping with a whole number `every`"),
    **dict.fromkeys(["data", "balancer"], _PART),
}


def checked_metrics(found: Any) -> dict[str, Any]:
    """What a metrics.json holds.

    Raises:
        UserError: where it isn't what a run writes, as far as a report needs it.
    """
    return _checked(found, METRICS, "metrics.json")


def checked_config(found: Any) -> dict[str, Any]:
    """What a config.yaml holds; it may be of something else than a run.

    Raises:
        UserError: where it isn't what a run writes, as far as a report needs it.
    """
    config = _checked(found, CONFIG, "config.yaml", all_there={"seed", "tasks", "trainer"} <= set(found or ()))
    tasks = config.get("tasks") if isinstance(config.get("tasks"), dict) else None
    if tasks is not None and len(tasks) > MOST_TASKS:
        raise UserError(f"config.yaml has {len(tasks):,} tasks; a report takes {MOST_TASKS:,}")
    for _ in leaves(config, "config.yaml", most=MOST_VALUES) if tasks is not None else ():
        pass  # it raises where there are more
    for name in tasks or ():
        if not (name.isascii() and name.isidentifier() and len(name) <= LONGEST_NAME):
            raise UserError(f"config.yaml has a task '{name[:LONGEST_NAME]}', which isn't a name that a task may have")
    return config


def _checked(found: Any, checks: Mapping[str, tuple[Check, str]], file: str, all_there: bool = True) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no mapping")
    whole: dict[str, Any] = _plain(found, file)
    for key, (check, wanted) in checks.items() if all_there else ():
        if key in whole and not check(whole[key]):
            shown = repr(whole[key])
            raise UserError(f"{file}: {key} is {shown[:60]}{'…' * (len(shown) > 60)}; it would be {wanted}")
    return whole


def _plain(value: Any, file: str) -> Any:
    """The same with texts and keys that can be printed, and keys that are texts."""
    if isinstance(value, dict):
        if not isinstance(value.get("_target_", ""), str):
            raise UserError(f"{file}: a _target_ is {value['_target_']!r:.60}; it would be a dotted name")
        return {_plain(str(key), file): _plain(each, file) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each, file) for each in value]
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise UserError(f"{file} holds a text of {len(value):,} characters")
        return plain(value, keep="\n")
    return value
