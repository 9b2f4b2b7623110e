"""The constant factors in docs/balancing.md, against TorchJD and against formulas read from the code of others."""

import math
import re
import shlex
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT, command
from test_as_authors import Loop, agree, by_hand, data, regression
from test_balancing import NAMES
from torch import Tensor, nn

import mtl
from mtl import balancers as b

T = 3
COLUMNS = ["authors", "nash-mtl", "LibMTL", "TorchJD"]


def table() -> dict[str, dict[str, str]]:
    """Returns the cells by balancer and column."""
    text = (ROOT / "docs/balancing.md").read_text()
    part = text[text.index("### Constant factors") : text.index("## Where the Gramian")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): dict(zip(COLUMNS, row[1:], strict=True)) for row in rows if row[0] != "`balancer=`"}


def factor(cell: str) -> float:
    return {"1": 1.0, "2": 2.0, "T": float(T), "1/T": 1 / T}[re.split(r"[, ]", cell)[0]]


def test_the_table_has_every_method() -> None:
    missing = set(NAMES) - set(table())
    assert missing == {"fixed", "torchjd", "uw_so"}
    for name, cells in table().items():
        for cell in cells.values():
            assert cell in ("–", "*other*") or factor(cell), (name, cell)


def rows_and_losses() -> tuple[Tensor, Tensor]:
    """Returns three rows of different lengths, of which two conflict."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(T, 40, dtype=torch.float64, generator=generator)
    rows[1] = -0.4 * rows[0] + rows[1]
    rows[2] *= 3
    return rows, torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64)


def direction_of(balancer: b.Balancer) -> Tensor:
    rows, losses = rows_and_losses()
    balancer.num_tasks = T
    return balancer.weights(losses, rows @ rows.T) @ rows


AGGREGATORS: dict[str, tuple[Callable[[], b.Balancer], str, dict]] = {
    "aligned_mtl": (b.AlignedMTL, "AlignedMTL", {}),
    "conflict_free": (b.ConflictFree, "ConFIG", {}),
    "dualproj": (b.DualProj, "DualProj", {}),
    "equal": (b.Equal, "Sum", {}),
    "fairgrad": (b.FairGrad, "FairGrad", {"alpha": 1.0}),
    "imtl_g": (b.IMTLG, "IMTLG", {}),
    "mgda": (b.MGDA, "MGDA", {"epsilon": 1e-9, "max_iters": 20_000}),
    "pcgrad": (b.PCGrad, "PCGrad", {}),
    "upgrad": (b.UPGrad, "UPGrad", {}),
}


@pytest.mark.parametrize("name", list(AGGREGATORS))
def test_torchjds_aggregators(name: str) -> None:
    """PCGrad's result depends on an order, but not here, where one pair conflicts."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    make, theirs, arguments = AGGREGATORS[name]
    rows, _ = rows_and_losses()
    found = getattr(aggregation, theirs)(**arguments)(rows)
    torch.testing.assert_close(found, factor(table()[name]["TorchJD"]) * direction_of(make()), rtol=1e-3, atol=1e-3)


SCALARIZERS: dict[str, tuple[Callable[[], b.Balancer], str]] = {
    "dwa": (b.DWA, "DWA"),
    "famo": (b.FAMO, "FAMO"),
    "gls": (b.GLS, "GeometricMean"),
    "imtl_l": (b.IMTLL, "IMTLL"),
    "uw": (b.UW, "UW"),
}


