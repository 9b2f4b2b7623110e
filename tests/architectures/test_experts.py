"""MMoE, CGC and PLE: gates, numbers of parameters, and forward passes written by hand."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every import NAMES, batches, cnn, mlp
from torch import Tensor, nn

import mtl
from mtl.architectures import CGC, PLE, DSelectK, MMoE
from mtl.errors import UserError
from mtl.trunks import Table

EXPERT = 64 * 7 + 7 + 7 * 8 + 8 + 8 * 6 + 6  # the numbers in the trunk `mlp`
HEADS = 3 * (6 + 1)


def tasks() -> list[mtl.Task]:
    return [
        mtl.Task(name, head=mtl.heads.Linear(6, 1, squeeze=True), loss=nn.BCEWithLogitsLoss(), target=name)
        for name in NAMES
    ]


def built(kind: type, trunk: Any = mlp, **options: Any) -> mtl.MultiTaskModel:
    model: mtl.MultiTaskModel = kind(trunk, tasks(), inputs=["image"], **options).double()
    model.eval()(batches(1)[0])
    return model.train()


@pytest.mark.parametrize("kind", [MMoE, CGC, PLE, DSelectK, partial(DSelectK, per_sample=True, experts=5, k=3)])
def test_the_weights_of_the_experts_sum_to_one(kind: type) -> None:
    model = built(kind)
    weights = model.gate_weights(batches(1)[0])
    assert list(weights) == list(NAMES)
    for each in weights.values():
        assert (each >= 0).all()
        torch.testing.assert_close(each.sum(-1), torch.ones_like(each.sum(-1)), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "options", "number"),
    [
        (MMoE, {"experts": 4}, 4 * EXPERT + 3 * 64 * 4),
        (MMoE, {"experts": 4, "shared_stages": 1}, 64 * 7 + 7 + 4 * (7 * 8 + 8 + 8 * 6 + 6) + 3 * 7 * 4),
        (CGC, {"shared_experts": 2, "own_experts": 3}, (2 + 3 * 3) * EXPERT + 3 * 64 * 5),
        (PLE, {"shared_experts": 2}, (2 + 3) * EXPERT + 3 * 64 * 3 + 64 * 5 + 3 * 8 * 3),
        (PLE, {"layers": 3}, 4 * EXPERT + (3 * 64 * 2 + 64 * 4) + (3 * 7 * 2 + 7 * 4) + 3 * 8 * 2),
        (DSelectK, {"experts": 4, "k": 2}, 4 * EXPERT + 3 * (2 * 2 + 2)),
        (DSelectK, {"experts": 5, "k": 2, "per_sample": True}, 5 * EXPERT + 3 * (64 + 1) * (2 * 3 + 2)),
    ],
)
def test_numbers_of_parameters(kind: type, options: dict[str, Any], number: int) -> None:
    assert sum(p.numel() for p in built(kind, **options).parameters()) == number + HEADS


@pytest.mark.parametrize("shared_stages", [0, 2])
@pytest.mark.parametrize("trunk", [mlp, partial(cnn, batch_norm=True)], ids=["mlp", "cnn"])
def test_one_expert_is_hard_sharing(trunk: Any, shared_stages: int) -> None:
    torch.manual_seed(0)
    one = built(MMoE, trunk, experts=1, shared_stages=shared_stages)
    plain = mtl.MultiTaskModel(trunk(), tasks(), inputs=["image"]).double()
    plain.heads.load_state_dict(one.heads.state_dict())
    plain.trunk.load_state_dict(dict(zip(plain.trunk.state_dict(), one.trunk.state_dict().values(), strict=True)))
    (batch,) = batches(1)
    for model in (one, plain):
        mtl.Step(model, [*tasks()], passes="joint").backward(batch)
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(one.trunk.parameters(), plain.trunk.parameters(), strict=True)
    )
    assert all(torch.equal(one(batch)[name], plain(batch)[name]) for name in NAMES)


def layer(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.relu(F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"]))


def test_progressive_layered_extraction_by_hand() -> None:
    """The gate of the shared experts mixes the experts of all tasks."""
    model = built(PLE, shared_experts=1, own_experts=1, layers=3)
    state = model.state_dict()
    (batch,) = batches(1)
    places = ["0.1", "0.0", "0.0"]  # of the linear layer in the only stage of a layer

    def mixed(gate: str, x: Tensor, outputs: list[Tensor]) -> Tensor:
        weights = (x @ state[f"{gate}.linear.weight"].T).softmax(1)
        return sum(weights[:, [i]] * output for i, output in enumerate(outputs))

    own, common = dict.fromkeys(NAMES, batch["image"].flatten(1)), batch["image"].flatten(1)
    for level, place in enumerate(places):
        where = "branches" if level == 2 else f"trunk.branches.{level}"
        shared = layer(state, f"trunk.shared.{level}.0.{place}", common)
        of = {name: layer(state, f"{where}.{name}.experts.0.{place}", own[name]) for name in NAMES}
        if level < 2:
            common = mixed(f"trunk.gates.{level}", common, [*of.values(), shared])
        own = {name: mixed(f"{where}.{name}.gate", own[name], [of[name], shared]) for name in NAMES}
    for name, prediction in model(batch).items():
        expected = F.linear(own[name], state[f"heads.{name}.weight"], state[f"heads.{name}.bias"]).squeeze(1)
        torch.testing.assert_close(prediction, expected, rtol=1e-12, atol=1e-14)


class Original(nn.Module):
    """The forward pass of DeepCTR-Torch's MMOE, without hidden layers in the gates, written anew."""

    def __init__(self, sizes: list[int], *, num_experts: int, num_tasks: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, 4) for size in sizes)
        width = 4 * len(sizes)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()) for _ in range(num_experts)
        )
        self.gates = nn.ModuleList(nn.Linear(width, num_experts, bias=False) for _ in range(num_tasks))
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU()) for _ in range(num_tasks))
        self.last = nn.ModuleList(nn.Linear(6, 1) for _ in range(num_tasks))

    def forward(self, columns: list[Tensor]) -> list[Tensor]:
        x = torch.cat([embedding(c) for embedding, c in zip(self.embeddings, columns, strict=True)], -1)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        probabilities = []
        for gate, tower, last in zip(self.gates, self.towers, self.last, strict=True):
            mixture = torch.matmul(gate(x).softmax(1).unsqueeze(1), outputs).squeeze(1)
            probabilities.append(torch.sigmoid(last(tower(mixture))).squeeze(1))
        return probabilities


