"""Folders of runs that are written by hand, with known figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtl.reporting.comparison import Comparison
from mtl.reporting.grouping import sections
from mtl.reporting.reading import find


def task(name: str, **more: Any) -> dict[str, Any]:
    return {"target": name, "weight": 1.0, "loss": {"_target_": "torch.nn.CrossEntropyLoss"}, **more}


def run(
    folder: Path,
    *,
    seed: int = 0,
    balancer: str = "equal",
    tasks: Sequence[str] = ("a", "b"),
    test: Mapping[str, Mapping[str, float]] | None = None,
    val: Mapping[str, Mapping[str, float]] | None = None,
    best: float | None = 0.5,
    mode: str = "max",
    monitor: str = "mean of a/accuracy, b/accuracy (max)",
    kinds: Mapping[str, str | None] | None = None,
    curves: Mapping[str, Mapping[int, float]] | None = None,
    config: Mapping[str, Any] | None = None,
    **metrics: Any,
) -> Path:
    """Writes a run's folder; `config` and `metrics` replace defaults, and None removes a metric."""
    folder.mkdir(parents=True)
    whole: dict[str, Any] = {
        "seed": seed,
        "passes": "auto",
        "tasks": {name: task(name) for name in tasks},
        "only": None,
        "data": {"_target_": "mtl.data.made", "batch_size": 64, "num_workers": 0},
        "model": {"_target_": "mtl.MultiTaskModel", "trunk": {"_target_": "mtl.trunks.MLP", "width": 8}},
        "balancer": {"_target_": f"mtl.balancers.{'Equal' if balancer == 'equal' else balancer}"},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
        "trainer": {"max_epochs": 3, "patience": None, "monitor": None},
        "log": {"every": 10},
        "output_root": str(folder.parent),
    }
    for key, value in (config or {}).items():
        node = whole
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    figures = test if test is not None else {name: {"accuracy": 0.5, "loss": 1.0} for name in tasks}
    told: dict[str, Any] = {
        "status": "finished",
        "problem": "made",
        "choices": {"task": "made", "balancer": balancer, "optimizer": "adamw", "model/trunk": "mlp"},
        "arguments": [f"seed={seed}"],
        "steps": 30,
        "epochs": 3,
        "seconds_per_step": 0.01,
        "memory_per_step": 1_000_000,
        "best": {"epoch": 2, "monitor": monitor, "value": best, "mode": mode},
        "kinds": kinds
        if kinds is not None
        else {
            f"{name}/{figure}": "min" if figure == "loss" else "max" for name, fs in figures.items() for figure in fs
        },
        "samples": {"train": 100, "val": 50, "test": 50},
        "fingerprints": {"train": "t" * 8, "val": "v" * 8, "test": "e" * 8},
        "val": val if val is not None else figures,
        "test": figures,
        "versions": {"torch": "2.14.1", "device": "x86_64", "threads": 1},
        "launcher": "basic",
    }
    told = {key: value for key, value in (told | metrics).items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    (folder / "metrics.json").write_text(json.dumps(told))
    if curves is not None:
        lines = [f"{step},1,{tag},{value!r}" for tag, values in curves.items() for step, value in values.items()]
        (folder / "metrics.csv").write_text("\n".join(["step,epoch,tag,value", *lines]) + "\n")
    return folder


def accuracies(**tasks: float) -> dict[str, dict[str, float]]:
    """Returns figures with one accuracy for each task."""
    return {name: {"accuracy": value, "loss": 1 - value} for name, value in tasks.items()}


def comparison(folder: Path, reference: str | None = None) -> Comparison:
    """Returns the comparison of all runs in the folder, which must form one section."""
    (section,) = sections(find([folder]), None)
    return Comparison(section, reference)
