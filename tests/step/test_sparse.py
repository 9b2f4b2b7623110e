"""Sparse gradients of embeddings: they train like dense ones, and a step's cost depends on the batch only."""

from collections.abc import Callable

import pytest
import torch
from conftest import command
from test_features import Recorder
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtl
from mtl.balancers._math.gramian import gramian

ROW = 1_000_000 * 16 * 4  # bytes of the whole table, and of a task's dense gradient for it
PASSES = ["joint", "sequential", "shared"]


class Tables(nn.Module):
    """Two embeddings that are added up, one of them used twice, with padding, and a layer."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(30, 4, padding_idx=0, sparse=sparse), nn.Embedding(20, 4, sparse=sparse)
        self.bags = nn.EmbeddingBag(20, 4, mode="sum", sparse=sparse)
        self.layer = nn.Linear(4, 6)

    def forward(self, user: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        looked_up = self.users(user) + self.users(user.flip(1)) + self.items(items)
        return torch.tanh(self.layer(looked_up.mean(1) + self.bags(items)))


class Own(nn.Module):
    """A head with a separate embedding in addition to the features."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.bias, self.layer = nn.EmbeddingBag(7, 3, sparse=sparse), nn.Linear(6, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layer(features) + self.bias((features[:, :2].detach() * 3.5 + 3.5).long())


