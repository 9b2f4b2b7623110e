"""A trained run's config with other data: which keys may differ, and how the data are encoded as in training."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import mtl.data
from mtl import schema
from mtl.config.data import LOADER_KEYS, Config
from mtl.config.targets import Ready, find
from mtl.data import Sources, image_table, table
from mtl.errors import UserError, first_line

FILES = {table: "path", image_table: "labels"}  # the argument that names the rows' file
AS_TRAINED = ("inputs", "targets", "categories", "classes", "standardize_targets", "mean", "std")
SAME_SAMPLES = ("path", "labels", "root", "domain")  # arguments that name the samples
DRAWN = ("split", "split_column", "seed", "validation")


def with_other_data(
    config: Config, given: Mapping[str, Any], typed: Iterable[str], facts: Mapping[str, Any]
) -> tuple[Config, bool]:
    """The config with the data that are to be measured.

    What is given changes the keys of the run's data, or takes their place where a whole group was chosen. A function
    that has an argument `trained_on` is given the training's facts, and encodes the data by them. Where another file is
    named for `mtl.data.table` or `image_table`, all of its rows are measured.

    Args:
        config: the run's.
        given: what was composed below `data`, with interpolations.
        typed: the keys that were typed, such as data or data.path.
        facts: of the data that the run was trained on.

    Returns:
        The config, and whether its data differ from the run's.

    Raises:
        UserError: for a key that must be as it was in training.
    """
    typed = [key for key in typed if key.split(".")[0] == "data"]
    base = {} if "data" in typed else config["data"]
    try:
        merged = OmegaConf.merge({"data": base}, {"data": given})
        others = {key: value for key, value in config.items() if key not in schema.UNBUILT}
        full = OmegaConf.create({**others, "data": merged.data})
        data: Any = OmegaConf.to_container(full.data, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"data: {first_line(error)}") from error
    schema.check_data(data)
    for where, node, _ in _tables(data, "data", facts):
        _check_file(where, node, _at(config, where))
    if _without_loading(data) == _without_loading(config["data"]):
        return {**config, "data": data}, False
    for where, node, _ in _tables(data, "data", facts):
        _check_keys(where, node, typed)
        _check_group(where, node, _at(config, where))
    return {**config, "data": _encoded(data, config, facts, typed)}, True


def _without_loading(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in (*LOADER_KEYS, "download")}


def _tables(node: Any, where: str, facts: Any) -> Iterator[tuple[str, Any, Any]]:
    """The node, or those of its sources: its place in the config, itself, and the facts of the data it gives."""
    if find(node["_target_"], where) is not Sources:
        yield where, node, facts
        return
    for name, source in node["sources"].items():
        if isinstance(source, Mapping) and "_target_" in source:
            yield f"{where}.sources.{name}", source, facts.get(name, {})


def _at(config: Config, where: str) -> Any:
    """What stands at that place of the config, None for nothing."""
    node: Any = config
    for key in where.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _check_file(where: str, node: dict[str, Any], of_run: Any) -> None:
    """Gives the run's own file the name that the run's config has for it.

    Raises:
        UserError: for files of some splits that leave out the first.
    """
    key = FILES.get(find(node["_target_"], where))
    if key is None:
        return
    file, own = (each.get(key) if isinstance(each, Mapping) else None for each in (node, of_run))
    if isinstance(file, Mapping) and not file.get("train"):
        raise UserError(f"{where}.{key}.train: a file is needed here; for all rows of one file: {where}.{key}=FILE")
    if isinstance(file, str) and isinstance(own, str) and Path(file).resolve() == Path(own).resolve():
        node[key] = own


def _check_keys(where: str, node: Mapping[str, Any], typed: Iterable[str]) -> None:
    """Raises a UserError for a key of a function of mtl's that would make the figures mean something else."""
    if not str(node["_target_"]).startswith("mtl.data."):
        return
    for key in typed:
        place, _, name = key.rpartition(".")
        if place == where and name in AS_TRAINED:
            raise UserError(f"{key}: other data are read and encoded as the training's were, so it can't be changed")
        if place == where and name in DRAWN:
            raise _another_draw(key)


def _another_draw(key: str) -> UserError:
    return UserError(
        f"{key}: with another draw, samples that the model was trained on would be among those that are measured; name "
        "a file of other data instead, or another split of the run's with split=…"
    )


def _check_group(where: str, node: Mapping[str, Any], of_run: Any) -> None:
    """The same for what a whole group says: of the run's own samples, and of how pictures are standardised."""
    names = {f"mtl.data.{name}" for name in mtl.data.__all__}
    if not isinstance(of_run, Mapping) or not all(n.get("_target_") in names for n in (node, of_run)):
        return
    now, then = _settings(where, node), _settings(where, of_run)
    for key in ("mean", "std"):
        if key in now and key in then and now[key] != then[key]:
            raise UserError(
                f"{where}.{key} is {now[key]} and was {then[key]} in training; other data are read and encoded as the "
                f"training's were. Set {where}.{key} in the group to the same"
            )
    if node["_target_"] == of_run["_target_"] and all(now.get(key) == then.get(key) for key in SAME_SAMPLES):
        for key in DRAWN:
            if now.get(key) != then.get(key):
                raise _another_draw(f"{where}.{key}")


def _settings(where: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """A function's arguments, with its defaults."""
    defaults = {
        name: each.default for name, each in inspect.signature(find(node["_target_"], where)).parameters.items()
    }
    return {key: list(x) if isinstance(x, tuple) else x for key, x in {**defaults, **node}.items()}


def _encoded(data: dict[str, Any], config: Config, facts: Mapping[str, Any], typed: Iterable[str]) -> dict[str, Any]:
    """The data's config, in which functions that can are told to follow the training's facts."""
    changed = {}
    for where, node, known in _tables(data, "data", facts):
        target = find(node["_target_"], where)
        try:
            takes = inspect.signature(target).parameters
        except (TypeError, ValueError):  # some built-ins have none
            takes = {}  # type: ignore[assignment]
        changed[where] = {**node, "trained_on": Ready(dict(known))} if "trained_on" in takes else node
        key = FILES.get(target)
        own = _at(config, where)
        other = not (isinstance(own, Mapping) and own.get(key) == node.get(key))
        if key is not None and other and f"{where}.{key}" in typed and isinstance(node[key], str):
            changed[where] |= dict.fromkeys(key for key in ("split", "split_column") if key in takes)
    if "data" in changed:
        return changed["data"]
    sources = {name: changed.get(f"data.sources.{name}", node) for name, node in data["sources"].items()}
    return {**data, "sources": sources}
