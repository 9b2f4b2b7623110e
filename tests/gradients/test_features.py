"""Sources of the Gramian: each source against rows written out by hand, for all kinds of layers."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mtl
from mtl.gradients import at_features
from mtl.gradients.layerwise import find


class Recorder(mtl.balancers.Balancer):
    """A balancer that records the Gramians and returns different weights of both signs."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def weights(self, losses, gramian):
        self.given.append(gramian)
        return torch.linspace(-0.5, 2.0, len(losses), dtype=torch.float64)


class Residual(nn.Module):
    """Convolutions of all kinds with batch norm, a skip connection and an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.deep = nn.Conv2d(8, 24, 3, stride=2)
        self.same = nn.Conv2d(24, 24, (3, 5), padding="same")
        self.up = nn.ConvTranspose2d(24, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = x + self.dilated(x)
        x = F.relu(self.deep(x + self.grouped(x)), inplace=True)
        return self.up(x + self.same(x)).mean((2, 3)).repeat(1, 4)


class Words(nn.Module):
    """Embeddings with padding, a transformer layer, attention that isn't packed, a convolution along the line."""

    def __init__(self, *, norm_first: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16, padding_idx=0)
        self.places = nn.Parameter(torch.randn(6, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.cross = nn.MultiheadAttention(16, 4, kdim=16, vdim=16, batch_first=True, bias=False)
        self.line = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.words((x[:, 0, 0, :6] * 20).long().abs() % 50) + self.places
        x = self.layer(x)
        x = x + self.cross(x, x.flip(1), x, need_weights=False)[0]
        return self.line(x.transpose(1, 2)).mean(2)


class Odd(nn.Module):
    """A trunk with layers that are used twice, tied, frozen, weight-normalised, without a module, or never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 16)
        self.twice = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.after_frozen = nn.Linear(16, 16, bias=False)
        self.half_frozen = nn.Linear(16, 16)
        self.half_frozen.bias.requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.plain = nn.Parameter(0.3 * torch.randn(16, 16))
        self.shift = nn.Parameter(torch.randn(16))
        self.other_shift = nn.Parameter(torch.randn(16))
        self.unused = nn.Linear(3, 3)
        self.tied = nn.Linear(16, 16)
        self.tied_too = nn.Linear(16, 16)
        self.tied_too.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x.flatten(1)[:, :32]))
        x = torch.tanh(self.twice(self.twice(x)))
        x = self.half_frozen(self.after_frozen(torch.tanh(self.frozen(x))))
        x = self.normed(x) @ self.plain
        x = self.tied_too(torch.tanh(self.tied(x)))
        return x + self.shift + self.other_shift  # their gradients are one tensor to autograd


class Steep(nn.Module):
    """A trunk that differentiates within its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.flatten(1)[:, :32].detach().requires_grad_()
            y = self.net(x)
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope[:, :16]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(32, 16), nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, self.first(x.flatten(1)[:, :32]), use_reentrant=False)


class Several(nn.Module):
    """A trunk with nested tensors as features; heads use different ones over the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.tanh(self.second(torch.tanh(self.first(x.flatten(1)[:, :32]))))
        return {"odd": x.sin(), "even": x.cos()}


class Branches(Several):
    """A trunk in which only the even feature uses the second layer, so that only some tasks reach its parameters."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.tanh(self.first(x.flatten(1)[:, :32]))
        return {"odd": x, "even": self.second(x)}


class Hooked(nn.Module):
    """A trunk with a hook that changes the gradient of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 16), nn.Linear(16, 16)
        self.first.weight.register_hook(lambda gradient: 0.1 * gradient)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x.flatten(1)[:, :32]))))


class Bare(nn.Module):
    """A trunk whose features include a weight, or a view of it."""

    def __init__(self, *, view: bool) -> None:
        super().__init__()
        self.view, self.first, self.weight = view, nn.Linear(32, 16), nn.Parameter(0.2 * torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x, weight = torch.tanh(self.first(x.flatten(1)[:, :32])), self.weight.t() if self.view else self.weight
        return {"odd": (x @ weight, weight), "even": (x @ weight, weight)}


class Silent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


class Muted(nn.Module):
    """A trunk with a function behind one layer that returns no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.muted = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)[:, :32]
        return torch.tanh(self.first(x)) + Silent.apply(self.muted(x))


