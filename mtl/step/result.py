"""What a step gives back."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class StepResult:
    """What one step did: 0-dim tensors on the model's device, by task name; None where it wasn't measured.

    Attributes:
        losses: each task's loss, before its weight; a task without labels in the step isn't there.
        weights: what each task's gradient, over the shared parameters where the balancer's scope is these, was
            multiplied by, the task's own weight included.
        grad_norms: the norm of each unweighted loss's gradient over all the parameters it reaches.
        cosines: by pair of names, between the two tasks' gradients over the shared parameters.
        total_norm: of the summed gradient that the optimizer was to get, before clipping.
        reach: from each parameter's name to the tasks that reach it.
        taken: whether the parameters moved; False where fp16 gradients overflowed, the step was skipped, or no task had
            labels in it.
        nonfinite: from the names of tasks that were left out of the step to what wasn't finite.
    """

    losses: dict[str, Tensor]
    weights: dict[str, Tensor]
    grad_norms: dict[str, Tensor] | None = None
    cosines: dict[tuple[str, str], Tensor] | None = None
    total_norm: Tensor | None = None
    reach: dict[str, tuple[str, ...]] | None = None
    taken: bool = True
    nonfinite: dict[str, str] = field(default_factory=dict)
