"""All architectures train two problems above a floor, in the setting of scripts/study_architectures.py."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command

SPEC = importlib.util.spec_from_file_location("study_architectures", ROOT / "scripts" / "study_architectures.py")
assert SPEC is not None
assert SPEC.loader is not None
STUDY: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(STUDY)
# Below the 95 % intervals that docs/howto/architectures_measured.md has, and far above a model that has learned nothing:
# 0.1 for the accuracies, 0.5 for the AUCs. Learned branching begins with a mixture of all branches, and is slower.
FLOORS = {
    "multi_mnist": {"left": 0.78, "right": 0.72},
    "made_ctr": {"click": 0.7, "conversion": 0.61},
    "made_ctr_chain": {"click": 0.7, "purchase": 0.63},
}
SLOWER = {"multi_mnist": {"left": 0.55, "right": 0.5}, "made_ctr": {"click": 0.69, "conversion": 0.57}}
CASES = [
    (problem, model, balancer)
    for problem, (models, _, _) in STUDY.PROBLEMS.items()
    for model in models
    for balancer in STUDY.BALANCERS
    if (model, balancer) != ("separate", "upgrad")
]


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "model", "balancer"), CASES)
def test_floors(here: Path, problem: str, model: str, balancer: str) -> None:
    _, settings, metric = STUDY.PROBLEMS[problem]
    ended = command(
        "train", f"task={problem}", f"model={model}", f"balancer={balancer}", "threads=1", *settings, *STUDY.SETTINGS
    )
    assert ended.code == 0, ended.err
    floors = (SLOWER if model == "learned_branching" else FLOORS)[problem]
    reached = {task: ended.metrics["test"][task][metric] for task in floors}
    assert all(reached[task] > floor for task, floor in floors.items()), reached
