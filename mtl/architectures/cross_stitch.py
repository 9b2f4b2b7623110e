"""Cross-stitch networks: a trunk for each task, whose activations are mixed after each stage."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from mtl.architectures.mixing import channels_of, check_channels, replaced, weighted
from mtl.model import MultiTaskModel
from mtl.task import Task
from mtl.trunks.stages import new_trunk, run_stages, stages_of, tensor_of


class CrossStitch(MultiTaskModel):
    """A trunk for each task, with a cross-stitch unit after each stage of the trunks.

    With the outputs x_1, …, x_T of a stage of the T trunks, the next stage of trunk i, or the head of task i after the
    last stage, gets Σ_j α_ij · x_j. The unit's weights α are learned, separately for each stage. The stages are
    `model.trunk.trunks[task.name]`, and the units `model.trunk.units`.

    Each task depends on all trunks, so that all trunks are shared parameters.

    Args:
        trunk: A function that creates a new trunk at each call.
        tasks: The tasks, at least one, with distinct names.
        inputs: The names of the batch's fields that are the inputs of each trunk.
        initial: The initial value of α_ii. The initial values of the other weights are equal, and α_i1 + … + α_iT = 1.
        per_channel: Whether each channel has a separate weight α_ij.

    Source: Misra et al., "Cross-stitch networks for multi-task learning", CVPR 2016. The authors train the units with
    a learning rate 100 to 1000 times that of the trunks.
    """

    one_representation = False  # each task has features of its own

    def __init__(
        self,
        trunk: Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        initial: float = 0.9,
        per_channel: bool = False,
    ) -> None:
        stages = {task.name: stages_of(new_trunk(trunk)) for task in tasks}
        super().__init__(StitchedTrunks(stages, initial=initial, per_channel=per_channel), tasks, inputs=inputs)

    def predict(self, task: str, features: Any) -> Any:
        """Computes the prediction of a task from the features of all tasks, by task name."""
        return super().predict(task, features[task])


class StitchedTrunks(nn.Module):
    """The trunks of several tasks and the cross-stitch units between them.

    Args:
        stages: The stages of the trunk of each task, by task name.
        initial, per_channel: See `CrossStitch`.
    """

    def __init__(self, stages: dict[str, list[nn.Module]], *, initial: float, per_channel: bool) -> None:
        super().__init__()
        self.trunks = nn.ModuleDict({task: nn.ModuleList(each) for task, each in stages.items()})
        count = len(next(iter(stages.values()), []))
        kind = ChannelUnit if per_channel else Unit
        self.units = nn.ModuleList(kind(len(stages), initial) for _ in range(count))

    def forward(self, *inputs: Any) -> dict[str, Any]:
        """Returns the features of each task, by task name."""
        values: list[Any] = [inputs if len(inputs) > 1 else inputs[0]] * len(self.trunks)
        for unit, *stages in zip(self.units, *self._stages(), strict=True):
            values = [run_stages([stage], value) for stage, value in zip(stages, values, strict=True)]
            if isinstance(unit, ChannelUnit):
                check_channels(values[0], stages[0])
            values = unit(values)
        return dict(zip(self.trunks, values, strict=True))

    def _stages(self) -> list[list[nn.Module]]:
        return [list(trunk.children()) for trunk in self.trunks.values()]


class Unit(nn.Module):
    """A cross-stitch unit with one weight for each pair of tasks.

    Args:
        count: The number of tasks, T.
        initial: The initial value of the weights α_ii.

    Attributes:
        weight: The weights α, (T, T).
    """

    weight: Tensor

    def __init__(self, count: int, initial: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(_initial(count, initial))

    def forward(self, values: Sequence[Any]) -> list[Any]:
        """Returns the mixed value of each task. Of tuples, the first tensors are mixed."""
        tensors = [tensor_of(value) for value in values]
        return [replaced(value, weighted(row, tensors)) for row, value in zip(self.weight, values, strict=True)]


class ChannelUnit(LazyModuleMixin, Unit):
    """A cross-stitch unit with one weight for each pair of tasks and each channel.

    Args:
        count, initial: See `Unit`.

    Attributes:
        weight: The weights α, (T, T, C), whose shape is inferred from the first values.
    """

    def __init__(self, count: int, initial: float) -> None:
        super().__init__(count, initial)
        self.weight = UninitializedParameter()
        self._start = (count, initial)

    def initialize_parameters(self, values: Sequence[Any]) -> None:
        """Creates the weights for the channels of the values."""
        if isinstance(self.weight, UninitializedParameter):
            tensor = tensor_of(values[0])
            channels = tensor.shape[channels_of(tensor)]
            initial = _initial(*self._start)
            with torch.no_grad():
                self.weight.materialize((*initial.shape, channels))
                self.weight.copy_(initial.unsqueeze(-1).expand_as(self.weight))


def _initial(count: int, diagonal: float) -> Tensor:
    """Returns the initial weights, (T, T), whose rows sum to 1; a single task has the weight 1."""
    if count == 1:
        return torch.ones(1, 1)
    weights = torch.full((count, count), (1 - diagonal) / (count - 1))
    return weights.fill_diagonal_(diagonal)