class OneWord(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.word = nn.Linear(32, 16), nn.Embedding(4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.first(x.flatten(1)[:, :32])) + self.word(torch.tensor(2))


class Spectral(nn.Module):
    """A trunk with complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.filter = nn.Linear(32, 16), nn.Parameter(torch.randn(16, 9, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(torch.tanh(self.first(x.flatten(1)[:, :32])))
        mixed = spectrum @ (self.filter.t() if spectrum.shape[-1] == 16 else self.filter[:9])
        return torch.fft.irfft(mixed, n=16)


class Head(nn.Module):
    def __init__(self, key: str | None = None) -> None:
        super().__init__()
        self.key, self.linear = key, nn.Linear(16, 3)

    def forward(self, features):
        features = features if self.key is None else features[self.key]
        return self.linear(features[0] + features[1].mean(0) if isinstance(features, tuple) else features)


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "words": Words,
    "words, norm first": lambda: Words(norm_first=True),
    "odd": Odd,
    "steep": Steep,
    "checkpointed": Checkpointed,
    "several": Several,
    "branches": Branches,
    "hooked": Hooked,
    "a weight as feature": lambda: Bare(view=False),
    "a weight's view as feature": lambda: Bare(view=True),
    "muted": Muted,
    "one word": OneWord,
}


def built(name: str, num_tasks: int, dtype: torch.dtype, *, tie: bool = False):
    torch.manual_seed(0)
    trunk = TRUNKS[name]()
    keyed = isinstance(trunk, Several | Bare)
    tasks = [
        mtl.Task(
            f"t{i}",
            head=Head(("odd", "even")[i % 2] if keyed else None),
            loss=nn.CrossEntropyLoss(),
            target=f"y{i}",
            weight=1.0 + 0.5 * i,
        )
        for i in range(num_tasks)
    ]
    if tie:
        for task in tasks[1:]:
            task.head.linear.weight = tasks[0].head.linear.weight
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"]).to(dtype)
    batch = {"x": torch.randn(5, 2, 11, 12, dtype=dtype)} | {
        f"y{i}": torch.randint(0, 3, (5,)) for i in range(num_tasks)
    }
    return model, tasks, batch


def by_hand(model, tasks, batch, weights):
    """Returns the Gramian over the shared parameters and the combination, from one joint forward pass."""
    losses = [task.weight * task.loss(model(batch)[task.name], batch[task.target]) for task in tasks]
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True) for loss in losses]
    shared = [j for j in range(len(trained)) if sum(row[j] is not None for row in gradients) > 1]
    rows = torch.stack(
        [
            torch.cat([(torch.zeros_like(trained[j]) if row[j] is None else row[j]).flatten() for j in shared])
            for row in gradients
        ]
    ).double()
    combined = {}
    for j, parameter in enumerate(trained):
        parts = [
            (w if j in shared else 1.0) * row[j]
            for w, row in zip(weights, gradients, strict=True)
            if row[j] is not None
        ]
        combined[parameter] = sum(parts) if parts else None
    return rows @ rows.T, combined


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("source", ["rows", "layerwise"])
@pytest.mark.parametrize("name", list(TRUNKS))
def test_gramian_and_combination_are_those_of_rows_by_hand(
    name: str, source: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtl.gradients.layerwise.Product.pays", lambda *_: True)  # all that can go that way shall
    model, tasks, batch = built(name, 3, dtype)
    weights = torch.linspace(-0.5, 2.0, 3, dtype=torch.float64)
    model.train()
    gramian, combined = by_hand(*built(name, 3, dtype), weights.tolist())
    balancer = Recorder()
    mtl.Step(model, tasks, balancer=balancer, gradients=mtl.Gradients(source=source)).backward(batch)
    near = 1e-10 if dtype == torch.float64 else 1e-5
    scale = gramian.diagonal().sqrt()
    torch.testing.assert_close(
        balancer.given[0] / scale.outer(scale), gramian / scale.outer(scale), rtol=near, atol=near
    )
    largest = max(float(g.abs().max()) for g in combined.values() if g is not None)
    for (parameter_name, parameter), expected in zip(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad), combined.values(), strict=True
    ):
        if expected is None:
            assert parameter.grad is None, parameter_name
        else:
            assert parameter.grad.stride() == parameter.stride(), parameter_name
            torch.testing.assert_close(parameter.grad, expected, rtol=near, atol=near * largest, msg=parameter_name)


@pytest.mark.parametrize("source", ["rows", "layerwise"])
@pytest.mark.parametrize("kind", ["joint", "shared"])
def test_complex_parameters(kind: str, source: str) -> None:
    """Real and imaginary parts are columns of their own."""
    if kind == "joint" and source == "layerwise":
        pytest.skip("needs shared passes")
    torch.manual_seed(0)
    trunk = Spectral()
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(16, 3), loss=nn.CrossEntropyLoss(), target=f"y{i}") for i in range(2)]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    batch = {"x": torch.randn(5, 2, 11, 12)} | {f"y{i}": torch.randint(0, 3, (5,)) for i in range(2)}
    losses = [task.loss(model(batch)[task.name], batch[task.target]) for task in tasks]
    parameters = list(trunk.parameters())
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        rows.append(torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in found]))
    matrix = torch.stack(rows).double()
    balancer = Recorder()
    result = mtl.Step(model, tasks, balancer=balancer, gradients=mtl.Gradients(source=source), passes=kind).backward(
        batch, measure=True
    )
    torch.testing.assert_close(balancer.given[0], matrix @ matrix.T, rtol=1e-4, atol=1e-7)
    assert all(norm.isfinite() for norm in result.grad_norms.values())
    expected = sum(w * g for w, g in zip((-0.5, 2.0), (r[-2 * 16 * 9 :] for r in rows), strict=True))
    given = torch.view_as_real(trunk.filter.grad).flatten()
    order = [name for name, _ in trunk.named_parameters()]
    if order[-1] == "filter":
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["joint", "sequential", "shared"])
def test_a_sparse_embedding_that_a_head_uses_densely(kind: str) -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        trunk = nn.Embedding(10, 16, sparse=sparse)

        class Tied(nn.Module):
            def __init__(self, table: nn.Embedding) -> None:
                super().__init__()
                self.table = table

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x @ self.table.weight.t()

        heads = [nn.Linear(16, 10), Tied(trunk)]
        tasks = [mtl.Task(f"t{i}", head=heads[i], loss=nn.CrossEntropyLoss(), target="y") for i in range(2)]
        model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
        balancer = Recorder()
        batch = {"x": torch.tensor([1, 5, 5]), "y": torch.tensor([0, 2, 9])}
        mtl.Step(model, tasks, balancer=balancer, passes=kind, gradients=mtl.Gradients(source="rows")).backward(batch)
        found.append((balancer.given[0], trunk.weight.grad.to_dense()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def found_in(name: str) -> set[str]:
    model, _, batch = built(name, 2, torch.float32)
    features = model.trunk(batch["x"])
    names = {p: n for n, p in model.trunk.named_parameters()}
    layers = find(list(features.values()) if isinstance(features, dict) else [features], 2)
    return {names[p] for layer in layers for p in layer.parameters}


def test_which_layers_have_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would pass if none had."""
    monkeypatch.setattr("mtl.gradients.layerwise.Product.pays", lambda *_: True)
    convolutions = {f"{n}.{k}" for n in ("stem", "deep", "same") for k in ("weight", "bias")}
    assert found_in("residual") == convolutions | {"dilated.weight"}
    attention = {"layer.self_attn.out_proj.weight", "layer.self_attn.out_proj.bias"}
    linear = {f"layer.linear{i}.{k}" for i in (1, 2) for k in ("weight", "bias")}
    line = {"line.weight", "line.bias"}
    for name in ("words", "words, norm first"):
        found = found_in(name)
        assert found >= {"words.weight", "layer.self_attn.in_proj_weight"} | attention | linear | line
        assert {"places", "layer.norm1.weight"}.isdisjoint(found)
    found = found_in("odd")
    assert found >= {"first.weight", "first.bias", "after_frozen.weight", "half_frozen.weight", "plain"}
    assert not {"twice.weight", "tied.weight", "half_frozen.bias", "shift", "frozen.weight"} & found
    assert not {n for n in found if "normed" in n and "weight" in n}
    assert not {n for n in found_in("steep") if "weight" in n}  # used in the forward and again in its derivative


def test_layers_go_that_way_where_it_pays() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    assert len(find([wide(torch.randn(16, 256))], 8)) == 2
    assert find([wide(torch.randn(400, 256))], 8) == []
    assert len(find([nn.Conv2d(64, 64, 3)(torch.randn(2, 64, 5, 5))], 8)) == 1
    assert find([nn.Conv2d(3, 8, 3)(torch.randn(2, 3, 32, 32))], 8) == []


@pytest.mark.parametrize("num_tasks", [1, 2, 7, 40])
@pytest.mark.parametrize("kind", ["joint", "sequential", "shared"])
def test_many_tasks(kind: str, num_tasks: int) -> None:
    found = []
    for source, passes in (("auto", kind), ("rows", "joint")):
        model, tasks, batch = built("odd", num_tasks, torch.float64)
        mtl.Step(model, tasks, balancer=Recorder(), gradients=mtl.Gradients(source=source), passes=passes).backward(
            batch
        )
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("source", ["rows", "layerwise"])
def test_heads_may_share_parameters_among_them_and_with_the_trunk(source: str, monkeypatch) -> None:
    monkeypatch.setattr("mtl.gradients.layerwise.Product.pays", lambda *_: True)

    def tied():
        model, tasks, batch = built("odd", 3, torch.float64, tie=True)
        for task in tasks[:2]:
            task.head.linear = nn.Sequential(model.trunk.tied, model.trunk.after_frozen, task.head.linear)
        return model, tasks, batch

    weights = torch.linspace(-0.5, 2.0, 3, dtype=torch.float64)
    gramian, combined = by_hand(*tied(), weights.tolist())
    model, tasks, batch = tied()
    balancer = Recorder()
    mtl.Step(model, tasks, balancer=balancer, gradients=mtl.Gradients(source=source)).backward(batch)
    torch.testing.assert_close(balancer.given[0], gramian, rtol=1e-10, atol=1e-12)
    for parameter, expected in zip((p for p in model.parameters() if p.requires_grad), combined.values(), strict=True):
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["residual", "words", "odd"])
def test_representation_is_the_gramian_of_the_gradients_at_the_features(name: str) -> None:
    model, tasks, batch = built(name, 3, torch.float64)
    features = model.trunk(batch["x"])
    cut = features.detach().requires_grad_()
    losses = [task.weight * task.loss(task.head(cut), batch[task.target]) for task in tasks]
    whole = torch.stack([torch.autograd.grad(loss, cut)[0].flatten() for loss in losses])
    model, tasks, batch = built(name, 3, torch.float64)
    balancer = Recorder()
    result = mtl.Step(model, tasks, balancer=balancer, gradients=mtl.Gradients(source="representation")).backward(
        batch, measure=True
    )
    torch.testing.assert_close(balancer.given[0], whole @ whole.T, rtol=1e-11, atol=1e-14)
    model, tasks, batch = built(name, 3, torch.float64)
    exact = mtl.Step(model, tasks, balancer=Recorder(), gradients=mtl.Gradients(source="rows")).backward(
        batch, measure=True
    )
    for task in result.grad_norms:  # what is measured is the truth about the parameters, whatever the source
        torch.testing.assert_close(result.grad_norms[task], exact.grad_norms[task], rtol=1e-9, atol=0)
    for pair in result.cosines:
        torch.testing.assert_close(result.cosines[pair], exact.cosines[pair], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_representation_is_rows_if_tasks_use_different_tensors_of_the_features(num_tasks: int) -> None:
    """The gradients at different tensors are orthogonal, whether or not the tasks conflict in the trunk."""
    given, gradients = [], []
    for source in ("rows", "representation"):
        model, tasks, batch = built("several", num_tasks, torch.float64)
        balancer = Recorder()
        mtl.Step(model, tasks, balancer=balancer, gradients=mtl.Gradients(source=source)).backward(batch)
        given.append(balancer.given[0])
        gradients.append([p.grad for p in model.parameters()])
    assert given[0].abs().min() > 0
    torch.testing.assert_close(given[1], given[0], rtol=1e-12, atol=0)
    for rows, representation in zip(*gradients, strict=True):
        torch.testing.assert_close(representation, rows, rtol=1e-9, atol=1e-13)


def test_representation_combines_as_rows_do_and_takes_the_trunk_backward_once(monkeypatch) -> None:
    found, calls = [], []
    for source in ("rows", "representation"):
        model, tasks, batch = built("residual", 4, torch.float64)

        def watch(module, inputs, output, source=source):
            output.register_hook(lambda _: calls.append(source))

        model.trunk.stem.register_forward_hook(watch)
        mtl.Step(model, tasks, balancer=Recorder(), gradients=mtl.Gradients(source=source)).backward(batch)
        found.append([p.grad for p in model.parameters()])
    for rows, representation in zip(*found, strict=True):
        torch.testing.assert_close(representation, rows, rtol=1e-9, atol=1e-13)
    assert [calls.count(source) for source in ("rows", "representation")] == [4, 1]


@pytest.mark.parametrize("source", ["rows", "layerwise", "representation"])
@pytest.mark.parametrize("name", ["words", "branches"])
def test_every_k_keeps_the_weights_between(name: str, source: str) -> None:
    """Steps in between move along the same combination as if the Gramian had been taken."""
    model, tasks, batch = built(name, 3, torch.float64)
    balancer = Recorder()
    step = mtl.Step(
        model,
        tasks,
        torch.optim.SGD(model.parameters(), lr=0.01),
        balancer=balancer,
        gradients=mtl.Gradients(source=source, every=3),
    )
    other, other_tasks, _ = built(name, 3, torch.float64)
    each = mtl.Step(
        other,
        other_tasks,
        torch.optim.SGD(other.parameters(), lr=0.01),
        balancer=Recorder(),
        gradients=mtl.Gradients(source=source),
    )
    for number in range(7):
        result = step(batch, measure=number % 2 == 0)
        each(batch)
        assert (result.cosines is not None) == (number % 2 == 0)
        assert len(balancer.given) == number // 3 + 1
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)


