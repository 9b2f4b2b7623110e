"""Resuming a run: finds the run, checks that the config allows resuming, and locks the run's folder."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtl.errors import UserError, first_line, suggest
from mtl.quoting import as_value, command
from mtl.safety import archive
from mtl.safety.bounded import read_json, read_yaml
from mtl.safety.regular import check_folder
from mtl.text import log

IRRELEVANT = {  # keys that may differ when a run is resumed
    *("resume", "resume_allow", "checkpoint", "output_root", "debug", "log", "logger", "callbacks"),
    *(
        "data.num_workers",
        "data.eval_batch_size",
        "trainer.timeout",
        "trainer.last_epochs",
        "model.checkpoint",
        "distributed",
    ),
}
PATIENCE = 1.5  # seconds to wait for a lock: loader processes of a killed run keep its folder locked a little longer


class Refused(UserError):
    """Raised if an existing run can't be resumed; the run's folder stays unchanged."""


class Busy(Refused):
    """Raised if another process is working in the run's folder."""


def differences(theirs: Any, ours: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields key, old value and new value for each difference of two configs that may affect results."""
    in_order = where != "optimizer.groups" or list(theirs or ()) == list(ours or ())  # the order of groups matters
    if isinstance(theirs, dict) and isinstance(ours, dict) and in_order:
        for key in dict.fromkeys([*theirs, *ours]):
            inner = f"{where}.{key}" if where else str(key)
            if inner not in IRRELEVANT:
                yield from differences(theirs.get(key), ours.get(key), inner)
    elif theirs != ours or not in_order:
        yield where, theirs, ours


def forbidden(theirs: Any, ours: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns the differences that aren't allowed by `resume_allow`.

    Another class usually has another state, so that it is allowed only if its own key is named. More epochs are always
    allowed, unless the learning rate's schedule depends on their number.
    """
    allowed = [str(name) for name in ours.get("resume_allow") or []]
    longer = not any(word in str(ours.get("scheduler")) for word in ("total_steps", "total_epochs"))
    theirs = {**_added_since(theirs, ours)} if isinstance(theirs, dict) else theirs
    return [
        (key, before, now)
        for key, before, now in differences(theirs, ours)
        if not (longer and key == "trainer.max_epochs" and now > before)
        and not (key in allowed and key.endswith("_target_") and not _is_fixed(key))
        and not (any(key == name or key.startswith(f"{name}.") for name in allowed) and not _is_fixed(key, whole=True))
    ]


def _added_since(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of an older run with the meaning of keys that didn't exist at that time."""
    scheduler = theirs.get("scheduler")
    added: dict[str, Any] = {"scheduler": {"interval": "step", **scheduler}} if isinstance(scheduler, dict) else {}
    if isinstance(theirs.get("model"), dict):
        ours_compiled = (ours.get("model") or {}).get("compile")
        added["model"] = {"compile": False if ours_compiled else ours_compiled, **theirs["model"]}
    return {"threads": ours.get("threads"), "vars": {}, **theirs, **added}  # the checkpoint has the threads


def _keys(node: Any, where: str = "") -> Iterator[str]:
    """Yields all dotted keys of a config."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{where}{key}"
        yield from _keys(value, f"{where}{key}.")


def _shown(value: Any, key: str, config: Any) -> str:
    """Returns a config value for a message, with `unset` for a missing key."""
    return repr(value) if value is not None or key in _keys(config) else "unset"


def _is_fixed(key: str, *, whole: bool = False) -> bool:
    """Returns whether `resume_allow` can't allow a difference in this key, or not by naming an outer key (`whole`)."""
    return key == "balancer.optimizer" or key.startswith("optimizer.then") or (whole and key.endswith("_target_"))


def check(theirs: Any, ours: dict[str, Any], name: str) -> None:
    """Checks that the run may be resumed with the new config.

    Args:
        theirs: The config that the run was trained with.
        ours: The new config.
        name: The name of the run's folder.

    Raises:
        Refused: If the configs differ in keys that may not change; the message lists them.
    """
    keys = [*_keys(theirs), *_keys(ours)]
    for allowed in ours.get("resume_allow") or []:
        if not any(key == allowed or key.startswith(f"{allowed}.") for key in keys):
            raise Refused(
                f"resume_allow: there is no key '{allowed}'{suggest(str(allowed), keys).split(' (possible')[0]}"
            )
    refused = forbidden(theirs, ours)
    if not refused:
        return
    lines = "".join(
        f"\n  {key}: was {_shown(before, key, theirs)}, is {_shown(now, key, ours)}" for key, before, now in refused
    )
    horizon = any(key == "trainer.max_epochs" for key, *_ in refused)
    reason = "\nThe learning rate's schedule depends on the number of epochs." if horizon else ""
    others = [key for key, *_ in refused if not _is_fixed(key)]
    listed = ",".join(map(as_value, others))
    allow = f", or allow it: {command(f'resume_allow=[{listed}]')}" if others else ""
    if any(key.endswith("_target_") for key in others):
        allow += "\nAnother class can be resumed if it accepts the saved state's names and shapes"
    raise Refused(f"resume: {name} was trained with another config:{lines}{reason}\nSet the same values{allow}")


def metrics_of(folder: Path) -> dict[str, Any]:
    """Returns the content of the run's metrics.json, which is empty if there is no such file.

    Raises:
        UserError: If the file can't be read, or contains no mapping.
    """
    path = folder / "metrics.json"
    try:
        metrics = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(metrics, dict):
        raise UserError(f"{path} holds no mapping")
    return metrics


def finished(folder: Path) -> dict[str, Any] | None:
    """Returns the content of a finished run's metrics.json; None if the run isn't finished.

    Raises:
        UserError: If the file can't be read.
    """
    metrics = metrics_of(folder)
    return metrics if metrics.get("status") == "finished" else None


def config_of(folder: Path) -> dict[str, Any]:
    """Returns the config that the folder's run was trained with.

    Raises:
        UserError: If the file can't be read, or contains no mapping.
        OSError: If there is no such file.
    """
    config = read_yaml(folder / "config.yaml")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'} holds no mapping")
    versions = (finished(folder) or {}).get("versions", {})
    if isinstance(versions, dict) and "threads" in versions:
        config.setdefault("threads", versions["threads"])  # a run from before the config had this key
    return config


def newest_unfinished(folder: Path, ours: dict[str, Any]) -> Path | None:
    """Returns the folder's newest run that has this config, isn't finished, and isn't in use; None if there is none.

    A run that can't be read is skipped with a warning, because it may come from somebody else.
    """
    for path in sorted(folder.glob("*/config.yaml"), reverse=True):
        run = path.parent
        try:
            if finished(run) is None and not forbidden(config_of(run), ours):
                check_folder(run)
                archive.check_newest(run / "checkpoints")
                with locked(run) as free:
                    if free:
                        return run
        except Exception as error:  # a truncated or changed file raises many kinds of errors
            log.warning("%s is skipped: %s", run, first_line(error))
    return None


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Locks the folder for this process; yields False if another process holds it, and True if it can't be locked."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        free = False
        end = time.monotonic() + PATIENCE
        while not free:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except OSError:
                if time.monotonic() > end:
                    break
                time.sleep(0.1)
        yield free
    finally:
        os.close(handle)


def changed_versions(before: dict[str, Any], now: dict[str, Any], report: Callable[[str], None]) -> None:
    """Reports the changed versions and settings on which results may depend."""
    for name in now:
        if before.get(name) != now[name]:
            report(
                f"warning  {name} was {before.get(name)} and is {now[name]}: the numbers may differ in the last digits"
            )


def reset_options(groups: Sequence[dict[str, Any]], fresh: Sequence[dict[str, Any]], allowed: Sequence[str]) -> None:
    """Sets those options of a loaded optimizer that were allowed to change to the values of the config.

    Args:
        groups: The optimizer's parameter groups, with the loaded options.
        fresh: The options of each group in the config.
        allowed: The keys of `resume_allow`.
    """
    names = [name.split(".") for name in allowed if name.split(".")[0] == "optimizer"]
    everything = any(len(parts) == 1 or parts[1] == "groups" for parts in names)
    chosen = {parts[1] for parts in names if len(parts) > 1}
    for group, options in zip(groups, fresh, strict=True):
        for key, value in options.items():
            if everything or key in chosen:
                group[key] = value
