"""The two-task toy problem of CAGrad, Nash-MTL and FAMO, and runs of balancers on the problem.

There are two losses of x ∈ R², one ten times as steep as the other. With c₁ = max(tanh(x₂/2), 0) and
c₂ = max(tanh(−x₂/2), 0), they are

    L₁ = 0.1 (c₁f₁ + c₂q₁)
    L₂ = c₁f₂ + c₂q₂
    f₁ = log max(|½(−x₁ − 7) − tanh(−x₂)|, 5e-6) + 6        q₁ = ((x₁ − 7)² + 0.1(x₂ + 8)²)/10 − 20
    f₂ = log max(|½(−x₁ + 3) + tanh(−x₂) + 2|, 5e-6) + 6    q₂ = ((x₁ + 7)² + 0.1(x₂ + 8)²)/10 − 20

Two narrow valleys lead from above down to the Pareto front near x₂ = −8.4.

Source: Liu et al., arXiv 2110.14048; with the factor 0.1, Navon et al., arXiv 2202.01017, and Liu et al., arXiv
2306.03792.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf

from mtl import balancers

CONFIGS = Path(__file__).parents[1] / "configs" / "balancer"
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
STEPS = 50_000
EPOCH = 1_000  # steps of an epoch, for balancers that count epochs
SCALE = 0.1
FLOOR = 5e-6
LOWEST = (-2.1, -21.0)  # lower bounds of the losses, those of FAMO's authors
SETTINGS: dict[str, dict[str, float]] = {"famo": {"weight_decay": 0.0}}  # as FAMO's authors set it for this problem

Pair = tuple[float, float]


def losses(x1: float, x2: float) -> Pair:
    """Returns both losses at a point."""
    upper, lower = max(math.tanh(x2 / 2), 0.0), max(math.tanh(-x2 / 2), 0.0)
    bend = math.tanh(-x2)
    f1 = math.log(max(abs((-x1 - 7) / 2 - bend), FLOOR)) + 6
    f2 = math.log(max(abs((-x1 + 3) / 2 + bend + 2), FLOOR)) + 6
    depth = 0.1 * (x2 + 8) ** 2
    q1 = ((x1 - 7) ** 2 + depth) / 10 - 20
    q2 = ((x1 + 7) ** 2 + depth) / 10 - 20
    return SCALE * (upper * f1 + lower * q1), upper * f2 + lower * q2


def gradients(x1: float, x2: float) -> tuple[Pair, Pair]:
    """Returns the gradient of each loss at a point.

    On the line x₂ = 0, where c₁ and c₂ have a kink, both slopes are used, as with `clamp` in the version of PyTorch for
    which the problem was written. With neither slope, a run that starts on the line would never leave it.
    """
    upper, lower = max(math.tanh(x2 / 2), 0.0), max(math.tanh(-x2 / 2), 0.0)
    bend = math.tanh(-x2)
    slope = (1 - math.tanh(x2 / 2) ** 2) / 2
    upper_slope, lower_slope = slope if x2 >= 0 else 0.0, -slope if x2 <= 0 else 0.0
    bend_slope = bend**2 - 1
    inner1, inner2 = (-x1 - 7) / 2 - bend, (-x1 + 3) / 2 + bend + 2
    f1, f2 = (math.log(max(abs(inner), FLOOR)) + 6 for inner in (inner1, inner2))
    rate1, rate2 = (1 / inner if abs(inner) >= FLOOR else 0.0 for inner in (inner1, inner2))
    depth = 0.1 * (x2 + 8) ** 2
    q1 = ((x1 - 7) ** 2 + depth) / 10 - 20
    q2 = ((x1 + 7) ** 2 + depth) / 10 - 20
    deepening = 0.02 * (x2 + 8)
    g1 = (
        SCALE * (upper * rate1 * -0.5 + lower * (x1 - 7) / 5),
        SCALE * (upper_slope * f1 - upper * rate1 * bend_slope + lower_slope * q1 + lower * deepening),
    )
    g2 = (
        upper * rate2 * -0.5 + lower * (x1 + 7) / 5,
        upper_slope * f2 + upper * rate2 * bend_slope + lower_slope * q2 + lower * deepening,
    )
    return g1, g2


def front(x1: float) -> float:
    """Returns the x₂ of the Pareto front at x₁ ∈ [−7, 7], where the gradients are opposite, to 1e-12.

    On the front, a convex combination of the losses is c₂(x₂)·Q with Q = (49 − x₁² + 0.1(x₂ + 8)²)/10 − 20, whose slope
    is zero.
    """
    low, high = -12.0, -6.0
    while high - low > 1e-12:
        x2 = (low + high) / 2
        level = (49 - x1**2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
        cover = math.tanh(-x2 / 2)
        rising = cover * 0.02 * (x2 + 8) - (1 - cover**2) / 2 * level > 0
        low, high = (low, x2) if rising else (x2, high)
    return (low + high) / 2


def reached(x1: float, x2: float, tolerance: float = 0.05) -> bool:
    """Returns whether a point is on the front."""
    return abs(x1) <= 7 + tolerance and abs(x2 - front(max(-7.0, min(x1, 7.0)))) <= tolerance


def methods() -> dict[str, Callable[[], balancers.Balancer]]:
    """Returns, by config, a function that creates the balancer; without TorchJD's, which would be UPGrad again."""
    makers: dict[str, Callable[[], balancers.Balancer]] = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        kind = getattr(balancers, node.pop("_target_").rsplit(".", 1)[1])
        if path.stem != "torchjd":
            arguments = {key: 0 if value == "${seed}" else value for key, value in node.items()}
            makers[path.stem] = partial(kind, **arguments | SETTINGS.get(path.stem, {}))
    return makers


