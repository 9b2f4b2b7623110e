"""Applies a trained run's config to other data: which keys may differ, and how to encode the data as in training."""

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

FILES = {table: "path", image_table: "labels"}  # the argument that names the file of the rows
AS_TRAINED = ("inputs", "targets", "categories", "classes", "standardize_targets", "mean", "std")
SAME_SAMPLES = ("path", "labels", "root", "domain")  # arguments that select the samples
DRAWN = ("split", "split_column", "seed", "validation")


def with_other_data(
    config: Config, changes: Mapping[str, Any], typed: Iterable[str], facts: Mapping[str, Any]
) -> tuple[Config, bool]:
    """Returns the run's config with the data to evaluate on.

    `changes` overrides keys of the run's data, or replaces them if a whole group was chosen. A function with an
    argument `trained_on` receives the facts of the training data and encodes the data with them. If another file is
    named for `mtl.data.table` or `image_table`, all rows of the file are used.

    Args:
        config: The run's config.
        changes: The composed config below `data`, with interpolations.
        typed: The keys on the command line, such as data or data.path.
        facts: The facts of the data that the run was trained on.

    Returns:
        The config, and whether the data differ from the run's data.

    Raises:
        UserError: If a key differs that must be the same as in training.
    """
    typed = [key for key in typed if key.split(".")[0] == "data"]
    base = {} if "data" in typed else config["data"]
    try:
        merged = OmegaConf.merge({"data": base}, {"data": changes})
        remaining = {key: value for key, value in config.items() if key not in schema.UNBUILT}
        full = OmegaConf.create({**remaining, "data": merged.data})
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
    """Yields config path, node and facts of the data, or of each source if there are several."""
    if find(node["_target_"], where) is not Sources:
        yield where, node, facts
        return
    for name, source in node["sources"].items():
        if isinstance(source, Mapping) and "_target_" in source:
            yield f"{where}.sources.{name}", source, facts.get(name, {})


def _at(config: Config, where: str) -> Any:
    """Returns the config value at the path `where`, or None if there is none."""
    node: Any = config
    for key in where.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _check_file(where: str, node: dict[str, Any], of_run: Any) -> None:
    """Replaces the path of the run's own file by the spelling in the run's config.

    Raises:
        UserError: If files are named for some splits, but not for the first one.
    """
    key = FILES.get(find(node["_target_"], where))
    if key is None:
        return
    file, run_file = (each.get(key) if isinstance(each, Mapping) else None for each in (node, of_run))
    if isinstance(file, Mapping) and not file.get("train"):
        raise UserError(f"{where}.{key}.train: a file is required; for all rows of one file: {where}.{key}=FILE")
    if isinstance(file, str) and isinstance(run_file, str) and Path(file).resolve() == Path(run_file).resolve():
        node[key] = run_file


def _check_keys(where: str, node: Mapping[str, Any], typed: Iterable[str]) -> None:
    """Raises a UserError if a changed argument of a function of mtl would change the meaning of the metrics."""
    if not str(node["_target_"]).startswith("mtl.data."):
        return
    for key in typed:
        place, _, name = key.rpartition(".")
        if place == where and name in AS_TRAINED:
            raise UserError(f"{key}: other data are read and encoded as in training, so this key can't be changed")
        if place == where and name in DRAWN:
            raise _another_draw(key)


def _another_draw(key: str) -> UserError:
    return UserError(
        f"{key}: with another draw, the evaluation would include samples that the model was trained on; name a file "
        "of other data instead, or another split of the run's data with split=…"
    )


def _check_group(where: str, node: Mapping[str, Any], of_run: Any) -> None:
    """Raises a UserError if a chosen group draws the run's own samples anew or standardises pictures differently."""
    names = {f"mtl.data.{name}" for name in mtl.data.__all__}
    if not isinstance(of_run, Mapping) or not all(n.get("_target_") in names for n in (node, of_run)):
        return
    now, then = _settings(where, node), _settings(where, of_run)
    for key in ("mean", "std"):
        if key in now and key in then and now[key] != then[key]:
            raise UserError(
                f"{where}.{key} is {now[key]} and was {then[key]} in training; other data are read and encoded as in "
                f"training. Set {where}.{key} in the group to the same value"
            )
    if node["_target_"] == of_run["_target_"] and all(now.get(key) == then.get(key) for key in SAME_SAMPLES):
        for key in DRAWN:
            if now.get(key) != then.get(key):
                raise _another_draw(f"{where}.{key}")


def _settings(where: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a function, including defaults."""
    defaults = {
        name: each.default for name, each in inspect.signature(find(node["_target_"], where)).parameters.items()
    }
    return {key: list(x) if isinstance(x, tuple) else x for key, x in {**defaults, **node}.items()}


def _encoded(data: dict[str, Any], config: Config, facts: Mapping[str, Any], typed: Iterable[str]) -> dict[str, Any]:
    """Returns the data's config, with the training facts passed to all functions that accept them."""
    changed = {}
    for where, node, known_facts in _tables(data, "data", facts):
        target = find(node["_target_"], where)
        try:
            takes = inspect.signature(target).parameters
        except (TypeError, ValueError):  # some built-in functions have no signature
            takes = {}  # type: ignore[assignment]
        changed[where] = {**node, "trained_on": Ready(dict(known_facts))} if "trained_on" in takes else node
        key = FILES.get(target)
        run_node = _at(config, where)
        other = not (isinstance(run_node, Mapping) and run_node.get(key) == node.get(key))
        if key is not None and other and f"{where}.{key}" in typed and isinstance(node[key], str):
            changed[where] |= dict.fromkeys(key for key in ("split", "split_column") if key in takes)
    if "data" in changed:
        return changed["data"]
    sources = {name: changed.get(f"data.sources.{name}", node) for name, node in data["sources"].items()}
    return {**data, "sources": sources}
