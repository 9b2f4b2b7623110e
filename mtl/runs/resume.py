"""Going on with a run: which one, whether its config allows it, and that nobody else is at it."""

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

IRRELEVANT = {  # what may differ between a run and its continuation
    *("resume", "resume_allow", "checkpoint", "output_root", "debug", "log", "logger", "callbacks"),
    *("data.num_workers", "data.eval_batch_size"),
}
PATIENCE = 1.5  # seconds: loader processes of a run that was killed hold its folder for a moment longer


class Refused(UserError):
    """A run that is there can't go on like this; nothing in its folder is touched."""


class Busy(Refused):
    """Another process is at work in the folder."""


def differences(theirs: Any, ours: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs between two configs and has to do with the numbers: key, value there, value here."""
    in_order = where != "optimizer.groups" or list(theirs or ()) == list(ours or ())  # their order has a meaning
    if isinstance(theirs, dict) and isinstance(ours, dict) and in_order:
        for key in dict.fromkeys([*theirs, *ours]):
            inner = f"{where}.{key}" if where else str(key)
            if inner not in IRRELEVANT:
                yield from differences(theirs.get(key), ours.get(key), inner)
    elif theirs != ours or not in_order:
        yield where, theirs, ours


def forbidden(theirs: Any, ours: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The differences that `resume_allow` doesn't name.

    Another class has another state as a rule, so it is allowed only where its very key is named.

    More epochs are allowed by themselves where the learning rate's schedule isn't laid out for their number.
    """
    allowed = [str(name) for name in ours.get("resume_allow") or []]
    longer = not any(word in str(ours.get("scheduler")) for word in ("total_steps", "total_epochs"))
    theirs = {**_added_since(theirs, ours)} if isinstance(theirs, dict) else theirs
    return [
        (key, there, here)
        for key, there, here in differences(theirs, ours)
        if not (longer and key == "trainer.max_epochs" and here > there)
        and not (key in allowed and key.endswith("_target_") and not _is_fixed(key))
        and not (any(key == name or key.startswith(f"{name}.") for name in allowed) and not _is_fixed(key, whole=True))
    ]


def _added_since(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What the config of an older run means by leaving out keys that are younger than it."""
    scheduler = theirs.get("scheduler")
    added = {"scheduler": {"interval": "step", **scheduler}} if isinstance(scheduler, dict) else {}
    return {"threads": ours.get("threads"), "vars": {}, **theirs, **added}  # of the threads its checkpoint says more


def _keys(node: Any, where: str = "") -> Iterator[str]:
    """All keys of a config, with dots."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{where}{key}"
        yield from _keys(value, f"{where}{key}.")


def _shown(value: Any, key: str, config: Any) -> str:
    """A value of the config as it is shown: a key that isn't there is told from one that is null."""
    return repr(value) if value is not None or key in _keys(config) else "nothing"


def _is_fixed(key: str, *, whole: bool = False) -> bool:
    """Whether a difference in this key can't be allowed, or not by allowing the whole of what it is in."""
    return key == "balancer.optimizer" or key.startswith("optimizer.then") or (whole and key.endswith("_target_"))


def check(theirs: Any, ours: dict[str, Any], name: str) -> None:
    """Raises a Refused that lists what is forbidden, if anything is.

    Args:
        theirs: the config that the run was trained with.
        ours: the one that it is to go on with.
        name: of the run's folder.
    """
    keys = [*_keys(theirs), *_keys(ours)]
    for allowed in ours.get("resume_allow") or []:
        if not any(key == allowed or key.startswith(f"{allowed}.") for key in keys):
            raise Refused(
                f"resume_allow: there is no key '{allowed}'{suggest(str(allowed), keys).split(' (possible')[0]}"
            )
    found = forbidden(theirs, ours)
    if not found:
        return
    lines = "".join(
        f"\n  {key}: {_shown(there, key, theirs)} there, {_shown(here, key, ours)} here" for key, there, here in found
    )
    horizon = any(key == "trainer.max_epochs" for key, *_ in found)
    reason = "\nThe learning rate's schedule is laid out for that number of epochs." if horizon else ""
    others = [key for key, *_ in found if not _is_fixed(key)]
    listed = ",".join(map(as_value, others))
    allow = f", or allow it: {command(f'resume_allow=[{listed}]')}" if others else ""
    if any(key.endswith("_target_") for key in others):
        allow += "\nAnother class goes on where it takes the state that was saved, by its names and shapes"
    raise Refused(f"resume: {name} was trained with another config:{lines}{reason}\nGive the same{allow}")


def metrics_of(folder: Path) -> dict[str, Any]:
    """What the run's metrics.json holds; nothing where there is none.

    Raises:
        UserError: where it can't be read, or holds something else.
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
    """What a run that is finished wrote into its metrics.json; None for any other.

    Raises:
        UserError: where it can't be read.
    """
    metrics = metrics_of(folder)
    return metrics if metrics.get("status") == "finished" else None


def config_of(folder: Path) -> dict[str, Any]:
    """The config that the folder's run was trained with.

    Raises:
        UserError: where it can't be read, or is none.
        OSError: where there is none.
    """
    config = read_yaml(folder / "config.yaml")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'} holds no mapping")
    versions = (finished(folder) or {}).get("versions", {})
    if isinstance(versions, dict) and "threads" in versions:
        config.setdefault("threads", versions["threads"])  # a run older than the key
    return config


def newest_unfinished(folder: Path, ours: dict[str, Any]) -> Path | None:
    """The newest run in the folder with this config that isn't finished, and that nobody is working on.

    A run that can't be read is passed over, with a warning: it may be anybody's.
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
        except Exception as error:  # a file that was cut or changed fails in many ways
            log.warning("%s is passed over: %s", run, first_line(error))
    return None


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Holds the folder for this process; gives False if another one does. Where folders can't be locked nobody does."""
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
    """Reports which of the versions that the numbers may depend on have changed since."""
    for name in now:
        if before.get(name) != now[name]:
            report(
                f"warning  {name} was {before.get(name)} and is {now[name]}: the numbers may differ in the last digits"
            )


def reset_options(groups: Sequence[dict[str, Any]], fresh: Sequence[dict[str, Any]], allowed: Sequence[str]) -> None:
    """Gives an optimizer whose state was loaded those options that were allowed to change, group by group.

    Args:
        groups: the optimizer's, with what was loaded.
        fresh: their options as the config has them.
        allowed: `resume_allow`.
    """
    names = [name.split(".") for name in allowed if name.split(".")[0] == "optimizer"]
    everything = any(len(parts) == 1 or parts[1] == "groups" for parts in names)
    chosen = {parts[1] for parts in names if len(parts) > 1}
    for group, options in zip(groups, fresh, strict=True):
        for key, value in options.items():
            if everything or key in chosen:
                group[key] = value