def test_mmoe_trains_as_the_one_of_deepctr_torch() -> None:
    torch.manual_seed(0)
    sizes, fields = [20, 30], ["user", "item"]
    columns = {name: {"kind": "category", "size": size - 1} for name, size in zip(fields, sizes, strict=True)}
    names = ["click", "sale"]
    made = [
        mtl.Task(
            name,
            head=nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1), nn.Flatten(0), nn.Sigmoid()),
            loss=nn.BCELoss(),
            target=name,
        )
        for name in names
    ]
    trunk = partial(Table, columns, fields, num_features=8, hidden=[16], dimensions=4)
    model = MMoE(trunk, made, inputs=fields, experts=3)
    generator = torch.Generator().manual_seed(1)
    data = [
        {
            **{n: torch.randint(size, (32,), generator=generator) for n, size in zip(fields, sizes, strict=True)},
            **{n: torch.randint(2, (32,), generator=generator).float() for n in names},
        }
        for _ in range(20)
    ]
    model.eval()(data[0])
    model.train()
    original = Original(sizes, num_experts=3, num_tasks=2)
    ours = [
        *model.trunk.stem.parameters(),
        *model.trunk.shared.parameters(),
        *model.branches.parameters(),
        *(p for head in model.heads.values() for p in head[0].parameters()),
        *(p for head in model.heads.values() for p in head[2].parameters()),
    ]
    theirs = list(original.parameters())
    assert len(ours) == len(theirs) == len(list(model.parameters()))
    with torch.no_grad():
        for p, q in zip(theirs, ours, strict=True):
            p.copy_(q)
    step = mtl.Step(model, made, torch.optim.Adam(model.parameters(), lr=0.01), passes="joint")
    optimizer = torch.optim.Adam(theirs, lr=0.01)
    for batch in data:
        losses = step(batch).losses
        optimizer.zero_grad()
        values = [
            F.binary_cross_entropy(probability, batch[name])
            for name, probability in zip(names, original([batch[n] for n in fields]), strict=True)
        ]
        sum(values).backward()
        optimizer.step()
        assert [float(losses[name]) for name in names] == [float(value.detach()) for value in values]
    assert all(torch.equal(p, q) for p, q in zip(theirs, ours, strict=True))


def test_the_embedding_of_a_table_is_shared_by_default() -> None:
    columns = {"user": {"kind": "category", "size": 9}}
    trunk = partial(Table, columns, ["user"], num_features=6, hidden=[5], dimensions=4)
    model = PLE(trunk, tasks(), inputs=["user"])
    assert sum(isinstance(module, nn.Embedding) for module in model.modules()) == 1


class Pooled(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((1, 2, 3)).unsqueeze(1).expand(-1, 6)


class Tokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.float()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(PLE, layers=4), "at least 4 stages"),
        (lambda: built(MMoE, experts=0), "model.experts is 0; it must be a whole number of at least 1"),
        (lambda: built(MMoE, shared_stages=3), "at least 4 stages"),
        (lambda: built(DSelectK, experts=2, k=3), "model.k is 3; it must be at most model.experts, 2"),
        (lambda: built(MMoE)({"image": torch.zeros(2, 9).double()}), "the trunk can't take its inputs"),
        (lambda: built(MMoE, Pooled)({"image": torch.zeros(2, 1, 4, 4).double()}), "64 values a sample, and .* has 16"),
        (lambda: MMoE(Tokens, tasks(), inputs=["image"])({"image": torch.zeros(2, 6).long()}), "one floating-point"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
