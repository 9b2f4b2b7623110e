"""Training loops as authors of methods wrote them, in plain PyTorch, against the step with the options that are theirs.

The loops share no code with the package: parameters, gradients and updates are all here.
"""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import mtl
from mtl.passes import PASSES

STEPS = 20


def regression(num_tasks: int = 3, seed: int = 0) -> tuple[nn.Module, list[nn.Module]]:
    """A trunk and heads, float64."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh()).double()
    return trunk, [nn.Linear(8, 2).double() for _ in range(num_tasks)]


def data(num_tasks: int = 3, count: int = STEPS) -> list[dict[str, Tensor]]:
    """Batches whose tasks differ in scale, and conflict."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        x = torch.randn(16, 6, dtype=torch.float64, generator=generator)
        batch = {"x": x}
        for index in range(num_tasks):
            noise = torch.randn(16, 2, dtype=torch.float64, generator=generator)
            batch[f"y{index}"] = (-1) ** index * (1 + index) * x[:, index : index + 2] + 0.3 * noise + index
        found.append(batch)
    return found


def ours(
    balancer: mtl.balancers.Balancer,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    num_tasks: int = 3,
    stepping: dict | None = None,
    **options,
) -> list[Tensor]:
    """All parameters after the steps."""
    trunk, heads = regression(num_tasks)
    tasks = [
        mtl.Task(f"t{index}", head=head, loss=nn.MSELoss(), target=f"y{index}") for index, head in enumerate(heads)
    ]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    step = mtl.Step(model, tasks, make(list(model.parameters())), balancer=balancer, **options)
    for batch in data(num_tasks):
        step(batch)
    return [p.detach() for p in (*trunk.parameters(), *(p for head in heads for p in head.parameters()))]


class Loop:
    """A network with its gradients by hand.

    Attributes:
        shared: the trunk's parameters.
        own: by task, its head's.
    """

    def __init__(self, num_tasks: int = 3) -> None:
        self.trunk, self.heads = regression(num_tasks)
        self.shared = list(self.trunk.parameters())
        self.own = [list(head.parameters()) for head in self.heads]
        self.parameters = self.shared + [p for own in self.own for p in own]

    def losses(self, batch: dict[str, Tensor]) -> list[Tensor]:
        features = self.trunk(batch["x"])
        return [(head(features) - batch[f"y{index}"]).square().mean() for index, head in enumerate(self.heads)]

    def rows(self, losses: list[Tensor], parameters: list[Tensor]) -> Tensor:
        """The tasks' gradients over the parameters, a row each, zeros where a task doesn't reach."""
        rows = []
        for loss in losses:
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(parameters, found, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]))
        return torch.stack(rows)

    def put(self, parameters: list[Tensor], flat: Tensor) -> None:
        """Writes a vector into `.grad`."""
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = piece.view_as(p).clone()


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def by_hand(
    direction: Callable[[Loop, list[Tensor]], None],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    num_tasks: int = 3,
) -> list[Tensor]:
    """The parameters after the steps of a loop whose gradients `direction` puts into `.grad`."""
    loop = Loop(num_tasks)
    optimizer = make(loop.parameters)
    for batch in data(num_tasks):
        optimizer.zero_grad()
        losses = loop.losses(batch)
        direction(loop, losses)
        optimizer.step()
        if hasattr(direction, "after"):
            direction.after(loop, losses, batch)
    return [p.detach() for p in loop.parameters]


def agree(mine: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def differ(mine: list[Tensor], theirs: list[Tensor]) -> None:
    """By far more than what agreement allows."""
    assert max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True)) > 1e-4


def pcgrad(of: Callable[[Loop], list[Tensor]], seed: int = 7) -> Callable[[Loop, list[Tensor]], None]:
    """Gradient surgery on vectors over the parameters that `of` gives, the others with the plain sum."""
    order = torch.Generator().manual_seed(seed)

    def direction(loop: Loop, losses: list[Tensor]) -> None:
        sum(losses).backward(retain_graph=True)
        grads = loop.rows(losses, of(loop))
        surgery = grads.clone()
        for i in range(len(grads)):
            for j in torch.randperm(len(grads), generator=order).tolist():
                product = surgery[i] @ grads[j]
                if j != i and product < 0:
                    surgery[i] -= product / grads[j].square().sum() * grads[j]
        loop.put(of(loop), surgery.sum(0))

    return direction


def config(of: Callable[[Loop], list[Tensor]]) -> Callable[[Loop, list[Tensor]], None]:
    """ConFIG on vectors over the parameters that `of` gives, the others with the plain sum."""

    def direction(loop: Loop, losses: list[Tensor]) -> None:
        sum(losses).backward(retain_graph=True)
        grads = loop.rows(losses, of(loop))
        units = grads / grads.norm(dim=1, keepdim=True)
        best = torch.linalg.pinv(units) @ torch.ones(len(grads), dtype=grads.dtype)
        best = best / best.norm()
        loop.put(of(loop), (grads @ best).sum() * best)

    return direction