class Asked:
    """Calls a balancer as a training step does, to compute directions.

    The balancer gets the losses minus `LOWEST`, since negative losses have no meaning for many methods.

    Args:
        balancer: The balancer.
    """

    def __init__(self, balancer: balancers.Balancer) -> None:
        self.balancer = balancer
        unknown = torch.full((2,), torch.nan, dtype=torch.float64)
        self.constant = balancer.weights(unknown, None).tolist() if balancer.needs == "nothing" else None

    def direction(self, at: Pair, g1: Pair, g2: Pair) -> Pair:
        """Returns the direction at a point with these losses and gradients."""
        if self.constant is not None:
            w1, w2 = self.constant
            return w1 * g1[0] + w2 * g2[0], w1 * g1[1] + w2 * g2[1]
        values = _above(at)
        if self.balancer.needs == "rows":
            rows = {"x": torch.tensor((g1, g2), dtype=torch.float64)}
            combined = self.balancer.combine(values, rows)[1]["x"].tolist()
            return combined[0], combined[1]
        gramian = None
        if self.balancer.needs == "gramian":
            product = g1[0] * g2[0] + g1[1] * g2[1]
            squares = g1[0] ** 2 + g1[1] ** 2, g2[0] ** 2 + g2[1] ** 2
            gramian = torch.tensor(((squares[0], product), (product, squares[1])), dtype=torch.float64)
        elif self.balancer.needs == "past":
            values = torch.full((2,), torch.nan, dtype=torch.float64)
        w1, w2 = self.balancer.weights(values, gramian).tolist()
        return w1 * g1[0] + w2 * g2[0], w1 * g1[1] + w2 * g2[1]

    def after(self, before: Pair, now: Pair | None) -> None:
        """Calls the balancer's `after` with the losses before and, if it needs the new losses, after the step."""
        if self.constant is None:
            self.balancer.after(_above(before), None if now is None else _above(now))


def _above(at: Pair) -> torch.Tensor:
    return torch.tensor((at[0] - LOWEST[0], at[1] - LOWEST[1]), dtype=torch.float64)


def run(
    balancer: balancers.Balancer, start: Pair, *, steps: int = STEPS, lr: float = 1e-3, every: int = 100
) -> NDArray[np.float64]:
    """Runs Adam, and returns the first point, the point after every `every` steps, and the last point, (N, 2)."""
    asked = Asked(balancer)
    x, mean, square = list(start), [0.0, 0.0], [0.0, 0.0]
    points = [start]
    for step in range(1, steps + 1):
        before = losses(*x)
        d = asked.direction(before, *gradients(*x))
        for i in range(2):
            mean[i] += 0.1 * (d[i] - mean[i])
            square[i] += 0.001 * (d[i] ** 2 - square[i])
            x[i] -= lr * (mean[i] / (1 - 0.9**step)) / (math.sqrt(square[i] / (1 - 0.999**step)) + 1e-8)
        asked.after(before, losses(*x) if balancer.needs_losses_after else None)
        if step % EPOCH == 0:
            balancer.epoch_end()
        if step % every == 0 or step == steps:
            points.append((x[0], x[1]))
    return np.array(points)
