"""Checks of the files of a run before a report uses them, since anybody may have written the files."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mtl.errors import UserError
from mtl.safety.bounded import leaves
from mtl.text import plain

LARGEST = 1e40  # the largest figure, more than float32 can hold; squares of figures and of their ratios are finite
LONGEST = 100_000  # the most characters of a text
LONGEST_NAME = 200  # the most characters of a task's or a figure's name
MOST_TASKS = 1_000  # a report of this number of tasks takes a quarter of a minute
MOST_FIGURES = 5_000  # the most figures of a split
MOST_CLASSES = 100  # the most rows of a matrix
MOST_MATRICES = 200  # the most matrices of a run
MOST_VALUES = 20_000  # the most values of a config
Check = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Returns whether the value is a text."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Returns whether the value is a whole number of at least 0, or None."""
    return value is None or (type(value) is int and value >= 0)


def is_number(value: Any) -> bool:
    """Returns whether the value is a number up to `LARGEST` in size, infinite, NaN, or None."""
    known = type(value) in (int, float)
    return value is None or (known and (not math.isfinite(value) or abs(value) <= LARGEST))


def is_finite(value: Any) -> bool:
    """Returns whether the value is a finite number up to `LARGEST` in size, or None."""
    return is_number(value) and (value is None or math.isfinite(value))


def mapping(check: Check) -> Check:
    """Returns a check for mappings whose values pass the check and whose names aren't too long."""
    return lambda value: (
        isinstance(value, dict) and all(len(name) <= LONGEST_NAME and check(each) for name, each in value.items())
    )


def of(check: Check) -> Check:
    """Returns a check for mappings whose values pass the check, see `mapping`, or None."""
    return or_none(mapping(check))


def with_keys(**checks: Check) -> Check:
    """Returns a check for mappings whose values pass the check of their key, or None; a missing value is None."""
    return lambda value: (
        value is None or (isinstance(value, dict) and all(check(value.get(name)) for name, check in checks.items()))
    )


def or_none(check: Check) -> Check:
    """Returns a check for values that pass the check, or None."""
    return lambda value: value is None or check(value)


def is_list_of(check: Check) -> Check:
    """Returns a check for lists whose values pass the check, or None."""
    return lambda value: value is None or (isinstance(value, list) and all(map(check, value)))


def is_scalar(value: Any) -> bool:
    """Returns whether the value is neither a list nor a mapping."""
    return not isinstance(value, list | dict)


def is_cosine(value: Any) -> bool:
    """Returns whether the value describes the cosines of two tasks' gradients; in older runs, `steps` is missing."""
    needed = isinstance(value, dict) and all(value.get(name) is not None for name in ("mean", "below_zero"))
    return needed and all(map(is_finite, value.values()))


def is_mode(value: Any) -> bool:
    """Returns whether the value is `max`, `min`, or None if unknown."""
    return value in ("max", "min", None)


def are_figures(value: Any) -> bool:
    """Returns whether the value consists of at most `MOST_FIGURES` figures by task, or is None."""
    return of(mapping(is_number))(value) and sum(map(len, (value or {}).values())) <= MOST_FIGURES


def is_matrix(value: Any) -> bool:
    """Returns whether the value is a square matrix of up to `MOST_CLASSES` rows of numbers."""
    rows = isinstance(value, list) and 0 < len(value) <= MOST_CLASSES
    return rows and all(
        isinstance(row, list) and len(row) == len(value) and all(each is not None and is_number(each) for each in row)
        for row in value
    )


def are_matrices(value: Any) -> bool:
    """Returns whether the value consists of matrices by split, task and metric, at most `MOST_MATRICES`, or is None."""
    tasks = (
        [named for each in (value or {}).values() for named in each.values()] if of(of(of(is_matrix)))(value) else []
    )
    return value is None or 0 < sum(map(len, tasks)) <= MOST_MATRICES


METRICS: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(["status", "problem", "error", "launcher"], (or_none(is_text), "a text")),
    "arguments": (is_list_of(is_text), "a list of texts"),
    "choices": (of(or_none(is_text)), "names, each with a text"),
    **dict.fromkeys(["steps", "epochs", "last_epochs"], (is_count, "a whole number")),
    **dict.fromkeys(["seconds_per_step", "memory_per_step"], (is_finite, f"a finite number up to {LARGEST:g}")),
    "best": (
        with_keys(epoch=is_count, monitor=is_scalar, value=is_number, mode=is_mode),
        "a mapping with epoch, monitor, value and mode",
    ),
    **dict.fromkeys(
        ["val", "last", "test"],
        (are_figures, f"tasks, each with figures, numbers up to {LARGEST:g}; at most {MOST_FIGURES:,} figures in all"),
    ),
    "kinds": (of(is_mode), "figures, each with max, min or null"),
    "matrices": (
        are_matrices,
        f"splits, each with tasks, each with square matrices; at most {MOST_MATRICES} of up to {MOST_CLASSES} rows",
    ),
    "classes": (of(is_list_of(is_text)), "tasks, each with a list of texts"),
    "samples": (of(is_count), "splits, each with a whole number"),
    "fingerprints": (of(or_none(is_text)), "splits, each with a text"),
    "versions": (of(is_scalar), "names, each with a version"),
    "cosine": (of(is_cosine), "pairs of tasks, each with finite numbers"),
}


def is_task(value: Any) -> bool:
    """Returns whether the value is a task in a config."""
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


def checked_metrics(content: Any) -> dict[str, Any]:
    """Returns the checked content of a metrics.json.

    Raises:
        UserError: If a value that a report needs isn't of the kind that a run writes.
    """
    return _checked(content, METRICS, "metrics.json")


def checked_config(content: Any) -> dict[str, Any]:
    """Returns the checked content of a config.yaml, which may be that of something other than a run.

    Raises:
        UserError: If a value that a report needs isn't of the kind that a run writes.
    """
    is_run = {"seed", "tasks", "trainer"} <= set(content or ())
    config = _checked(content, CONFIG, "config.yaml", check_keys=is_run)
    tasks = config.get("tasks") if isinstance(config.get("tasks"), dict) else None
    if tasks is not None and len(tasks) > MOST_TASKS:
        raise UserError(f"config.yaml has {len(tasks):,} tasks; a report takes at most {MOST_TASKS:,}")
    for _ in leaves(config, "config.yaml", most=MOST_VALUES) if tasks is not None else ():
        pass  # `leaves` raises an error if there are more values
    for name in tasks or ():
        if not (name.isascii() and name.isidentifier() and len(name) <= LONGEST_NAME):
            raise UserError(f"config.yaml has a task '{name[:LONGEST_NAME]}', which isn't a name that a task may have")
    return config


def _checked(
    content: Any, checks: Mapping[str, tuple[Check, str]], file: str, check_keys: bool = True
) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no mapping")
    values: dict[str, Any] = _plain(content, file)
    for key, (check, wanted) in checks.items() if check_keys else ():
        if key in values and not check(values[key]):
            shown = repr(values[key])
            raise UserError(f"{file}: {key} is {shown[:60]}{'…' * (len(shown) > 60)}; it must be {wanted}")
    return values


def _plain(value: Any, file: str) -> Any:
    """Returns the value with printable texts, and with keys that are printable texts."""
    if isinstance(value, dict):
        if not isinstance(value.get("_target_", ""), str):
            raise UserError(f"{file}: a _target_ is {value['_target_']!r:.60}; it must be a dotted name")
        return {_plain(str(key), file): _plain(each, file) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each, file) for each in value]
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise UserError(f"{file} holds a text of {len(value):,} characters")
        return plain(value, keep="\n")
    return value
