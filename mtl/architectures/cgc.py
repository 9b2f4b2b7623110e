"""Customized gate control (CGC): shared and task-specific experts in one layer."""

from collections.abc import Callable, Sequence

from torch import nn

from mtl.architectures.ple import PLE
from mtl.task import Task


class CGC(PLE):
    """Experts that all tasks share and experts of each task; a gate of each task mixes its own and the shared ones.

    This is progressive layered extraction with one layer. The features of task k are Σ_i g_k(x)_i f_i(x) over the
    task's own and the shared experts f_i, with the gate g_k(x) = softmax(W_k x), where x is the input of the experts.

    Args:
        trunk, tasks, inputs, shared_stages: See `mtl.architectures.experts.ExpertModel`, also for the errors raised.
        shared_experts: The number of experts that all tasks share.
        own_experts: The number of experts of each task.

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
        shared_stages: int | None = None,
    ) -> None:
        super().__init__(
            trunk,
            tasks,
            inputs=inputs,
            shared_experts=shared_experts,
            own_experts=own_experts,
            layers=1,
            shared_stages=shared_stages,
        )
