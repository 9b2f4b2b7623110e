"""Training loops as the authors of methods wrote them, in plain PyTorch, against `Step` with the same options.

The loops share no code with the package: parameters, gradients and updates are all here.
"""

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import mtl
from mtl.choices import PASSES

STEPS = 20


def regression(num_tasks: int = 3, seed: int = 0) -> tuple[nn.Module, list[nn.Module]]:
    """Returns a model with a trunk and heads, in float64."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh()).double()
    return trunk, [nn.Linear(8, 2).double() for _ in range(num_tasks)]


def data(num_tasks: int = 3, scale: float = 1.0) -> list[dict[str, Tensor]]:
    """Returns batches whose tasks differ in scale and conflict; `scale` multiplies all targets."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS):
        x = torch.randn(16, 6, dtype=torch.float64, generator=generator)
        batch = {"x": x}
        for index in range(num_tasks):
            noise = torch.randn(16, 2, dtype=torch.float64, generator=generator)
            batch[f"y{index}"] = (-1) ** index * (1 + index) * x[:, index : index + 2] + 0.3 * noise + index
            batch[f"y{index}"] *= scale
        found.append(batch)
    return found


def ours(
    balancer: mtl.balancers.Balancer,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    num_tasks: int = 3,
    scale: float = 1.0,
    **options,
) -> list[Tensor]:
    """Returns all parameters after the steps."""
    trunk, heads = regression(num_tasks)
    tasks = [
        mtl.Task(f"t{index}", head=head, loss=nn.MSELoss(), target=f"y{index}") for index, head in enumerate(heads)
    ]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    step = mtl.Step(model, tasks, make(list(model.parameters())), balancer=balancer, **options)
    for batch in data(num_tasks, scale):
        step(batch)
    return [p.detach() for p in (*trunk.parameters(), *(p for head in heads for p in head.parameters()))]


class Loop:
    """A network with gradients by hand.

    Attributes:
        shared: The parameters of the trunk.
        own: The parameters of each task's head.
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
        """Returns the tasks' gradients over the parameters, a row each, with zeros where a task doesn't reach."""
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
    scale: float = 1.0,
) -> list[Tensor]:
    """Returns the parameters after a loop in which `direction` writes the gradients into `.grad`."""
    loop = Loop(num_tasks)
    optimizer = make(loop.parameters)
    for batch in data(num_tasks, scale):
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
    """Checks that the parameters differ by far more than the tolerance of agreement."""
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
@pytest.mark.parametrize("options", [{}, {"gradients": mtl.Gradients(source="rows")}, {"num_micro_batches": 3}])
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
    """With targets so large that the gradient over the shared parameters is longer than 1."""
    theirs = by_hand(famo(1.0), sgd, scale=5.0)
    agree(
        ours(mtl.balancers.FAMO(), sgd, scale=5.0, passes=kind, update=mtl.Update(clip_shared_norm=1.0), **cut), theirs
    )
    differ(ours(mtl.balancers.FAMO(), sgd, scale=5.0, update=mtl.Update(clip_norm=1.0)), theirs)
    differ(ours(mtl.balancers.FAMO(), sgd, scale=5.0), theirs)


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
    agree(ours(mtl.balancers.FairGrad(alpha=alpha), sgd, update=mtl.Update(clip_shared_norm=limit)), theirs, 1e-6)
    differ(ours(mtl.balancers.FairGrad(alpha=alpha), sgd, update=mtl.Update(clip_norm=limit)), theirs)


def nash(loop: Loop, losses: list[Tensor]) -> None:
    """Nash-MTL: α multiplies the losses, so heads too; the shared gradient alone is clipped at 1."""
    alpha = fair(1.0, loop.rows(losses, loop.shared))
    (torch.stack(losses) * alpha).sum().backward()
    clipped(loop.shared, 1.0)


def test_nash_mtl_with_heads_that_get_the_whole_alpha() -> None:
    theirs = by_hand(nash, sgd)
    agree(
        ours(mtl.balancers.NashMTL(max_norm=None, scope="all"), sgd, update=mtl.Update(clip_shared_norm=1.0)),
        theirs,
        1e-7,
    )
    differ(ours(mtl.balancers.NashMTL(scope="all"), sgd), theirs)


def staged(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[..., list]:
    """An optimizer with a schedule that halves the learning rate in each seventh step."""

    def build(parameters: list[nn.Parameter]) -> list:
        optimizer = make(parameters)
        return [optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.5)]

    return build


def learned_by_hand(
    objective: Callable[[Tensor, Tensor], Tensor], start: float, direction: Callable | None = None
) -> tuple[list[Tensor], Tensor]:
    """A loop whose losses have learned numbers in them, in the model's Adam with its schedule."""
    loop = Loop()
    numbers = nn.Parameter(torch.full((3,), start, dtype=torch.float64))
    optimizer, scheduler = staged(adam)([*loop.parameters, numbers])
    for batch in data():
        optimizer.zero_grad()
        scaled = objective(torch.stack(loop.losses(batch)), numbers)
        scaled.sum().backward(retain_graph=True)
        if direction is not None:
            rows = loop.rows(list(scaled), loop.shared)
            loop.put(loop.shared, direction(rows) @ rows)
        optimizer.step()
        scheduler.step()
    return [p.detach() for p in loop.parameters], numbers.detach()


