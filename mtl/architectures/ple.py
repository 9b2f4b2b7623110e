"""Progressive layered extraction (PLE): several layers of shared and task-specific experts."""

from collections.abc import Callable, Sequence

from torch import nn

from mtl.architectures.experts import ExpertModel, check_number
from mtl.task import Task


class PLE(ExpertModel):
    """Layers of experts that all tasks share and of experts of each task, with a gate for each task in each layer.

    In each layer, a task's gate g_k(x) = softmax(W_k x) mixes the task's own experts and the shared ones. In all layers
    but the last, another gate mixes all experts, those of all tasks and the shared ones. Its mixture is the input of
    the shared experts of the next layer; a task's mixture is the input of the task's experts and of its gate there. The
    stages of an expert are divided among the layers.

    Args:
        trunk, tasks, inputs, shared_stages: See `mtl.architectures.experts.ExpertModel`, also for the errors raised.
        shared_experts: The number of experts that all tasks share.
        own_experts: The number of experts of each task.
        layers: The number of layers. One layer is CGC, see `mtl.architectures.CGC`.

    Source: Tang et al., "Progressive layered extraction (PLE): a novel multi-task learning (MTL) model for personalized
    recommendations", RecSys 2020.
    """

    def __init__(
        self,
        trunk: Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        shared_experts: int = 1,
        own_experts: int = 1,
        layers: int = 2,
        shared_stages: int | None = None,
    ) -> None:
        check_number("own_experts", own_experts, 1)
        super().__init__(
            trunk,
            tasks,
            inputs=inputs,
            shared_experts=shared_experts,
            own_experts=own_experts,
            layers=layers,
            shared_stages=shared_stages,
        )