def test_every_k_goes_on_after_a_reload() -> None:
    ends = []
    for stop in (False, True):
        model, tasks, batch = built("odd", 3, torch.float64)

        def fresh(model=model, tasks=tasks):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            return mtl.Step(model, tasks, optimizer, balancer=mtl.balancers.MGDA(), gradients=mtl.Gradients(every=4))

        step = fresh()
        for number in range(10):
            if stop and number == 6:
                state = step.state_dict()
                step = fresh()
                step.load_state_dict(state)
            step(batch)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_what_measuring_gives_does_not_depend_on_the_source() -> None:
    found = []
    for source in ("rows", "layerwise"):
        model, tasks, batch = built("words", 3, torch.float64)
        found.append(
            mtl.Step(model, tasks, balancer=Recorder(), gradients=mtl.Gradients(source=source)).backward(
                batch, measure=True
            )
        )
    rows, layerwise = found
    assert rows.reach == layerwise.reach
    for task in rows.grad_norms:
        torch.testing.assert_close(layerwise.grad_norms[task], rows.grad_norms[task], rtol=1e-10, atol=0)
    for pair in rows.cosines:
        torch.testing.assert_close(layerwise.cosines[pair], rows.cosines[pair], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["residual", "words"])
def test_bf16_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers keep their stand-ins; both sources are as near to full precision as bfloat16's 8 bits are."""
    monkeypatch.setattr("mtl.gradients.layerwise.Product.pays", lambda *_: True)
    found = {}
    for source, precision in (("rows", "fp32"), ("rows", "bf16"), ("layerwise", "bf16")):
        model, tasks, batch = built(name, 3, torch.float32)
        balancer = Recorder()
        step = mtl.Step(model, tasks, balancer=balancer, gradients=mtl.Gradients(source=source), precision=precision)
        step.backward(batch)
        scale = balancer.given[0].diagonal().sqrt()
        found[source, precision] = scale, balancer.given[0] / scale.outer(scale)
        assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
    for key in (("rows", "bf16"), ("layerwise", "bf16")):
        torch.testing.assert_close(found[key][0], found["rows", "fp32"][0], rtol=0.05, atol=0)
        torch.testing.assert_close(found[key][1], found["rows", "fp32"][1], rtol=0, atol=0.05)


