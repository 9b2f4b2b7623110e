"""Separate models: a complete network for each task, without shared parameters."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mtl.batch import Batch
from mtl.model import MultiTaskModel
from mtl.task import Task
from mtl.trunks.stages import new_trunk


class SeparateModels(MultiTaskModel):
    """A trunk and a head for each task, trained in one loop by one optimizer; the trunks are `model.trunk[task.name]`.

    Args:
        trunk: A function that creates a new trunk at each call.
        tasks: The tasks, at least one, with distinct names.
        inputs: The names of the batch's fields that are the inputs of each trunk.
    """

    shared = None

    def __init__(self, trunk: Callable[[], nn.Module], tasks: Sequence[Task], *, inputs: Sequence[str]) -> None:
        super().__init__(nn.ModuleDict({task.name: new_trunk(trunk) for task in tasks}), tasks, inputs=inputs)

    def features(self, batch: Batch) -> Any:
        """Returns the input fields, since the tasks share no computation."""
        return self._inputs_of(batch)

    def predict(self, task: str, features: Any) -> Any:
        """Computes the prediction of a task with the trunk and the head of the task."""
        return super().predict(task, self._encode(self.own_part(task), features))

    def own_part(self, task: str) -> nn.Module:
        """Returns the trunk of a task."""
        assert isinstance(self.trunk, nn.ModuleDict)
        return self.trunk[task]
