"""DSelect-k: a mixture of experts in which each task selects at most k experts."""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.architectures.experts import ExpertModel, check_number, flat
from mtl.errors import UserError
from mtl.task import Task

_TINY = 1e-6  # keeps the logarithm of a weight of zero finite


class DSelectK(ExpertModel):
    """Experts that all tasks share, of which each task's gate selects at most k.

    The gate is Σ_{i≤k} softmax(α)_i r(z_i). Each selector r(z) has a weight for each expert: the product, over the bits
    of the expert's number, of S(z_b) where the bit is 1, and of 1 − S(z_b) where it is 0. The smooth-step function S(t)
    is 0 for t ≤ −γ/2, 1 for t ≥ γ/2, and −2t³/γ³ + 3t/(2γ) + 1/2 between them. Where all S(z_b) are 0 or 1, a selector
    selects one expert. α and z are parameters, or linear functions of the input of the experts.

    In training, the entropy −Σ_j r_j log r_j of each selector, times `entropy`, is added to the task's loss, so that
    the selectors converge to single experts; see `penalty`.

    If the number n of experts isn't a power of two, the numbers c ≥ n stand for the experts c − n, so that the weights
    always sum to one. In the paper, they stand for no expert, and a penalty keeps the weights away from them.

    Args:
        trunk, tasks, inputs, shared_stages: See `mtl.architectures.experts.ExpertModel`, also for the errors raised.
        experts: The number of experts, at least 2.
        k: The largest number of experts that a task selects.
        gamma: The width γ of the smooth-step function.
        entropy: The factor of the entropy.
        per_sample: Whether the gates depend on the sample, by linear functions; otherwise they depend on the task only.

    Raises:
        UserError: If a number isn't valid.

    Source: Hazimeh et al., "DSelect-k: differentiable selection in the mixture of experts with applications to
    multi-task learning", NeurIPS 2021, arXiv 2106.03760.
    """

    def __init__(
        self,
        trunk: Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        experts: int = 4,
        k: int = 2,
        gamma: float = 1.0,
        entropy: float = 0.01,
        per_sample: bool = False,
        shared_stages: int | None = None,
    ) -> None:
        check_number("experts", experts, 2)
        check_number("k", k, 1)
        if k > experts:
            raise UserError(f"model.k is {k}; it must be at most model.experts, {experts}")
        if not gamma > 0 or not entropy >= 0:
            raise UserError(f"model.gamma is {gamma} and model.entropy {entropy}; they must be > 0 and ≥ 0")
        super().__init__(
            trunk,
            tasks,
            inputs=inputs,
            shared_experts=experts,
            shared_stages=shared_stages,
            gate=partial(SampleGate if per_sample else StaticGate, k=k, gamma=gamma),
        )
        self.entropy = entropy

    def penalty(self, task: str, features: Any) -> Tensor | None:
        """Returns the entropy of the task's selectors, summed over the selectors, times its factor."""
        if not self.entropy:
            return None
        x, shared = features
        r, _ = self.branches[task].selectors(x)  # type: ignore[operator]
        value: Tensor = -self.entropy * (r * (r + _TINY).log()).sum((-2, -1))
        return value.expand(len(shared))


class StaticGate(nn.Module):
    """A gate whose weights depend on the task only.

    Args:
        experts: The number of experts.
        k: The number of selectors.
        gamma: The width of the smooth-step function.
    """

    def __init__(self, experts: int, *, k: int, gamma: float) -> None:
        super().__init__()
        self.experts, self.k, self.gamma = experts, k, gamma
        self.bits = math.ceil(math.log2(experts))
        self._make()

    def _make(self) -> None:
        # The bounds of the initial values are those of the authors' code.
        self.z = nn.Parameter(torch.empty(self.k, self.bits).uniform_(-self.gamma / 100, self.gamma / 100))
        self.alpha = nn.Parameter(torch.empty(self.k).uniform_(-0.05, 0.05))

    def _logits(self, x: Any) -> tuple[Tensor, Tensor]:
        return self.z, self.alpha

    def forward(self, x: Any) -> Tensor:
        """Returns the weights of the experts, (experts,), or (N, experts) if they depend on the sample."""
        r, alpha = self.selectors(x)
        return (torch.softmax(alpha, -1).unsqueeze(-1) * r).sum(-2)

    def selectors(self, x: Any) -> tuple[Tensor, Tensor]:
        """Returns the weights (…, k, experts) of each selector, which sum to one, and α (…, k)."""
        z, alpha = self._logits(x)
        if z.dtype in (torch.float16, torch.bfloat16):
            z, alpha = z.float(), alpha.float()
        step = smooth_step(z, self.gamma).unsqueeze(-2)  # (…, k, 1, bits)
        numbers = torch.arange(2**self.bits, device=z.device)
        ones = (numbers.unsqueeze(-1) >> torch.arange(self.bits, device=z.device)) & 1 == 1  # (numbers, bits)
        r = reduce(torch.mul, torch.where(ones, step, 1 - step).unbind(-1))
        if more := 2**self.bits - self.experts:
            r = r[..., : self.experts] + F.pad(r[..., self.experts :], (0, self.experts - more))
        return r, alpha


class SampleGate(StaticGate):
    """A gate whose weights depend on the sample: α and z are linear functions of the flattened input of the experts."""

    def _make(self) -> None:
        self.linear_z = _Uniform(self.k * self.bits, self.gamma / 100)
        self.linear_alpha = _Uniform(self.k, 0.05)

    def _logits(self, x: Any) -> tuple[Tensor, Tensor]:
        x = flat(x, self.linear_z)
        return self.linear_z(x).unflatten(1, (self.k, self.bits)), self.linear_alpha(x)


class _Uniform(nn.LazyLinear):
    """A linear map whose initial values are uniform between −bound and bound."""

    def __init__(self, out_features: int, bound: float) -> None:
        self.bound = bound
        super().__init__(out_features)

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params() and self.in_features:
            for parameter in (self.weight, self.bias):
                nn.init.uniform_(parameter, -self.bound, self.bound)


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """Returns the smooth-step function, which rises from 0 at −γ/2 to 1 at γ/2, and is constant outside."""
    t = t.clamp(-gamma / 2, gamma / 2)
    return -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
