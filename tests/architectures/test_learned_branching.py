"""Learned branching: the draws, the temperature, and the tree, against values written out by hand."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import mtl
from mtl.architectures import LearnedBranching
from mtl.architectures.learned_branching import Choice
from mtl.errors import UserError
from mtl.trunks import CNN, MLP

WIDTHS = [4, 5, 6]


def tasks_of(count: int = 3) -> list[mtl.Task]:
    return [mtl.Task(f"t{n}", head=nn.Linear(6, 3), loss=nn.CrossEntropyLoss(), target=f"y{n}") for n in range(count)]


def cnn() -> nn.Module:
    return CNN(1, widths=WIDTHS)


def batch_of() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = {f"y{n}": torch.randint(3, (6,), generator=generator) for n in range(3)}
    return {"x": torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64), **labels}


def model_of(*, scattered: bool = False, **options: object) -> tuple[LearnedBranching, list[mtl.Task]]:
    """Returns a model; with `scattered`, the logits have random values."""
    torch.manual_seed(0)
    tasks = tasks_of()
    model = LearnedBranching(cnn, tasks, inputs=["x"], **options).double()  # type: ignore[arg-type]
    if scattered:
        for choice in model._choices():
            nn.init.normal_(choice.logits)
    return model, tasks


def test_frequencies_of_the_draws_are_the_softmax() -> None:
    choice = Choice(2, 3)
    choice.logits.data = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5]])
    model, _ = model_of()
    model._choices = lambda: [choice]  # type: ignore[method-assign]
    count = 4000
    total = torch.zeros(2, 3)
    for step in range(count):  # successive steps draw from generators with different seeds
        model.begin_step(step)
        total += choice.weights().detach()
    probabilities = choice.logits.detach().exp()
    probabilities /= probabilities.sum(1, keepdim=True)
    error = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((total / count - probabilities).abs() < 4 * error).all()


def test_weights_are_one_hot_with_the_gradient_of_the_softmax() -> None:
    choice = Choice(2, 3).double()
    choice.begin(0.7, torch.Generator().manual_seed(5))
    nn.init.normal_(choice.logits)
    factors = torch.randn(2, 3, dtype=torch.float64)
    weights = choice.weights()
    assert torch.equal(weights.sort(1).values, torch.tensor([[0.0, 0.0, 1.0]] * 2, dtype=torch.float64))
    (weights * factors).sum().backward()
    soft = [[math.exp((choice.logits[j, i] + choice.noise[j, i]).item() / 0.7) for i in range(3)] for j in range(2)]
    for j in range(2):
        p = [value / sum(soft[j]) for value in soft[j]]
        assert weights[j].argmax().item() == p.index(max(p))
        mean = sum(p[i] * factors[j, i].item() for i in range(3))
        for i in range(3):
            wanted = p[i] * (factors[j, i].item() - mean) / 0.7
            assert choice.logits.grad[j, i].item() == pytest.approx(wanted, rel=1e-10)  # type: ignore[index]


def test_temperature() -> None:
    model, tasks = model_of(temperature=8.0, min_temperature=0.5)
    assert [model.temperature_at(step) for step in (0, 3, 15, 255, 10_000)] == [8.0, 4.0, 2.0, 0.5, 0.5]
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))
    seen = []
    for _ in range(4):
        step(batch_of())
        seen.append({choice.temperature.item() for choice in model._choices()})
    assert seen == [{8.0}, {8 / math.sqrt(2)}, {8 / math.sqrt(3)}, {4.0}]


def test_forward_in_training_goes_through_the_sampled_blocks() -> None:
    model, tasks = model_of(scattered=True, num_branches=4)
    trees = set()
    for step in range(6):
        model.begin_step(step)
        parents = [(choice.logits + choice.noise).argmax(1).tolist() for choice in model._choices()]
        predictions = model(batch_of())
        for number, task in enumerate(tasks):
            last = parents[2 + number][0]
            middle = parents[1][last]
            first = parents[0][middle]
            x = batch_of()["x"]
            for stage, block in enumerate((first, middle, last)):
                x = model.trunk.blocks[stage][block](x)
            torch.testing.assert_close(predictions[task.name], task.head(x), rtol=1e-12, atol=1e-12)
            trees.add((first, middle, last))
    assert len(trees) > 6  # otherwise the draws hardly differ between steps


def test_eval_mode_goes_through_the_tree_and_no_other_block() -> None:
    model, tasks = model_of(scattered=True, num_branches=4)
    model.eval()
    called: Counter[tuple[int, int]] = Counter()
    for stage, blocks in enumerate(model.trunk.blocks):
        for number, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, place=(stage, number): called.update([place]))  # type: ignore[misc]
    predictions = model(batch_of())
    tree = model.tree()
    assert called == dict.fromkeys({(s, block) for path in tree.values() for s, block in enumerate(path)}, 1)
    between = [choice.logits.argmax(1).tolist() for choice in model.trunk.choices]
    for task in tasks:
        path = tree[task.name]
        assert path[2] == model.branches[task.name].logits.argmax().item()
        assert path[:2] == [between[0][path[1]], between[1][path[2]]]
        x = batch_of()["x"]
        for stage, block in enumerate(path):
            x = model.trunk.blocks[stage][block](x)
        assert torch.equal(predictions[task.name], task.head(x))


def test_one_branch_is_hard_sharing() -> None:
    model, tasks = model_of(num_branches=1)
    trunk = CNN(1, widths=WIDTHS).double()
    for ours, theirs in zip(model.trunk.blocks.parameters(), trunk.parameters(), strict=True):
        theirs.data.copy_(ours)
    hard = mtl.MultiTaskModel(trunk, copy.deepcopy(tasks), inputs=["x"]).double()
    for each in (model, hard):
        mtl.Step(each, tasks if each is model else list(tasks)).backward(batch_of())
    for training in (True, False):
        expected = hard.train(training)(batch_of())
        assert all(torch.equal(value, expected[name]) for name, value in model.train(training)(batch_of()).items())
    for ours, theirs in zip(model.trunk.blocks.parameters(), trunk.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert model.tree() == {task.name: [0, 0, 0] for task in tasks}


@pytest.mark.parametrize("branches", [None, 2, 5])
def test_number_of_parameters(branches: int | None) -> None:
    model, tasks = model_of(num_branches=branches)
    count = branches or len(tasks)
    of_trunk = sum(p.numel() for p in cnn().parameters())
    of_logits = (len(WIDTHS) - 1) * count**2 + len(tasks) * count
    assert sum(p.numel() for p in model.parameters()) == count * of_trunk + of_logits + 3 * (6 * 3 + 3)


def test_draws_depend_on_seed_and_step_and_leave_the_random_state() -> None:
    def noise(seed: int, step: int) -> Tensor:
        model, _ = model_of(seed=seed)
        state = torch.get_rng_state()
        model.begin_step(step)
        assert torch.equal(state, torch.get_rng_state())
        return torch.cat([choice.noise.flatten() for choice in model._choices()])

    assert torch.equal(noise(1, 7), noise(1, 7))
    assert not torch.isclose(noise(1, 7), noise(1, 8)).any()
    assert not torch.isclose(noise(1, 7), noise(2, 7)).any()


@pytest.mark.parametrize("balancer", ["Equal", "UPGrad"])
def test_micro_batches_draw_the_tree_of_the_whole_batch(balancer: str) -> None:
    results = []
    for size in (None, 2):
        model, tasks = model_of(scattered=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)(), micro_batch_size=size)
        for _ in range(3):
            step(batch_of())
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_a_resumed_step_goes_on_bit_for_bit() -> None:
    def made() -> tuple[LearnedBranching, mtl.Step]:
        model, tasks = model_of(scattered=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, mtl.Step(model, tasks, optimizer)

    model, step = made()
    for _ in range(3):
        step(batch_of())
    states = copy.deepcopy((model.state_dict(), step.state_dict()))
    other, resumed = made()
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert other.trunk.choices[0].temperature.item() == pytest.approx(10 / math.sqrt(3))
    for _ in range(2):
        step(batch_of())
        resumed(batch_of())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_lazy_blocks_outside_of_the_tree_get_their_shapes() -> None:
    tasks = tasks_of(2)
    model = LearnedBranching(lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(6)), tasks, inputs=["x"])
    model.eval()({"x": torch.randn(3, 5)})
    assert {tuple(p.shape) for p in model.trunk.blocks[1].parameters()} == {(6, 4), (6,)}


def test_frozen_logits_train_the_tree_alone() -> None:
    model, tasks = model_of(scattered=True)
    model.freeze(["trunk.choices", "branches"])
    before = copy.deepcopy(model.state_dict())
    tree = model.tree()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    mtl.Step(model, tasks, optimizer)(batch_of())
    on_tree = {f"trunk.blocks.{stage}.{block}." for path in tree.values() for stage, block in enumerate(path)}
    for name, value in model.state_dict().items():
        if name.endswith("weight") and name.startswith("trunk.blocks."):
            changed = any(name.startswith(prefix) for prefix in on_tree)
            assert torch.equal(value, before[name]) != changed, name
    assert model.tree() == tree


def test_blocks_may_change_their_input_in_place() -> None:
    def trunk() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)))

    torch.manual_seed(0)
    model = LearnedBranching(trunk, tasks_of(2), inputs=["x"])
    model.trunk.blocks[1][1].insert(0, nn.Hardtanh(inplace=True))
    model.branches["t1"].logits.data[0, 1] = 1.0
    x = torch.randn(5, 4)
    predictions = model.eval()({"x": x})
    first = model.trunk.blocks[0][0](x)
    for number, task in enumerate(("t0", "t1")):
        values = first.clone().clamp(-1, 1) if number else first.clone()
        expected = model.heads[task](model.trunk.blocks[1][number][-1](values.relu()))
        assert torch.equal(predictions[task], expected)


@pytest.mark.parametrize("name", ["num_branches", "temperature", "min_temperature"])
def test_errors(name: str) -> None:
    with pytest.raises(UserError, match=f"model.{name} is 0; it must be above 0"):
        LearnedBranching(lambda: MLP(4, widths=[6]), tasks_of(), inputs=["x"], **{name: 0})  # type: ignore[arg-type]


def test_what_passes_by_a_stage_is_that_of_the_chosen_parent() -> None:
    choice = Choice(1, 2).train()
    choice.logits.data = torch.tensor([[0.0, 40.0]])
    choice.noise.zero_()
    values = [(torch.ones(2), "of the first"), (torch.zeros(2), "of the second")]
    ((tensor, rest),) = choice(values)
    assert (tensor.tolist(), rest) == ([0.0, 0.0], "of the second")
    ((tensor, rest),) = choice.eval()(values)
    assert (tensor.tolist(), rest) == ([0.0, 0.0], "of the second")
