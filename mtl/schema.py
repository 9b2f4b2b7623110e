"""The schema of configs. It is checked before torch is imported, so that mistakes are reported at once."""

import math
from collections.abc import Callable, Mapping, Set
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mtl.choices import INTERVALS, MEAN_OVER, ON_NONFINITE, OUTPUTS, PASSES, PRECISIONS, SOURCES, TAILS, WAYS
from mtl.chosen_tasks import narrowed
from mtl.errors import UserError, first_line, suggest

VARIABLE = "your own variables belong below vars"
Check = tuple[Callable[[Any], bool], str]  # whether a value is valid, and a description of valid values


def _whole(least: int) -> Check:
    return lambda v: type(v) is int and least <= v < 2**63, f"a whole number of at least {least}, and below 2^63"


def _number(least: float, *, above: bool = False) -> Check:
    def right(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return bool(value > least if above else value >= least)

    return right, f"a finite number {'above' if above else 'of at least'} {least:g}"


def _one_of(*values: str) -> Check:
    return lambda v: v in values, f"one of {', '.join(values)}"


def _or_null(check: Check) -> Check:
    return lambda v: v is None or check[0](v), f"{check[1]}, or null"


_TEXT: Check = (lambda v: isinstance(v, str) and bool(v), "a text that isn't empty")
_FLAG: Check = (lambda v: isinstance(v, bool), "true or false")
_TEXTS: Check = (lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v), "a list of texts")
_NODE: Check = (lambda v: isinstance(v, Mapping) and "_target_" in v, "a mapping with a _target_")
_NODES: Check = (
    lambda v: v is None or (isinstance(v, Mapping) and all(_NODE[0](n) for n in v.values())),
    "names, each with a mapping that has a _target_",
)
_METRICS: Check = (
    lambda v: v is None or (isinstance(v, Mapping) and all(n is None or _NODE[0](n) for n in v.values())),
    "names, each with a mapping that has a _target_, or null to leave the metric out",
)
_MAPPING: Check = (lambda v: isinstance(v, Mapping), "a mapping")
_MAPPINGS: Check = (
    lambda v: isinstance(v, Mapping) and bool(v) and all(isinstance(n, Mapping) for n in v.values()),
    "names, each with a mapping",
)
_DEVICE: Check = (
    lambda v: isinstance(v, str) and (v in ("auto", "cpu", "cuda") or (v.startswith("cuda:") and v[5:].isdigit())),
    "auto, cpu, cuda or cuda:N",
)
_NAMES: Check = (
    lambda v: v is None or (isinstance(v, str) and bool(v)) or (_TEXTS[0](v) and bool(v)),
    "a task's name, a list of names, or null",
)
_PATTERNS: Check = (lambda v: v is None or _TEXTS[0](v), "a list of names")

