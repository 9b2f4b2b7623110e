"""The result of a step."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class StepResult:
    """The losses, weights and measurements of one step, as 0-dim tensors on the model's device.

    Attributes:
        losses: The unweighted loss of each task, by name; tasks without labels in the step are missing.
        weights: The factor of each task's gradient, by name, task weight included. If the balancer's scope is `shared`,
            the factor applies to the gradient over the shared parameters.
        grad_norms: The gradient norm of each task's unweighted loss over all parameters that the task reaches, by name;
            None if it wasn't measured.
        cosines: The cosine between two tasks' gradients over the shared parameters, by pair of names; None if it wasn't
            measured.
        total_norm: The norm of the summed gradient before clipping; None if it wasn't computed.
        reach: The names of the tasks that reach each parameter, by parameter name; None if it wasn't measured.
        taken: Whether the parameters were updated. False if fp16 gradients overflowed, if the step was skipped, or if
            no task had labels in the batch.
        nonfinite: What wasn't finite, by name of the task that was left out of the step.
    """

    losses: dict[str, Tensor]
    weights: dict[str, Tensor]
    grad_norms: dict[str, Tensor] | None = None
    cosines: dict[tuple[str, str], Tensor] | None = None
    total_norm: Tensor | None = None
    reach: dict[str, tuple[str, ...]] | None = None
    taken: bool = True
    nonfinite: dict[str, str] = field(default_factory=dict)
