"""Describes the passes of a run's steps, for its first lines and its summary."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl.step import Step

COSTS = {
    "joint": "one trunk forward and backward a step, all graphs alive at once",
    "sequential": "{trunks} trunk forwards and backwards a step, one task's graph alive at a time",
    "shared": "one trunk forward and backward a step, one head's graph alive at a time",
}
OWN = "one for each objective and each source of data, one graph alive at a time"


def passes_of(step: "Step", config: Mapping[str, Any]) -> str:
    """Describes the kind of passes of a step and their cost."""
    sources = {task.get("source") for task in config["tasks"].values()}
    if len(sources) > 1 or any(task.objective for task in step.tasks):
        return OWN
    cost = COSTS[step.passes.kind].format(trunks=len(step.tasks))
    reason = "" if step.model.shared is not None else "; the tasks share no module"
    return f"{step.passes.kind}, {cost}{reason}"