# Below a node with a _target_, only mtl's keys are listed; all other keys are arguments of the callable.
SCHEMA: dict[str, Check] = {
    "seed": _whole(0),
    "threads": (lambda v: type(v) is int and 1 <= v <= 1024, "a whole number from 1 to 1024"),
    "deterministic": _FLAG,
    "device": _DEVICE,
    "precision": _one_of(*PRECISIONS),
    "on_nonfinite": _one_of(*ON_NONFINITE),
    "passes": _one_of(*PASSES, "auto"),
    "distributed": _one_of("auto", *WAYS),
    "tasks": _MAPPING,
    "only": _NAMES,
    "vars": _MAPPING,
    "callbacks": _NODES,
    "init_from": _or_null(_TEXT),
    "resume": _or_null(_TEXT),
    "resume_allow": _TEXTS,
    "checkpoint": _MAPPING,
    "checkpoint.every_steps": _or_null(_whole(1)),
    "checkpoint.every_minutes": _or_null(_number(0, above=True)),
    "checkpoint.keep": (lambda v: v == "all" or _whole(1)[0](v), f"{_whole(1)[1]}, or all"),
    "checkpoint.best": _whole(1),
    "output_root": _TEXT,
    "debug": _FLAG,
    "log": _MAPPING,
    "log.every": _whole(1),
    "log.pictures": _or_null(_whole(1)),
    "log.histograms": _or_null(_whole(1)),
    "data": _NODE,
    "data.batch_size": (
        lambda v: _whole(1)[0](v) or (isinstance(v, Mapping) and bool(v) and all(_whole(1)[0](n) for n in v.values())),
        f"{_whole(1)[1]}, or such a number for each of data.sources",
    ),
    "data.eval_batch_size": _whole(1),
    "data.num_workers": _whole(0),
    "data.collate": _or_null(_NODE),
    "model": _NODE,
    "model.trunk": _NODE,
    "model.inputs": _TEXTS,
    **dict.fromkeys(("model.checkpoint", "model.freeze"), _PATTERNS),
    "model.sync_batchnorm": _FLAG,
    "model.compile": (lambda v: isinstance(v, bool) or _PATTERNS[0](v), f"true, false or {_PATTERNS[1]}"),
    "model.freeze_until": (
        lambda v: v is None or (isinstance(v, Mapping) and all(_whole(1)[0](n) for n in v.values())),
        "names, each with a whole number of steps of at least 1",
    ),
    "balancer": _NODE,
    "gradients": _MAPPING,
    "gradients.source": _one_of(*SOURCES),
    "gradients.every": _whole(1),
    "optimizer": _NODE,
    "optimizer.lr": _or_null(_number(0)),
    "optimizer.groups": _or_null(_MAPPINGS),
    "optimizer.then": (
        lambda v: v is None or (_NODE[0](v) and _whole(1)[0](v.get("after"))),
        "a mapping with a _target_ and `after`, a whole number of steps of at least 1, or null",
    ),
    "scheduler": _or_null(_NODE),
    "scheduler.interval": _one_of(*INTERVALS),
    "trainer": _MAPPING,
    "trainer.max_epochs": _whole(1),
    **dict.fromkeys(
        ("trainer.clip_norm", "trainer.clip_shared_norm", "trainer.timeout"), _or_null(_number(0, above=True))
    ),
    **dict.fromkeys(("trainer.micro_batch_size", "trainer.num_micro_batches"), _or_null(_whole(1))),
    "trainer.tail": _one_of(*TAILS),
    **dict.fromkeys(("trainer.patience", "trainer.last_epochs"), _or_null(_whole(1))),
    "trainer.monitor": _or_null(_MAPPING),
    "logger": _NODES,
}
TASK: dict[str, Check] = {
    "target": _TEXT,
    "num_outputs": _whole(1),
    "weight": (lambda v: _number(0)[0](v) or _NODE[0](v), f"{_number(0)[1]}, or a mapping with a _target_"),
    "head": _NODE,
    "loss": _NODE,
    "objective": _or_null(_NODE),
    "metrics": _METRICS,
    "count": _or_null(_NODE),
    "mask": _or_null(_TEXT),
    "source": _or_null(_TEXT),
    "missing": (lambda v: v == "auto" or isinstance(v, bool), "auto, true or false"),
    "output": _or_null(_one_of(*OUTPUTS)),
    "mean_over": _or_null(_one_of(*MEAN_OVER)),
    "whole_batch": _FLAG,
}
OPTIONAL = {
    "distributed",
    *("optimizer.lr", "optimizer.groups", "optimizer.then", "scheduler.interval"),
    *("model.checkpoint", "model.compile", "model.freeze", "model.freeze_until", "model.sync_batchnorm"),
    *("data.collate", "trainer.timeout", "trainer.last_epochs"),
}
OPTIONAL_IN_TASK = {
    *("num_outputs", "metrics", "count", "mask", "source", "missing", "whole_batch", "weight", "objective"),
    *("output", "mean_over"),
}


