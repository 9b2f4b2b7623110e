"""Adaptive information transfer between the towers of a chain of events, such as click and purchase."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.architectures.mixing import check_channels
from mtl.architectures.towers import Towers
from mtl.errors import UserError
from mtl.task import Task
from mtl.trunks.stages import averaged


class Transfer(nn.Module):
    """The transfer of information from one event to the next: attention over two vectors of equal width.

    With u over the transferred vector g(z) and the next tower's own output q, the result is

        Σ_u w_u V(u),  w = softmax over u of ⟨Q(u), K(u)⟩ / √width,

    where Q, K and V are linear maps, and g is a linear layer with ReLU and dropout.

    Args:
        width: The width of the vectors.
        dropout: The dropout probability of the transferred vector.
    """

    def __init__(self, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.transferred = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, earlier: Tensor, own: Tensor) -> Tensor:
        """Returns the features of the next event, (N, width), from those of the earlier one and the tower's output."""
        vectors = torch.stack([self.transferred(earlier), own], 1)
        weights = self.weights(vectors)
        result: Tensor = (weights[..., None] * self.value(vectors)).sum(1)
        return result

    def weights(self, vectors: Tensor) -> Tensor:
        """Returns the weights of the vectors (N, 2, width): (N, 2), which sum to 1 for each sample."""
        scores: Tensor = (self.query(vectors) * self.key(vectors)).sum(-1) / math.sqrt(vectors.shape[-1])
        return scores.softmax(1)


class AITM(Towers):
    """A shared bottom and a tower for each task; information is transferred along a chain of events.

    With the output q_k of the tower of event k, the head of event k gets

        z_1 = q_1,  z_k = transfer_k(z_{k−1}, q_k),

    see `Transfer`. The prediction is the logit of the probability that the whole chain up to event k happens, and so is
    the label: a purchase is 0 without a click. The model is that of Xi et al., Modeling the Sequential Dependence among
    Audience Multi-step Conversions with Multi-task Learning, KDD 2021, arXiv 2105.08489.

    Args:
        trunk, tasks, inputs, chain, shared_stages: See `Towers`, also for the errors raised. The trunk needs an
            attribute `num_features`, the width of its features.
        transfer_dropout: The dropout probability of the transferred vectors.
        calibration: The factor of the penalty for a probability that is above that of the event before it.
    """

    def __init__(
        self,
        trunk: Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        chain: Sequence[str] | None = None,
        shared_stages: int = 1,
        transfer_dropout: float = 0.0,
        calibration: float = 0.6,
    ) -> None:
        super().__init__(trunk, tasks, inputs=inputs, chain=chain, shared_stages=shared_stages)
        self.calibration = calibration
        later, width = self.chain[1:], self.num_features
        if later and not isinstance(width, int):
            raise UserError("model.trunk: AITM needs a trunk with an attribute num_features, the width of its features")
        self.transfers = nn.ModuleDict({task: Transfer(width or 0, dropout=transfer_dropout) for task in later})

    def parts_of(self, task: str) -> list[nn.Module]:
        """Returns the modules of an event that `features` calls."""
        transfers = [self.transfers[task]] if task in self.transfers else []
        return [*super().parts_of(task), *transfers]

    def logits(self, events: Sequence[str], bottom: Any) -> dict[str, Any]:
        """Computes the logit of each event; maps are averaged over positions where information is transferred."""
        logits: dict[str, Any] = {}
        z: Any = None
        for event in events:
            own = self.tower_of(event, bottom)
            check_channels(own, self.trunk, self.towers[event])
            z = self.transfers[event](averaged(z), averaged(own)) if logits else own
            logits[event] = self.head_of(event, z)
        return logits

    def penalty(self, task: str, features: Any) -> Tensor | None:
        """Computes the paper's calibrator, calibration · max(p_k − p_{k−1}, 0), of each sample: (N,).

        Returns:
            None for the first event, and if the factor is 0.
        """
        earlier = self.before(task)
        if not earlier or not self.calibration:
            return None
        later, before = (self.predict(name, features).sigmoid() for name in (task, earlier[-1]))
        excess: Tensor = self.calibration * (later - before).clamp(min=0)
        return excess if excess.ndim == 1 else excess.flatten(1).mean(1)