def trained(sparse: bool, balancer: str, passes: str, **options: object) -> torch.Tensor:
    """Returns all parameters after five steps of SGD on three tasks, in float64."""
    torch.manual_seed(0)
    heads = [Own(sparse=sparse), nn.Linear(6, 3), nn.Linear(6, 3)]
    loss = nn.CrossEntropyLoss()
    tasks = [mtl.Task(f"t{i}", head=head, loss=loss, target=f"y{i}") for i, head in enumerate(heads)]
    model = mtl.MultiTaskModel(Tables(sparse=sparse), tasks, inputs=["user", "items"]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)(), passes=passes, **options)
    generator = torch.Generator().manual_seed(1)
    for number in range(5):
        batch = {"user": torch.randint(0, 30, (8, 3), generator=generator)}
        batch["items"] = torch.randint(0, 20, (8, 3), generator=generator)
        batch |= {f"y{i}": torch.randint(0, 3, (8,), generator=generator) for i in range(3)}
        step(batch, measure=number % 2 == 0)
        assert model.trunk.users.weight.grad.is_sparse == sparse
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("balancer", ["Equal", "UW", "MGDA", "UPGrad", "PCGrad", "NashMTL"])
def test_sparse_and_dense_embeddings_come_to_the_same_parameters(balancer: str, passes: str, size: int | None) -> None:
    dense, sparse = (trained(each, balancer, passes, micro_batch_size=size) for each in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("source", ["rows", "layerwise", "representation"])
def test_every_source_of_the_gramian(source: str) -> None:
    dense, sparse = (
        trained(each, "UPGrad", "shared", gradients=mtl.Gradients(source=source, every=2)) for each in (False, True)
    )
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("balancer", ["Equal", "UPGrad"])
@pytest.mark.parametrize("passes", PASSES)
def test_clipping_and_skipping_look_at_sparse_gradients_too(passes: str, balancer: str) -> None:
    options = {"update": mtl.Update(clip_norm=0.05), "on_nonfinite": "skip_task"}
    dense, sparse = (trained(each, balancer, passes, **options) for each in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("passes", PASSES)
def test_a_table_looked_up_by_a_head_and_used_whole_by_the_trunk(passes: str) -> None:
    """One gradient is sparse and the other dense, in this order."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(9, 5, sparse=sparse)

        class Whole(nn.Module):
            def __init__(self, table: nn.Embedding) -> None:
                super().__init__()
                self.table = table

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.tanh(x @ self.table.weight)

        class LooksUp(Whole):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.table(torch.tensor([1, 1, 4, 8]))

        heads = [LooksUp(table), nn.Linear(5, 5)]
        tasks = [mtl.Task(f"t{i}", head=head, loss=nn.MSELoss(), target="y") for i, head in enumerate(heads)]
        model = mtl.MultiTaskModel(Whole(table), tasks, inputs=["x"]).double()
        batch = {"x": torch.randn(4, 9).double(), "y": torch.randn(4, 5).double()}
        balancer = Recorder()
        step = mtl.Step(model, tasks, balancer=balancer, passes=passes, gradients=mtl.Gradients(source="rows"))
        result = step.backward(batch, measure=True)
        found.append([balancer.given[0], table.weight.grad.to_dense(), *result.grad_norms.values()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_gramian_of_sparse_gradients_of_two_dimensions() -> None:
    """A gather's gradient has pairs of indices, of which the first alone isn't unique."""
    torch.manual_seed(0)
    table = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([[0, 1, 0, 3], [2, 2, 2, 0]])
    found = []
    for sparse in (False, True):
        losses = [(torch.gather(table, 0, places, sparse_grad=sparse) ** k).sum() for k in (1, 2, 3)]
        rows = [torch.autograd.grad(loss, table)[0] for loss in losses]
        assert all(row.is_sparse == sparse for row in rows)
        found.append(gramian([rows]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def step_on(
    num_rows: int, *, sparse: bool, source: str = "auto", passes: str = "shared", **options
) -> Callable[[], None]:
    """What makes a step of UPGrad on four tasks; the same rows of the table are looked up, however many it has."""
    torch.manual_seed(0)
    columns = {"id": {"kind": "category", "size": num_rows - 1}}
    trunk = mtl.trunks.Table(columns, ["id"], num_features=16, hidden=[16], dimensions=16, sparse=sparse)
    tasks = [mtl.Task(f"t{i}", head=mtl.heads.Linear(16, 1), loss=nn.MSELoss(), target=f"y{i}") for i in range(4)]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["id"])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01) if sparse else torch.optim.SGD(model.parameters())
    balancer = mtl.balancers.UPGrad()
    step = mtl.Step(
        model, tasks, optimizer, balancer=balancer, passes=passes, gradients=mtl.Gradients(source=source), **options
    )
    draws = torch.Generator().manual_seed(1)
    batch = {"id": torch.randint(0, 10_000, (64,), generator=draws)}
    batch |= {f"y{i}": torch.randn(64, generator=draws) for i in range(4)}

    def run() -> None:
        step(batch, measure=True)
        for parameter in model.parameters():
            parameter.grad = None

    return run


def allocated(run: Callable[[], None]) -> tuple[int, int]:
    """Bytes that torch allocates on the CPU while it runs: the most at once, and all of them together.

    The profiler hears of each block from the allocator itself, those inside an operation too. What was there before
    doesn't count.
    """
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
        total += max(event.nbytes(), 0)
    return peak, total


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch_size": 20}, {"update": mtl.Update(clip_norm=0.1)}, {"on_nonfinite": "skip_task"}]
)
@pytest.mark.parametrize("passes", PASSES)
def test_no_step_allocates_a_dense_row(passes: str, options: dict[str, object]) -> None:
    """And it allocates the same, to the byte, for a table with 10,000 rows: nothing in it knows of the unused ones."""
    peak, total = allocated(step_on(1_000_000, sparse=True, passes=passes, **options))
    assert peak < ROW / 100
    assert allocated(step_on(10_000, sparse=True, passes=passes, **options))[1] == total


class Seen(TorchDispatchMode):
    """Records the operations with an input or output that is a dense tensor as large as the table."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.layout == torch.strided and tensor.numel() * 4 >= ROW for tensor in tensors):
            sparse = any(leaf.is_sparse for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.names.add(f"{func} of a sparse tensor" if sparse else str(func))
        return out


@pytest.mark.parametrize("passes", PASSES)
def test_no_operation_goes_over_the_whole_table(passes: str) -> None:
    """What is done with it is looking rows up and adding a sparse tensor to it, in time by the number of rows."""
    run = step_on(1_000_000, sparse=True, passes=passes, update=mtl.Update(clip_norm=0.1), on_nonfinite="skip_task")
    with Seen() as seen:
        run()
    few = {
        "aten.embedding.default",
        "aten.add_.Tensor of a sparse tensor",
        "aten.sparse_mask.default of a sparse tensor",
    }
    assert seen.names == few
    run = step_on(1_000_000, sparse=False, passes=passes)
    with Seen() as seen:
        run()
    assert seen.names > {"aten._foreach_norm.Scalar", "aten.add_.Tensor"}


def test_that_memory_is_measured() -> None:
    """Dense embeddings: a row for each task where the rows are taken, and layerwise one for all."""
    assert allocated(step_on(1_000_000, sparse=False, source="rows"))[0] > 4 * ROW
    assert ROW <= allocated(step_on(1_000_000, sparse=False))[0] < 1.1 * ROW


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=adamw"], "AdamW can't take the sparse gradients of embeddings: RuntimeError: Adam does not"),
        (["optimizer=sgd", "optimizer.weight_decay=0.1"], "SGD can't take the sparse gradients of embeddings"),
        (["+optimizer.weight_decay=0.1"], "weight_decay option is not compatible with sparse gradients"),
        (
            ["balancer=graddrop"],
            "error: 'trunk.embeddings.0.weight' has sparse gradients, which this balancer can't combine element by element",
        ),
    ],
)
def test_what_cannot_take_sparse_gradients_is_told_in_a_sentence(here, overrides: list[str], message: str) -> None:
    ended = command("train", "task=made_ctr", "data.num_samples=2_000", *overrides)
    assert ended.code == 1
    assert message in ended.err
    assert "Traceback" not in ended.err
