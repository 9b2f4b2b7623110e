"""Multi-gate mixture of experts (MMoE)."""

from collections.abc import Callable, Sequence

from torch import nn

from mtl.architectures.experts import ExpertModel, check_number
from mtl.task import Task


class MMoE(ExpertModel):
    """Experts that all tasks share, which each task mixes with the weights of a gate of its own.

    The features of task k are Σ_i g_k(x)_i f_i(x), with experts f_i and the gate g_k(x) = softmax(W_k x), where x is
    the input of the experts. With one expert, this is hard parameter sharing.

    Args:
        trunk, tasks, inputs, shared_stages: See `mtl.architectures.experts.ExpertModel`, also for the errors raised.
        experts: The number of experts.

    Source: Ma et al., "Modeling task relationships in multi-task learning with multi-gate mixture-of-experts", KDD
    2018.
    """

    def __init__(
        self,
        trunk: Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        experts: int = 4,
        shared_stages: int | None = None,
    ) -> None:
        check_number("experts", experts, 1)
        super().__init__(trunk, tasks, inputs=inputs, shared_experts=experts, shared_stages=shared_stages)
