"""Cross-stitch networks, against forward passes written out by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mtl
from mtl.architectures import CrossStitch, SeparateModels
from mtl.trunks import CNN, MLP

WIDTHS = [4, 5, 6]


def tasks_of(count: int) -> list[mtl.Task]:
    return [mtl.Task(f"t{n}", head=nn.Linear(6, 3), loss=nn.CrossEntropyLoss(), target=f"y{n}") for n in range(count)]


def cnn() -> nn.Module:
    return CNN(1, widths=WIDTHS, batch_norm=True)


def model_of(count: int = 3, **options: object) -> CrossStitch:
    torch.manual_seed(0)
    model = CrossStitch(cnn, tasks_of(count), inputs=["x"], **options).double()  # type: ignore[arg-type]
    model.eval()(batch_of())
    return model


def batch_of() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = {f"y{n}": torch.randint(3, (6,), generator=generator) for n in range(3)}
    return {"x": torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64), **labels}


def by_hand(trunks: list[nn.Module], alphas: list[Tensor], heads: list[nn.Module], x: Tensor) -> list[Tensor]:
    """Computes the predictions with a loop over stages, tasks and tasks."""
    values = [x] * len(trunks)
    for stage, alpha in enumerate(alphas):
        outputs = []
        for trunk, value in zip(trunks, values, strict=True):
            conv, norm = list(trunk.children())[4 * stage : 4 * stage + 2]
            outputs.append(torch.max_pool2d(torch.relu(norm(conv(value))), 2))
        values = []
        for row in alpha:
            mixed = torch.zeros_like(outputs[0])
            for weight, output in zip(row, outputs, strict=True):
                mixed = mixed + (weight if weight.ndim == 0 else weight[None, :, None, None]) * output
            values.append(mixed)
    # The last stage ends with the mean over the positions, which is linear.
    return [head(value.mean((2, 3))) for head, value in zip(heads, values, strict=True)]


@pytest.mark.parametrize("per_channel", [False, True])
def test_forward_is_that_of_the_paper(per_channel: bool) -> None:
    model = model_of(per_channel=per_channel)
    torch.manual_seed(0)  # the trunks are made in the order of the tasks
    heads = [task.head for task in tasks_of(3)]
    trunks = [cnn() for _ in range(3)]
    alphas = [torch.randn(3, 3, *([width] if per_channel else []), dtype=torch.float64) for width in WIDTHS]
    for unit, alpha in zip(model.trunk.units, alphas, strict=True):
        unit.weight.data.copy_(alpha)
    x = batch_of()["x"]
    expected = by_hand([t.double().eval() for t in trunks], alphas, [h.double() for h in heads], x)
    for prediction, wanted in zip(model(batch_of()).values(), expected, strict=True):
        torch.testing.assert_close(prediction, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
def test_identity_is_separate_models(per_channel: bool) -> None:
    """Losses, predictions and the trunks' gradients, bit for bit, in training mode."""
    stitched = model_of(initial=1.0, per_channel=per_channel)
    torch.manual_seed(0)
    separate = SeparateModels(cnn, tasks_of(3), inputs=["x"]).double()
    predictions = []
    for model in (stitched.train(), separate.train()):
        predictions.append(model(batch_of()))
        losses = [nn.functional.cross_entropy(predictions[-1][f"t{n}"], batch_of()[f"y{n}"]) for n in range(3)]
        sum(losses).backward()  # type: ignore[union-attr]
    assert all(torch.equal(predictions[0][task], predictions[1][task]) for task in predictions[1])
    ours = [p.grad for name, p in stitched.named_parameters() if ".units." not in name]
    theirs = [p.grad for p in separate.parameters()]
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("per_channel", [False, True])
def test_initial_weights_and_number_of_parameters(count: int, per_channel: bool) -> None:
    model = model_of(count, initial=0.7, per_channel=per_channel)
    for unit in model.trunk.units:
        torch.testing.assert_close(unit.weight.sum(1), torch.ones_like(unit.weight[0]))
        if count > 1:
            assert torch.allclose(unit.weight[1, 1], torch.tensor(0.7, dtype=torch.float64))
            assert torch.allclose(unit.weight[1, 0], torch.tensor(0.3 / (count - 1), dtype=torch.float64))
    of_trunk = sum(p.numel() for p in cnn().parameters())
    of_units = count**2 * (sum(WIDTHS) if per_channel else len(WIDTHS))
    assert sum(p.numel() for p in model.parameters()) == count * (of_trunk + 6 * 3 + 3) + of_units


def test_gradients_of_the_units_are_those_of_finite_differences() -> None:
    model = model_of(2)
    batch = batch_of()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(batch)["t0"], batch["y0"])

    loss().backward()
    for unit in model.trunk.units:
        for place in [(0, 1), (1, 0)]:
            value = unit.weight.data[place].item()
            ends = []
            for shift in (1e-5, -1e-5):
                unit.weight.data[place] = value + shift
                ends.append(loss().item())
            unit.weight.data[place] = value
            assert unit.weight.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_values_that_are_tuples() -> None:
    """A sequence and its mask: the sequences are mixed, by channel in the last dimension, and each keeps its mask."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x) * mask.unsqueeze(-1), mask

    class Last(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x.sum(1) / mask.sum(1, keepdim=True)

    torch.manual_seed(0)
    tasks = [mtl.Task(f"t{n}", head=nn.Identity(), loss=nn.MSELoss(), target="y") for n in range(2)]
    model = CrossStitch(lambda: nn.Sequential(Recurrent(), Last()), tasks, inputs=["x", "mask"], per_channel=True)
    x, mask = torch.randn(3, 5, 4), torch.tensor([[1.0, 1, 1, 1, 0]] * 3)
    model({"x": x, "mask": mask})
    model.trunk.units[0].weight.data = alpha = torch.randn(2, 2, 4)
    model.trunk.units[1].weight.data = beta = torch.randn(2, 2, 4)
    outputs = [model.trunk.trunks[f"t{n}"][0].linear(x) * mask.unsqueeze(-1) for n in range(2)]
    means = [sum(alpha[i, j] * outputs[j] for j in range(2)).sum(1) / 4 for i in range(2)]  # type: ignore[union-attr]
    for i, prediction in enumerate(model({"x": x, "mask": mask}).values()):
        torch.testing.assert_close(prediction, sum(beta[i, j] * means[j] for j in range(2)))


def test_stages_may_change_their_input_in_place() -> None:
    def trunk() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)))

    torch.manual_seed(0)
    model = CrossStitch(trunk, tasks_of(2), inputs=["x"])
    gradients = []
    for inplace in (True, False):
        other = copy.deepcopy(model)
        for stages in other.trunk.trunks.values():
            stages[1][0].inplace = inplace
        batch = {"x": torch.arange(12.0).reshape(3, 4)}
        (other(batch)["t0"].square().sum() + other(batch)["t1"].square().sum()).backward()
        gradients.append([p.grad for p in other.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_works_with_any_trunk_of_stages() -> None:
    model = CrossStitch(lambda: MLP(64, widths=[5, 6], dropout=0.2), tasks_of(2), inputs=["x"])
    assert len(model.trunk.units) == 2
    assert model({"x": torch.randn(3, 64)})["t0"].shape == (3, 3)
