"""Separate models: nothing shared, a complete network for each task."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mtl.batch import Batch
from mtl.model import MultiTaskModel
from mtl.task import Task


class SeparateModels(MultiTaskModel):
    """A trunk and a head for each task, trained in one loop by one optimizer; the trunks are `model.trunk[task.name]`.

    Args:
        trunk: makes a new trunk at each call.
        tasks: at least one, names distinct.
        inputs: the batch's fields that every trunk is given.
    """

    shared = None

    def __init__(self, trunk: Callable[[], nn.Module], tasks: Sequence[Task], *, inputs: Sequence[str]) -> None:
        super().__init__(nn.ModuleDict({task.name: trunk() for task in tasks}), tasks, inputs=inputs)

    def features(self, batch: Batch) -> Any:
        """The input fields: nothing is computed for several tasks."""
        return self._inputs_of(batch)

    def predict(self, task: str, features: Any) -> Any:
        """The prediction of the task's own trunk and head."""
        return super().predict(task, self._encode(self.own_part(task), features))

    def own_part(self, task: str) -> nn.Module:
        """The task's own trunk."""
        assert isinstance(self.trunk, nn.ModuleDict)
        return self.trunk[task]