def check(config: DictConfig) -> dict[str, Any]:
    """Resolves and checks the config, and returns it as plain dicts and lists.

    Raises:
        UserError: For the first invalid value: the message names the key, the value and what is possible.
    """
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key or 'config'}: a value is required") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {first_line(error)}") from error
    for group in ("data", "model"):
        if plain.get(group) is None:
            raise UserError(f"{group}: the task has none; choose one on the command line or in the task's defaults")
    _check_level(plain, "", SCHEMA)
    for group in ("log", "gradients", "checkpoint", "trainer", "data", "model", "optimizer", "scheduler"):
        if plain[group] is not None:
            _check_group(plain[group], group)
    if not plain["tasks"]:
        raise UserError("tasks: the config has none; a problem needs at least one")
    plain = narrowed(plain)
    for name, task in plain["tasks"].items():
        where = f"tasks.{name}"
        if not isinstance(name, str) or not (name.isascii() and name.isidentifier()):
            raise UserError(f"{where}: use letters a to z, digits and _ in a task's name, not beginning with a digit")
        if not isinstance(task, Mapping):
            raise UserError(f"{where} is {task!r}; it must be a mapping with {', '.join(TASK)}")
        _check_level(
            task,
            where,
            TASK,
            optional=OPTIONAL_IN_TASK | ({"head", "loss", "target"} if task.get("objective") else set()),
        )
    if not any(task.get("weight", 1) for task in plain["tasks"].values()):
        raise UserError("tasks: every task's weight is 0, so nothing would be trained")
    checked: dict[str, Any] = plain
    return checked


def check_data(node: Any) -> None:
    """Checks the data of a config again, after they were replaced.

    Raises:
        UserError: For the first invalid value.
    """
    _check_level({"data": node}, "", {"data": SCHEMA["data"]})
    _check_group(node, "data")


def _check_group(node: Mapping[str, Any], group: str) -> None:
    checks = {key.split(".")[1]: c for key, c in SCHEMA.items() if key.startswith(f"{group}.")}
    _check_level(node, group, checks, open_ended="_target_" in node)


GRAPH: dict[str, Check] = {"tensorboard": _FLAG}


def check_graph(config: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checks the config of mtl.graph; returns the training config, as `check` does, and the options of mtl.graph.

    Raises:
        UserError: See `check`.
    """
    training = check(OmegaConf.masked_copy(config, [str(key) for key in config if key != "graph"]))
    options: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, "graph"), resolve=True)
    _check_level(options, "", {"graph": _MAPPING})
    _check_level(options["graph"], "graph", GRAPH)
    return training, options["graph"]


def _check_level(
    node: Mapping[str, Any],
    where: str,
    checks: dict[str, Check],
    *,
    open_ended: bool = False,
    optional: Set[str] = frozenset(),
) -> None:
    prefix = f"{where}." if where else ""
    names = [name for name in checks if where or "." not in name]
    for key in node:
        if key not in names and not open_ended:
            variable = "" if where else f"; {VARIABLE}: vars.{key}"
            raise UserError(f"{prefix}{key}: there is no such key{suggest(str(key), names)}{variable}")
    for name in names:
        if name not in node:
            if prefix + name in OPTIONAL or name in optional:
                continue
            raise UserError(f"{prefix}{name}: a value is required")
        right, wanted = checks[name]
        if not right(node[name]):
            group = f"; an option is chosen with model/trunk={node[name]}" if prefix + name == "model.trunk" else ""
            option = group if isinstance(node[name], str) else ""
            raise UserError(f"{prefix}{name} is {node[name]!r}; it must be {wanted}{option}")


UNBUILT = ("balancer", "optimizer", "scheduler", "logger", "callbacks")  # not needed to use a trained model
EVALUATE = ["run", "checkpoint", "split", "data", "device", "trust", "debug"]


def is_known(key: str) -> bool:
    """Returns whether configs may have this dotted key, even if not every config has it."""
    parts = key.split(".")
    of_task = len(parts) == 3 and parts[0] == "tasks" and parts[2] in TASK
    return len(parts) > 1 and (key in SCHEMA or of_task or parts[0] == "vars")