SURGERIES = {
    "pcgrad": (lambda over: mtl.balancers.PCGrad(seed=7, over=over), pcgrad),
    "conflict_free": (lambda over: mtl.balancers.ConflictFree(over=over), config),
}


@pytest.mark.parametrize("name", list(SURGERIES))
@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("options", [{}, {"source": "rows"}, {"num_micro_batches": 3}])
def test_over_all_parameters(name: str, kind: str, options: dict) -> None:
    make, reference = SURGERIES[name]
    theirs = by_hand(reference(lambda loop: loop.parameters), sgd)
    agree(ours(make("all"), sgd, passes=kind, **options), theirs)


@pytest.mark.parametrize("name", list(SURGERIES))
def test_over_the_shared_parameters(name: str) -> None:
    make, reference = SURGERIES[name]
    theirs = by_hand(reference(lambda loop: loop.shared), sgd)
    agree(ours(make("shared"), sgd), theirs)
    differ(ours(make("all"), sgd), theirs)


def clipped(shared: list[Tensor], limit: float) -> None:
    """Shortens the gradient over these parameters to the limit, as `torch.nn.utils.clip_grad_norm_` does."""
    norm = torch.stack([p.grad.square().sum() for p in shared]).sum().sqrt()
    for p in shared:
        p.grad *= (limit / (norm + 1e-6)).clamp(max=1.0)


def famo(limit: float) -> Callable[[Loop, list[Tensor]], None]:
    """FAMO with the gradient over the shared parameters clipped, its logits by torch's Adam."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.025, weight_decay=1e-3)

    def direction(loop: Loop, losses: list[Tensor]) -> None:
        together = torch.stack(losses)
        z = logits.detach().softmax(0)
        (together.log() * z / (z / together).sum().detach()).sum().backward()
        clipped(loop.shared, limit)

    def after(loop: Loop, losses: list[Tensor], batch: dict[str, Tensor]) -> None:
        with torch.no_grad():
            change = torch.stack(losses).log() - torch.stack(loop.losses(batch)).log()
        (logits.grad,) = torch.autograd.grad(logits.softmax(0), logits, change)
        optimizer.step()

    direction.after = after
    return direction


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("cut", [{}, {"micro_batch_size": 5}])
def test_famo_with_the_shared_gradient_clipped(kind: str, cut: dict) -> None:
    theirs = by_hand(famo(0.2), sgd)  # short enough to clip each of the steps
    agree(ours(mtl.balancers.FAMO(), sgd, passes=kind, clip_shared_norm=0.2, **cut), theirs)
    differ(ours(mtl.balancers.FAMO(), sgd, clip_norm=0.2), theirs)
    differ(ours(mtl.balancers.FAMO(), sgd), theirs)


def fair(alpha: float, rows: Tensor) -> Tensor:
    """The w > 0 with GGᵀw = w^(−1/α), by Newton's method on log w from scipy's answer."""
    products = (rows @ rows.T).numpy()
    scale = 1 / np.sqrt(products.diagonal())

    def residual(z: np.ndarray) -> np.ndarray:
        w = scale * np.exp(z)
        return scale * (products @ w) - scale * w ** (-1 / alpha)

    found = scipy.optimize.root(residual, np.zeros(len(products)), method="hybr", tol=1e-15)
    assert np.abs(residual(found.x)).max() < 1e-9
    return torch.from_numpy(scale * np.exp(found.x))


def fairgrad(alpha: float, limit: float) -> Callable[[Loop, list[Tensor]], None]:
    """FairGrad: T times the fair combination over the shared parameters, clipped; heads go down their own losses."""

    def direction(loop: Loop, losses: list[Tensor]) -> None:
        sum(losses).backward(retain_graph=True)
        rows = loop.rows(losses, loop.shared)
        loop.put(loop.shared, 3 * fair(alpha, rows) @ rows)
        clipped(loop.shared, limit)

    return direction


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_fairgrad_with_the_shared_gradient_clipped(alpha: float, limit: float) -> None:
    """T times as long doesn't matter to a gradient that is longer than the limit."""
    theirs = by_hand(fairgrad(alpha, limit), sgd)
    agree(ours(mtl.balancers.FairGrad(alpha=alpha), sgd, clip_shared_norm=limit), theirs, 1e-6)
    differ(ours(mtl.balancers.FairGrad(alpha=alpha), sgd, clip_norm=limit), theirs)


def nash(loop: Loop, losses: list[Tensor]) -> None:
    """Nash-MTL: α multiplies the losses, so heads too; the shared gradient alone is clipped at 1."""
    alpha = fair(1.0, loop.rows(losses, loop.shared))
    (torch.stack(losses) * alpha).sum().backward()
    clipped(loop.shared, 1.0)


def test_nash_mtl_with_heads_that_get_the_whole_alpha() -> None:
    theirs = by_hand(nash, sgd)
    agree(ours(mtl.balancers.NashMTL(max_norm=None, scope="all"), sgd, clip_shared_norm=1.0), theirs, 1e-7)
    differ(ours(mtl.balancers.NashMTL(scope="all"), sgd), theirs)
