"""The entire-space multi-task model, for chains of events such as click and purchase."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.architectures.towers import Towers
from mtl.errors import UserError


class ESMM(Towers):
    """A shared bottom and a tower for each task; predictions are multiplied along a chain of events.

    The tower and the head of event k compute the logit of its conditional probability c_k, given the events before it.
    The prediction of the task is the logit of the product

        p_k = c_1 · c_2 · … · c_k,

    the probability of the whole chain up to event k, for every sample. The label of event k is therefore 1 if all
    events up to k have happened, and 0 otherwise, and never missing for samples in which an earlier event has not
    happened: a purchase is 0 without a click. With the events click and purchase, this is the model of Ma et al.,
    Entire Space Multi-Task Model, SIGIR 2018, arXiv 1804.07931, with p_1 = CTR and p_2 = CTCVR.

    Args:
        trunk, tasks, inputs, chain, shared_stages: See `Towers`, also for the errors raised.
    """

    def logits(self, events: Sequence[str], bottom: Any) -> dict[str, Any]:
        """Computes the logit of each event, given that the events before it have happened."""
        return {event: self.head_of(event, self.tower_of(event, bottom)) for event in events}

    def predict(self, task: str, features: Any) -> Any:
        """Computes the logit of the probability that all events of the chain up to this task's happen."""
        logit = self.conditional(task, features)
        for earlier in self.before(task):
            other = self.conditional(earlier, features)
            if other.shape != logit.shape:
                raise UserError(
                    f"task '{task}': its prediction is {tuple(logit.shape)} and that of '{earlier}' "
                    f"{tuple(other.shape)}; the tasks of model.chain need predictions of one shape"
                )
            logit = logit_of_product(other, logit)
        return logit

    def conditional(self, task: str, features: Any) -> Any:
        """Returns the logit of a task's own event, given that the events before it have happened."""
        return super().predict(task, features)


def logit_of_product(first: Tensor, second: Tensor) -> Tensor:
    """Returns the logit of the product of two probabilities, from their logits.

    With odds o = exp(logit), the inverse odds of the product are (1 + 1/o₁)(1 + 1/o₂) − 1 = 1/o₁ + 1/o₂ + 1/(o₁ o₂): a
    sum of positive terms, whose logarithm is exact for logits of any size.
    """
    return -torch.stack([-first, -second, -first - second]).logsumexp(0)
