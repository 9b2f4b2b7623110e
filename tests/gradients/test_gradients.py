"""Measured norms, cosines and reach, against torch.autograd.grad and against rows worked out by hand."""

import pytest
import torch
from conftest import batches, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtl
from mtl.balancers._math.gramian import COLUMNS, gramian
from mtl.choices import PASSES
from mtl.gradients.leaves import leaves


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 3.0, 0.0]])
@pytest.mark.parametrize("kind", list(PASSES))
def test_norms_cosines_and_total_are_exact(kind: str, weights: list[float]) -> None:
    model, tasks = problem(weights=weights)
    (batch,) = batches(1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    features = model.trunk(batch["x"])
    losses = [nn.functional.cross_entropy(model.heads[t.name](features), batch[t.target]) for t in tasks]
    shared = list(model.trunk.parameters())
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]) for loss in losses]
    norms = []
    total = {p: torch.zeros_like(p) for p in model.parameters()}
    for task, loss, weight in zip(tasks, losses, weights, strict=True):
        own = [*shared, *model.heads[task.name].parameters()]
        gradients = torch.autograd.grad(loss, own, retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
        for parameter, gradient in zip(own, gradients, strict=True):
            total[parameter] += weight * gradient

    model.load_state_dict(start)
    torch.manual_seed(3)
    result = mtl.Step(model, tasks, passes=kind).backward(batch, measure=True)
    for task, norm in zip(tasks, norms, strict=True):
        torch.testing.assert_close(result.grad_norms[task.name], norm, rtol=1e-11, atol=0)
    assert set(result.cosines) == {("t0", "t1"), ("t0", "t2"), ("t1", "t2")}
    for (a, b), cosine in result.cosines.items():
        expected = nn.functional.cosine_similarity(rows[int(a[1])], rows[int(b[1])], dim=0)
        torch.testing.assert_close(cosine, expected, rtol=1e-10, atol=1e-13)
    expected_total = torch.cat([g.flatten() for g in total.values()]).norm()
    torch.testing.assert_close(result.total_norm, expected_total, rtol=1e-11, atol=0)
    assert {name: w.item() for name, w in result.weights.items()} == dict(zip(result.losses, weights, strict=True))


def test_what_was_not_measured_is_none() -> None:
    model, tasks = problem()
    result = mtl.Step(model, tasks).backward(batches(1)[0])
    assert (result.grad_norms, result.cosines, result.total_norm, result.reach) == (None,) * 4
    assert all(loss.ndim == 0 and not loss.requires_grad for loss in result.losses.values())


class Gated(nn.Module):
    """A model with parameters for both tasks, for each, and for none, and one tied into the first task's head."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.left, self.right, self.unused = (nn.Parameter(torch.ones(2)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x * self.both
        return x * self.left, x * self.right


class Pick(nn.Module):
    def __init__(self, index: int, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.index, self.linear = index, nn.Linear(2, 1)
        self.tied = tied

    def forward(self, features: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = features[self.index]
        return self.linear(x if self.tied is None else x * self.tied)


@pytest.mark.parametrize("kind", list(PASSES))
def test_reach_with_branches_unused_frozen_and_tied_parameters(kind: str) -> None:
    torch.manual_seed(0)
    trunk = Gated()
    tasks = [
        mtl.Task("a", head=Pick(0, tied=trunk.both), loss=nn.MSELoss(), target="y"),
        mtl.Task("b", head=Pick(1), loss=nn.MSELoss(), target="y"),
    ]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    model.freeze(["heads.b.linear.bias"])
    batch = {"x": torch.randn(5, 2), "y": torch.randn(5, 1)}
    result = mtl.Step(model, tasks, passes=kind).backward(batch, measure=True)
    assert result.reach == {
        "trunk.both": ("a", "b"),
        "trunk.left": ("a",),
        "trunk.right": ("b",),
        "trunk.unused": (),
        "heads.a.linear.weight": ("a",),
        "heads.a.linear.bias": ("a",),
        "heads.b.linear.weight": ("b",),
        "heads.b.linear.bias": (),
    }
    losses = [nn.functional.mse_loss(p, batch["y"]) for p in model(batch).values()]
    rows = [torch.autograd.grad(loss, trunk.both, retain_graph=True)[0] for loss in losses]
    expected = nn.functional.cosine_similarity(*rows, dim=0).double()  # the tied parameter's two parts added up
    torch.testing.assert_close(result.cosines["a", "b"], expected, rtol=1e-5, atol=1e-6)


def test_zero_gradient_has_no_cosine() -> None:
    tasks = [
        mtl.Task(n, head=nn.Linear(3, 1), loss=loss, target="y")
        for n, loss in (("a", nn.MSELoss()), ("b", lambda p, y: 0 * p.sum()))
    ]
    model = mtl.MultiTaskModel(nn.Linear(2, 3), tasks, inputs=["x"])
    result = mtl.Step(model, tasks).backward({"x": torch.randn(4, 2), "y": torch.randn(4, 1)}, measure=True)
    assert result.cosines["a", "b"].isnan()
    assert result.grad_norms["b"] == 0


def test_sparse_embeddings_are_measured() -> None:
    norms = []
    for sparse in (False, True):
        torch.manual_seed(0)
        trunk = nn.Embedding(10, 3, sparse=sparse)
        tasks = [mtl.Task(n, head=nn.Linear(3, 1), loss=nn.MSELoss(), target="y") for n in "ab"]
        model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))
        result = step({"x": torch.tensor([1, 1, 4]), "y": torch.randn(3, 1)}, measure=True)
        norms.append([*result.grad_norms.values(), *result.cosines.values(), result.total_norm.double()])
    torch.testing.assert_close(torch.stack(norms[1]), torch.stack(norms[0]), rtol=1e-6, atol=1e-7)


def test_reentrant_checkpointing_is_an_error() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(mtl.UserError, match="use_reentrant=False"):
        leaves([checkpoint(layer, x, use_reentrant=True).sum()])
    assert set(leaves([checkpoint(layer, x, use_reentrant=False).sum()])) >= {x}


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    num_tasks=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
)
def test_gramian_of_pieces_is_the_product_of_whole_rows(
    sizes: list[int], num_tasks: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randn(n, generator=generator, dtype=torch.float64) * scale for n in sizes] for _ in range(num_tasks)]
    absent = [
        [piece if (i + j + seed) % 3 or i == 0 else None for j, piece in enumerate(row)] for i, row in enumerate(rows)
    ]
    whole = torch.stack(
        [
            torch.cat(
                [torch.zeros(n, dtype=torch.float64) if p is None else p for p, n in zip(row, sizes, strict=True)]
            )
            for row in absent
        ]
    )
    torch.testing.assert_close(gramian(zip(*absent, strict=True)), whole @ whole.T, rtol=1e-12, atol=1e-12 * scale**2)


def test_gramian_of_long_float32_rows_is_summed_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(40 * COLUMNS + 17, generator=generator) for _ in range(2)]
    whole = torch.stack(rows).double()
    torch.testing.assert_close(gramian([rows]), whole @ whole.T, rtol=1e-12, atol=0)
