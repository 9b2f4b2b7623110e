"""A Gramian over all parameters, heads included, against autograd's rows, for all kinds of steps."""

import pytest
import torch
from conftest import ROOT, command
from torch import Tensor, nn

import mtl
from mtl.choices import PASSES

GRAMIAN = [
    *("AlignedMTL", "CAGrad", "ConflictFree", "DualProj", "FairGrad", "GradNorm", "GradVac", "IMTL", "IMTLG", "MGDA"),
    *("NashMTL", "PCGrad", "SDMGrad", "UPGrad"),
]
WITH_SCOPE = {"FairGrad", "GradNorm", "IMTLG", "MGDA", "NashMTL"}
WEIGHTS = [0.5, 2.0, -1.0]


class Spy(mtl.balancers.Balancer):
    """A balancer that records the Gramian."""

    needs = "gramian"
    scope = over = "all"
    gramian: Tensor

    def weights(self, losses, gramian):
        self.gramian = gramian.clone()
        return torch.tensor(WEIGHTS, dtype=torch.float64)[: len(losses)]


class Sparse(nn.Module):
    """A head with a separate embedding, whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3, sparse=True)
        self.linear = nn.Linear(8, 3)

    def forward(self, features: Tensor) -> Tensor:
        picked = (features.detach()[:, 0] * 3).long() % 7
        return self.linear(features) + self.table(picked)


def small(dtype: torch.dtype = torch.float64, weights: list[float] | None = None):
    torch.manual_seed(0)
    heads = [nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), Sparse()]
    tasks = [
        mtl.Task(f"t{i}", head=head, loss=nn.MSELoss(), target=f"y{i}", weight=(weights or [1.0] * 3)[i])
        for i, head in enumerate(heads)
    ]
    trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"]).to(dtype)
    generator = torch.Generator().manual_seed(1)
    batch = {"x": torch.randn(12, 6, generator=generator, dtype=dtype)}
    batch |= {f"y{i}": torch.randn(12, 3, generator=generator, dtype=dtype) for i in range(3)}
    return model, tasks, batch


def expected(model: nn.Module, tasks: list[mtl.Task], batch: dict[str, Tensor], own: list[float]) -> Tensor:
    """Returns the inner products of the tasks' whole gradients by autograd, with each loss times the task's weight."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for task, weight in zip(tasks, own, strict=True):
        loss = weight * task.loss(model.heads[task.name](model.trunk(batch["x"])), batch[task.target])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]
        rows.append(torch.cat([g.flatten() for g in dense]).double())
    matrix = torch.stack(rows)
    return matrix @ matrix.T


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize(
    "options", [{}, {"gradients": mtl.Gradients(source="rows")}, {"micro_batch_size": 5}, {"num_micro_batches": 2}]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_products_of_whole_gradients(kind: str, options: dict, frozen: bool) -> None:
    """With a head whose gradient is sparse, a frozen head, tasks' own weights, and micro-batches."""
    own = [1.0, 3.0, 0.5]
    model, tasks, batch = small(weights=own)
    if frozen:
        model.heads["t1"].requires_grad_(False)
    spy = Spy()
    result = mtl.Step(model, tasks, balancer=spy, passes=kind, **options).backward(batch)
    torch.testing.assert_close(spy.gramian, expected(model, tasks, batch, own), rtol=1e-10, atol=1e-14)
    weights = torch.stack(list(result.weights.values())).double()
    torch.testing.assert_close(weights, torch.tensor(WEIGHTS).double() * torch.tensor(own).double())
    for index, task in enumerate(tasks):  # and the weights multiply whole gradients
        loss = task.loss(model.heads[task.name](model.trunk(batch["x"])), batch[task.target])
        for p in [p for p in model.heads[task.name].parameters() if p.requires_grad]:
            (gradient,) = torch.autograd.grad(loss, [p], retain_graph=True)
            torch.testing.assert_close(p.grad.to_dense(), WEIGHTS[index] * own[index] * gradient.to_dense())


@pytest.mark.parametrize("kind", list(PASSES))
def test_a_step_without_one_of_the_tasks(kind: str) -> None:
    model, tasks, batch = small()
    tasks[0].missing = True
    batch["y0"] = torch.full_like(batch["y0"], torch.nan)
    spy = Spy()
    mtl.Step(model, tasks, balancer=spy, passes=kind).backward(batch)
    torch.testing.assert_close(spy.gramian, expected(model, tasks[1:], batch, [1.0, 1.0]), rtol=1e-10, atol=1e-14)
    assert all(p.grad is None for p in model.heads["t0"].parameters())


@pytest.mark.parametrize("kind", list(PASSES))
def test_the_scale_of_half_precision_is_not_in_it(kind: str) -> None:
    model, tasks, batch = small(torch.float32)
    spy = Spy()
    step = mtl.Step(model, tasks, balancer=spy, passes=kind, precision="fp16")
    step.backward(batch)
    assert step.scaler.get_scale() > 1000
    torch.testing.assert_close(spy.gramian, expected(model, tasks, batch, [1.0] * 3), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("kind", list(PASSES))
def test_a_head_that_overflows_is_named(kind: str) -> None:
    model, tasks, batch = small()
    model.heads["t0"].weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(mtl.UserError, match="t0.* its gradient is not finite"):
        mtl.Step(model, tasks, balancer=Spy(), passes=kind).backward(batch)


@pytest.mark.parametrize("name", GRAMIAN)
def test_every_balancer_from_the_gramian_has_it(name: str) -> None:
    """The weights are those for the Gramian over all parameters, and multiply all of them."""
    kind = getattr(mtl.balancers, name)
    options = {"scope": "all"} if name in WITH_SCOPE else {}
    model, tasks, batch = small()
    batch["y2"] = -5 * batch["y0"]  # with heads alike, so that these tasks conflict
    model.heads["t2"].linear.load_state_dict(model.heads["t0"].state_dict())
    result = mtl.Step(model, tasks, balancer=kind(over="all", **options)).backward(batch)
    products = expected(model, tasks, batch, [1.0] * 3)
    alone = kind(over="all", **options)
    alone.num_tasks = 3
    weights = alone.weights(torch.stack([loss.double() for loss in result.losses.values()]), products)
    torch.testing.assert_close(torch.stack(list(result.weights.values())).double(), weights, rtol=1e-6, atol=1e-9)
    loss = tasks[0].loss(model.heads["t0"](model.trunk(batch["x"])), batch["y0"])
    (gradient,) = torch.autograd.grad(loss, [model.heads["t0"].weight])
    torch.testing.assert_close(model.heads["t0"].weight.grad, weights[0] * gradient, rtol=1e-6, atol=1e-9)
    if name != "GradNorm":  # whose first weights are ones
        other, other_tasks, _ = small()
        other.load_state_dict(model.state_dict())
        shared = mtl.Step(other, other_tasks, balancer=kind()).backward(batch)
        assert not torch.allclose(torch.stack(list(shared.weights.values())).double(), weights, rtol=1e-3)


def test_what_does_not_go_together() -> None:
    for name in WITH_SCOPE:
        with pytest.raises(ValueError, match="set scope to all"):
            getattr(mtl.balancers, name)(over="all", scope="shared")
    for name in GRAMIAN:
        with pytest.raises(ValueError, match="over: 'heads' is not one of shared, all"):
            getattr(mtl.balancers, name)(over="heads")
    model, tasks, _ = small()
    with pytest.raises(mtl.UserError, match=r"gradients.source: 'representation'.*balancer.over=all.*layerwise, rows"):
        mtl.Step(
            model,
            tasks,
            balancer=mtl.balancers.PCGrad(over="all"),
            gradients=mtl.Gradients(source="representation"),
            passes="shared",
        )
    half = Spy()
    half.scope = "shared"
    with pytest.raises(mtl.UserError, match="balancer Spy: over is 'all'"):
        mtl.Step(model, tasks, balancer=half)


def test_every_config_that_has_it_says_so_and_no_other() -> None:
    for path in (ROOT / "configs/balancer").glob("*.yaml"):
        has = "\nover: shared " in path.read_text()
        assert has == any(f"mtl.balancers.{name}\n" in path.read_text() for name in GRAMIAN), path.name


def test_a_config_that_asks_for_half_of_it_is_refused(here) -> None:
    ended = command("train", "task=mnist_two_head", "balancer=mgda", "balancer.over=all")
    assert ended.code == 1
    assert "set scope to all" in ended.err
    assert "Traceback" not in ended.err
    print(ended.err)
