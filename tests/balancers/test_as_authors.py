"""Training loops as authors of methods wrote them, in plain PyTorch, against the step with the options that are theirs.

The loops share no code with the package: parameters, gradients and updates are all here.
"""

from collections.abc import Callable

import pytest
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
        direction(loop, loop.losses(batch))
        optimizer.step()
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