def test_float32_gramian_of_layers_whose_samples_cancel() -> None:
    """‖aᵀδ‖² by δᵀ(aaᵀ)δ would lose all digits where the samples' gradients add up to little; Rδ doesn't."""
    errors = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        trunk = nn.Linear(64, 64).double()
        x = torch.randn(8, 64).double()
        tasks = [
            mtl.Task(f"t{i}", head=nn.Linear(64, 1).double(), loss=lambda p, y: (p * y).sum(), target="y")
            for i in range(2)
        ]
        model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"]).to(dtype)
        balancer = Recorder()
        batch = {
            "x": torch.cat([x, x * (1 + 1e-4)]).to(dtype),
            "y": torch.tensor([1.0] * 8 + [-1.0] * 8)[:, None].to(dtype),
        }
        mtl.Step(model, tasks, balancer=balancer, gradients=mtl.Gradients(source="layerwise")).backward(batch)
        errors.append(balancer.given[0])
    single, double = errors
    assert ((single - double).abs() / double.diagonal().max()).max() < 1e-2


def test_float32_gramians_of_33_million_parameters() -> None:
    found = {}
    for source, dtype in (("rows", torch.float64), ("rows", torch.float32), ("layerwise", torch.float32)):
        torch.manual_seed(0)
        trunk = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(2048, 2048), nn.Tanh())])
        tasks = [mtl.Task(f"t{i}", head=nn.Linear(2048, 3), loss=nn.CrossEntropyLoss(), target="y") for i in range(2)]
        batch = {"x": torch.randn(8, 2048).to(dtype), "y": torch.randint(0, 3, (8,))}
        balancer = Recorder()
        model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"]).to(dtype)
        mtl.Step(model, tasks, balancer=balancer, gradients=mtl.Gradients(source=source)).backward(batch)
        found[source, dtype] = balancer.given[0]
    for source in ("rows", "layerwise"):
        torch.testing.assert_close(found[source, torch.float32], found["rows", torch.float64], rtol=1e-5, atol=0)