@pytest.mark.parametrize("name", list(SCALARIZERS))
def test_torchjds_scalarizers(name: str) -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    make, theirs = SCALARIZERS[name]
    _, losses = rows_and_losses()
    values = losses.clone().requires_grad_()
    kind = getattr(scalarization, theirs)
    scalarizer = kind() if name in ("dwa", "gls") else kind(T)
    (found,) = torch.autograd.grad(scalarizer(values), values)
    balancer = make()
    balancer.num_tasks = T
    expected = factor(table()[name]["TorchJD"]) * balancer.weights(losses, None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_random_weights_sum_to_one_elsewhere() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    theirs = aggregation.Random()(torch.eye(T)).sum()
    mine = b.RLW().weights(torch.ones(T), None).sum()
    assert theirs.item() == pytest.approx(factor(table()["rlw"]["TorchJD"]) * mine.item())


def as_read(name: str, column: str) -> Tensor:
    """Directions as the code of others computes them, in the terms of the paper."""
    rows, losses = rows_and_losses()
    products = rows @ rows.T
    mean = rows.mean(0)
    if name == "aligned_mtl":  # the sum of the columns of √λ_min V Λ^(−½) Vᵀ
        values, vectors = torch.linalg.eigh(products)
        return (values.min().sqrt() * vectors @ (1 / values).sqrt().diag() @ vectors.T).sum(0) @ rows
    if name == "cagrad":  # with the inner weights by a fine grid on the simplex
        best = grid(lambda w: (w @ rows) @ mean + 0.5 * mean.norm() * (w @ rows).norm())
        direction = mean + 0.5 * mean.norm() * (best @ rows) / (best @ rows).norm()
        return direction / (1 + 0.5**2) * (1 if column == "LibMTL" else T)
    if name == "sdmgrad":
        best = grid(lambda w: (w @ rows + 0.3 * mean).norm())
        return (best @ rows + 0.3 * mean) / 1.3 * (1 if column == "LibMTL" else T)
    assert name == "mgda"
    return grid(lambda w: (w @ rows).norm()) @ rows * (T if column == "nash-mtl" else 1)


def grid(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the minimiser over the simplex, by ever finer grids."""
    best, width = torch.full((T,), 1 / T, dtype=torch.float64), 1.0
    while width > 1e-6:
        steps = torch.linspace(-width, width, 21, dtype=torch.float64)
        tried = [torch.stack([best[0] + x, best[1] + y]) for x in steps for y in steps]
        points = [torch.cat([pair, (1 - pair.sum()).unsqueeze(0)]) for pair in tried]
        best = min((p for p in points if p.min() >= 0), key=lambda p: objective(p).item())
        width /= 4
    return best


@pytest.mark.parametrize(
    ("name", "column", "make"),
    [
        ("aligned_mtl", "authors", b.AlignedMTL),
        ("aligned_mtl", "LibMTL", b.AlignedMTL),
        ("cagrad", "authors", lambda: b.CAGrad(c=0.5, rescale=True)),
        ("cagrad", "LibMTL", lambda: b.CAGrad(c=0.5, rescale=True)),
        ("sdmgrad", "authors", b.SDMGrad),
        ("sdmgrad", "LibMTL", b.SDMGrad),
        ("mgda", "nash-mtl", b.MGDA),
        ("mgda", "authors", b.MGDA),
    ],
)
def test_what_was_read(name: str, column: str, make: Callable[[], b.Balancer]) -> None:
    expected = as_read(name, column)
    torch.testing.assert_close(factor(table()[name][column]) * direction_of(make()), expected, rtol=1e-3, atol=1e-3)


def test_kendalls_notebook_has_twice_the_gradient() -> None:
    _, losses = rows_and_losses()
    values = losses.clone().requires_grad_()
    s = torch.zeros(T, dtype=torch.float64)
    (found,) = torch.autograd.grad(((-s).exp() * values + s).sum(), values)
    torch.testing.assert_close(found, factor(table()["uw"]["authors"]) * b.UW().weights(losses, None))


def test_stch_in_libmtl_is_t_times_ours() -> None:
    """In its warm-up the sum of the log-losses, and then T μ log Σ exp(log(L/nadir)/μ)."""
    _, losses = rows_and_losses()
    balancer = b.STCH(mu=0.5, warmup_epochs=1)
    values = losses.clone().requires_grad_()
    (found,) = torch.autograd.grad(values.log().sum(), values)
    times = factor(table()["stch"]["LibMTL"])
    torch.testing.assert_close(found, times * balancer.weights(losses, None))
    balancer.after(2 * losses, None)
    balancer.epoch_end()
    (found,) = torch.autograd.grad(T * 0.5 * torch.logsumexp((values / (2 * losses)).log() / 0.5, 0), values)
    torch.testing.assert_close(found, times * balancer.weights(losses, None))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_groups_of_the_optimizer_undo_a_factor(momentum: float) -> None:
    """T on the shared parameters, as in Samsung's Aligned-MTL, is T on their learning rate, and a T-th of weight decay."""

    def direction(loop: Loop, losses: list[Tensor]) -> None:
        sum(losses).backward(retain_graph=True)
        rows = loop.rows(losses, loop.shared)
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        alpha = (values.min().sqrt() * vectors @ (1 / values).sqrt().diag() @ vectors.T).sum(0)
        loop.put(loop.shared, alpha @ rows)

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.02, momentum=momentum, weight_decay=0.1)

    theirs = by_hand(direction, sgd)
    trunk, heads = regression()
    tasks = [mtl.Task(f"t{i}", head=head, loss=nn.MSELoss(), target=f"y{i}") for i, head in enumerate(heads)]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    groups = [
        {"params": list(trunk.parameters()), "lr": T * 0.02, "weight_decay": 0.1 / T},
        {"params": [p for head in heads for p in head.parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=momentum, weight_decay=0.1)
    step = mtl.Step(model, tasks, optimizer, balancer=b.AlignedMTL())
    for batch in data():
        step(batch)
    agree([p.detach() for p in (*trunk.parameters(), *(p for head in heads for p in head.parameters()))], theirs)


def test_the_commands_in_the_docs(here) -> None:
    """Theirs is twice as long with two tasks, or half as long: so is the trunk's learning rate."""
    text = (ROOT / "docs/balancing.md").read_text()
    lines = re.findall(r"^python -m mtl.train (.*optimizer.groups.*)$", text, re.M)
    assert len(lines) == 2
    for line, rate in zip(lines, (0.2, 0.05), strict=True):
        ended = command("train", *shlex.split(line), "trainer.max_epochs=1", "data.batch_size=512", "scheduler=none")
        assert ended.code == 0, ended.err
        state = torch.load(ended.run / "checkpoints/last.pt", weights_only=True)
        rates = {group["name"]: group["lr"] for group in state["step"]["optimizer"]["param_groups"]}
        assert rates == {"default": 0.1, "trunk": rate}


def test_excess_mtl_of_torchjd_sums_to_one() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    weights = aggregation.ExcessMTLWeighting()(rows_and_losses()[0])
    assert weights.sum().item() == pytest.approx(1.0)
    rows, losses = rows_and_losses()
    mine, _ = b.ExcessMTL().combine(losses, {"w": rows})
    assert math.isclose(factor(table()["excess_mtl"]["TorchJD"]) * mine.sum().item(), 1.0, rel_tol=1e-6)