def learned_by_step(
    balancer: mtl.balancers.Balancer, stop: int | None = None, make: Callable = adam, **options
) -> tuple[list[Tensor], Tensor]:
    """The same by the step, which after `stop` steps goes on in new objects from a file."""

    def build(balancer: mtl.balancers.Balancer) -> mtl.Step:
        trunk, heads = regression()
        tasks = [mtl.Task(f"t{i}", head=head, loss=nn.MSELoss(), target=f"y{i}") for i, head in enumerate(heads)]
        model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
        learned = balancer.parameters(3, dtype=torch.float64)
        optimizer, scheduler = staged(make)([*model.parameters(), *learned])
        return mtl.Step(model, tasks, optimizer, update=mtl.Update(scheduler=scheduler), balancer=balancer, **options)

    fresh = copy.deepcopy(balancer)
    step = build(balancer)
    for number, batch in enumerate(data()):
        if number == stop:
            file = io.BytesIO()
            torch.save({"step": step.state_dict(), "model": step.model.state_dict()}, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            step = build(fresh)
            step.model.load_state_dict(state["model"])
            step.load_state_dict(state["step"])
        step(batch)
    model = step.model
    parameters = [*model.trunk.parameters(), *(p for head in model.heads.values() for p in head.parameters())]
    balancer = step.balancing.balancer
    return [p.detach() for p in parameters], torch.stack([p.detach() for p in balancer.parameters(3)])


def uncertainty(losses: Tensor, s: Tensor) -> Tensor:
    return losses / (2 * s.exp()) + s / 2


def impartial(losses: Tensor, s: Tensor) -> Tensor:
    return s.exp() * losses - s


def equal_projections(rows: Tensor) -> Tensor:
    """The α of IMTL-G by its published closed form, where its two guards have nothing to do."""
    units = rows / rows.norm(dim=1, keepdim=True)
    d, u = rows[:1] - rows[1:], units[:1] - units[1:]
    rest = rows[0] @ u.T @ torch.linalg.inv(d @ u.T)
    alpha = torch.cat([1 - rest.sum().unsqueeze(0), rest])
    direction = alpha @ rows
    assert (units @ direction).min() > 0
    assert direction.norm() <= rows.norm(dim=1).max()
    return alpha


LEARNED = {
    "uw": (lambda: mtl.balancers.UW(init=-0.5, optimizer="model"), uncertainty, -0.5, None),
    "imtl_l": (lambda: mtl.balancers.IMTLL(optimizer="model"), impartial, 0.0, None),
    "imtl": (lambda: mtl.balancers.IMTL(optimizer="model"), impartial, 0.0, equal_projections),
}


@pytest.mark.parametrize("name", list(LEARNED))
@pytest.mark.parametrize("kind", list(PASSES))
def test_learned_by_the_models_optimizer(name: str, kind: str) -> None:
    """As in MTAN, −0.5 at first for uncertainties, Adam with a schedule of steps; and as in LibMTL."""
    make, objective, start, direction = LEARNED[name]
    theirs, numbers = learned_by_hand(objective, start, direction)
    mine, learned = learned_by_step(make(), passes=kind)
    agree([*mine, learned], [*theirs, numbers])
    assert (learned - start).abs().max() > 0.05


@pytest.mark.parametrize("name", [*LEARNED, "gradnorm"])
def test_goes_on_bit_by_bit(name: str) -> None:
    make = LEARNED[name][0] if name in LEARNED else lambda: mtl.balancers.GradNorm(optimizer="model")
    whole, halves = learned_by_step(make()), learned_by_step(make(), stop=9)
    assert all(torch.equal(a, b) for a, b in zip([*whole[0], whole[1]], [*halves[0], halves[1]], strict=True))


@pytest.mark.parametrize("make", [sgd, adam])
def test_gradnorm_by_the_models_optimizer(make: Callable) -> None:
    """As in its docstring: the sign of ‖w g‖ − target, over the mean norm, moves w; then its sum is T again."""
    loop, weights, first = Loop(), nn.Parameter(torch.ones(3, dtype=torch.float64)), None
    optimizer, scheduler = staged(make)([*loop.parameters, weights])
    for batch in data():
        optimizer.zero_grad()
        losses = torch.stack(loop.losses(batch))
        (weights.detach() * losses).sum().backward(retain_graph=True)
        norms = weights * loop.rows(list(losses), loop.shared).norm(dim=1)
        first = losses.detach() if first is None else first
        rates = losses.detach() / first
        target = (norms.mean() * (rates / rates.mean()) ** 1.5).detach()
        (weights.grad,) = torch.autograd.grad((norms - target).abs().sum() / norms.mean().detach(), weights)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            weights *= 3 / weights.sum()
    mine, learned = learned_by_step(mtl.balancers.GradNorm(optimizer="model"), make=make)
    agree([*mine, learned], [*(p.detach() for p in loop.parameters), weights.detach()])


@pytest.mark.parametrize("normalise", ["none", "l2", "loss", "loss+"])
@pytest.mark.parametrize("combine", ["normalised", "raw"])
def test_mgda_normalises_as_its_authors_or_divides(normalise: str, combine: str) -> None:
    """Two tasks, for which the shortest combination has a closed form."""

    def direction(loop: Loop, losses: list[Tensor]) -> None:
        rows = loop.rows(losses, loop.shared)
        norms, values = rows.norm(dim=1), torch.stack(losses).detach()
        divisor = {"none": torch.ones_like(norms), "l2": norms, "loss": values, "loss+": norms * values}[normalise]
        a, b = rows / divisor.unsqueeze(1)
        share = (((b - a) @ b) / (b - a).square().sum()).clamp(0, 1)
        weights = torch.stack([share, 1 - share]) / (1 if combine == "raw" else divisor)
        (torch.stack(losses) * weights).sum().backward()

    theirs = by_hand(direction, sgd, 2)
    agree(ours(mtl.balancers.MGDA(normalise=normalise, combine=combine, scope="all"), sgd, 2), theirs)
    other = "raw" if combine == "normalised" else "normalised"
    if normalise != "none":
        differ(ours(mtl.balancers.MGDA(normalise=normalise, combine=other, scope="all"), sgd, 2), theirs)