@pytest.mark.parametrize("source", ["auto", "representation"])
@pytest.mark.parametrize("kind", ["joint", "sequential", "shared"])
def test_compiled_trunk(kind: str, source: str) -> None:
    """What autograd sees of it is one node; its layers have rows, and they are right."""
    if source == "representation" and kind != "shared":
        pytest.skip("needs shared passes")
    found = []
    for compiled in (False, True):
        model, tasks, batch = built("odd", 3, torch.float32)
        if compiled:
            torch._dynamo.reset()
            model.trunk.compile(backend="aot_eager")
        balancer = Recorder()
        mtl.Step(model, tasks, balancer=balancer, passes=kind, gradients=mtl.Gradients(source=source)).backward(batch)
        found.append((balancer.given[0], [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_trunk_compiled_to_machine_code_is_measured_and_balanced() -> None:
    """Its backward would give up its buffers after the first pass, and the joint one takes three."""
    found = []
    for compiled in (False, True):
        model, tasks, batch = built("several", 3, torch.float32)
        if compiled:
            torch._dynamo.reset()
            model.trunk.compile()
        step = mtl.Step(model, tasks, balancer=mtl.balancers.MGDA(), passes="joint")
        result = step.backward(batch, measure=True)
        found.append((list(result.grad_norms.values()), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_sources_that_cannot_be_used() -> None:
    model, tasks, _ = built("odd", 2, torch.float32)
    for source in ("layerwise", "representation"):
        for passes in ("joint", "sequential"):
            with pytest.raises(mtl.UserError, match=f"'{source}' needs one trunk forward .* passes is '{passes}'"):
                mtl.Step(model, tasks, balancer=Recorder(), gradients=mtl.Gradients(source=source), passes=passes)
    with pytest.raises(mtl.UserError, match=r"gradients.source: 'row' is not one of auto, rows"):
        mtl.Step(model, tasks, gradients=mtl.Gradients(source="row"))
    with pytest.raises(mtl.UserError, match="gradients.every is 0"):
        mtl.Step(model, tasks, gradients=mtl.Gradients(every=0))
    for passes in ("joint", "sequential"):
        assert mtl.Step(model, tasks, balancer=Recorder(), passes=passes).balancing.source == "rows"


def test_large_embeddings_get_no_dense_row() -> None:
    """10,000 words, of which 6 are looked up: what is held for the Gramian is far smaller than the table."""
    torch.manual_seed(0)
    trunk = nn.Embedding(10_000, 16)
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(16, 3), loss=nn.CrossEntropyLoss(), target=f"y{i}") for i in range(4)]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    batch = {"x": torch.tensor([1, 5, 5, 9, 77, 4000])} | {f"y{i}": torch.randint(0, 3, (6,)) for i in range(4)}
    sizes = []
    original = at_features.gramian

    def noted(pieces):
        pieces = [list(piece) for piece in pieces]
        sizes.extend(sum(row.numel() for row in piece if row is not None) for piece in pieces)
        return original(pieces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at_features, "gramian", noted)
        mtl.Step(model, tasks, balancer=Recorder()).backward(batch)
    assert sizes == [4 * 5 * 16]  # 5 words that differ
    assert trunk.weight.grad.count_nonzero() == 5 * 16


@pytest.mark.parametrize("kind", ["joint", "sequential", "shared"])
def test_sparse_embeddings_are_balanced_as_dense_ones(kind: str) -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        trunk = nn.Embedding(100, 16, sparse=sparse)
        tasks = [mtl.Task(f"t{i}", head=nn.Linear(16, 3), loss=nn.CrossEntropyLoss(), target=f"y{i}") for i in range(3)]
        model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
        batch = {"x": torch.tensor([1, 5, 5, 99])} | {f"y{i}": torch.randint(0, 3, (4,)) for i in range(3)}
        balancer = Recorder()
        mtl.Step(model, tasks, balancer=balancer, passes=kind).backward(batch)
        assert trunk.weight.grad.is_sparse == sparse
        found.append((balancer.given[0], trunk.weight.grad.to_dense()))
    for dense, thin in zip(*found, strict=True):
        torch.testing.assert_close(thin, dense, rtol=1e-5, atol=1e-8)
