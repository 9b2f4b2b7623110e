"""How each method with a state treats absent tasks, computed by hand; test_presence.py has the common properties."""

import pytest
import torch
from test_presence import OWN, SUBSETS, numbers, preparing, step

from mtl import balancers as b
from mtl.balancers.learned import Learned


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_learned_numbers_are_those_of_torchs_adam_with_an_optimizer_each(decay: float) -> None:
    learned = Learned(lr=0.05, weight_decay=decay, initial=1.0)
    learned.at(4, torch.device("cpu"))
    each = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    adams = [torch.optim.Adam([value], lr=0.05, weight_decay=decay) for value in each]
    for number in range(200):
        tasks = [task for task in range(4) if (number // (task + 1)) % 2 or number % 50 == 0]
        gradient = numbers(number, 4)
        learned.step(gradient[tasks], torch.tensor(tasks, dtype=torch.int64))
        for task in tasks:
            each[task].grad = gradient[task : task + 1].clone()
            adams[task].step()
        torch.testing.assert_close(learned.values, torch.cat(each).detach(), rtol=1e-13, atol=1e-14)
    together = torch.ones(4, dtype=torch.float64, requires_grad=True)
    adam, learned = (
        torch.optim.Adam([together], lr=0.05, weight_decay=decay),
        Learned(lr=0.05, weight_decay=decay, initial=1.0),
    )
    learned.at(4, torch.device("cpu"))
    for number in range(200):
        together.grad = numbers(number, 4)
        adam.step()
        learned.step(numbers(number, 4))
        torch.testing.assert_close(learned.values, together.detach(), rtol=1e-13, atol=1e-14)


def told(balancer: b.Balancer, tasks: list[int]) -> b.Balancer:
    balancer.num_tasks, balancer.present = 3, torch.tensor(tasks)
    return balancer


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_dwa_of_tasks_that_miss_epochs_by_hand() -> None:
    """Means of task 0: 2, 4, 8; of task 1: 1 (of 1 step), nothing, 3; of task 2: 5 in the third epoch alone."""
    dwa = b.DWA(temperature=2.0)
    for epoch in ([([0, 1], (1.0, 1.0)), ([0], (3.0,))], [([0], (4.0,))], [([0, 1], (8.0, 3.0)), ([2], (5.0,))]):
        for tasks, losses in epoch:
            told(dwa, tasks).after(tensor(*losses), None)
        dwa.epoch_end()
    told(dwa, [0, 1, 2])
    expected = 3 * (tensor(8 / 4, 3 / 1, 1) / 2).softmax(0)  # the third has one mean only
    torch.testing.assert_close(dwa.weights(torch.full((3,), torch.nan).double(), None), expected)
    told(dwa, [1, 2])
    expected = 2 * (tensor(3, 1) / 2).softmax(0)
    torch.testing.assert_close(dwa.weights(torch.full((2,), torch.nan).double(), None), expected)


def test_stch_of_tasks_whose_warm_ups_end_apart_by_hand() -> None:
    stch = b.STCH(mu=0.5, warmup_epochs=1)
    stch.own = tensor(1.0, 2.0, 5.0)
    told(stch, [0, 1]).after(tensor(4.0, 6.0), None)
    told(stch, [1]).after(tensor(10.0), None)
    stch.epoch_end()
    losses = tensor(1.0, 2.0, 7.0)
    told(stch, [0, 1, 2])
    divided = ((tensor(1 * 1 / 4, 2 * 2 / 8)).log() / 0.5).softmax(0) * 3 / 8
    expected = torch.cat([divided, tensor(5 / 8)]) / losses
    torch.testing.assert_close(stch.weights(losses, None), expected)
    torch.testing.assert_close(told(stch, [2]).weights(tensor(7.0), None), tensor(1 / 7))
    told(stch, [0, 1, 2]).after(tensor(1.0, 5.0, 3.0), None)
    stch.epoch_end()
    divided = (tensor(1 * 1 / 4, 2 * 2 / 8, 5 * 7 / 3).log() / 0.5).softmax(0)  # the first two nadirs stay
    torch.testing.assert_close(stch.weights(losses, None), divided / losses)


def test_weights_that_have_a_sum_keep_it_over_all_tasks() -> None:
    balancers = [preparing(kind(), OWN, num_tasks=5) for kind in (b.MoCo, b.ExcessMTL, b.GradNorm)]
    for number, tasks in enumerate(SUBSETS * 3):
        for balancer in balancers:
            step(balancer, number, tasks, OWN, told=True)
    moco, excess, gradnorm = balancers
    torch.testing.assert_close(moco.simplex.sum(), tensor(1.0)[0])
    torch.testing.assert_close(excess.logits.exp().sum(), tensor(5.0)[0])
    torch.testing.assert_close((OWN * gradnorm.learned.values).sum(), OWN.sum())
    assert moco.simplex.std() > 0.01
    assert excess.logits.std() > 0.01
    assert gradnorm.learned.values.std() > 0.01


def test_moco_of_tasks_that_have_lost_all_their_weight() -> None:
    moco = told(b.MoCo(), [0, 2])
    moco.simplex = tensor(0.0, 1.0, 0.0)
    weights, _ = moco.combine(torch.ones(2).double(), {"a": torch.eye(2).double()})
    torch.testing.assert_close(weights, tensor(0.5, 0.5))  # alike, as in a first step
    assert torch.equal(moco.simplex, tensor(0.0, 1.0, 0.0))


def test_a_step_not_taken_leaves_its_draw_to_one_of_other_tasks() -> None:
    rlw = told(b.RLW(seed=3), [0, 1, 2])
    rlw.weights(torch.full((3,), torch.nan).double(), None)  # and no `after`
    weights = told(rlw, [0, 2]).weights(torch.full((2,), torch.nan).double(), None)
    assert weights.shape == (2,)
    assert float(weights.sum()) == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["GradVac", "ExcessMTL", "PCD"])
def test_torchjd_aggregators_with_a_state_need_the_same_tasks(name: str) -> None:
    balancer = preparing(b.TorchJD(aggregator=name), OWN, num_tasks=5)
    for number in range(3):
        torch.manual_seed(number)
        found = step(balancer, number, [1, 3], OWN, told=True)
    part = b.TorchJD(aggregator=name)
    for number in range(3):
        torch.manual_seed(number)
        expected = step(part, number, [1, 3], OWN, told=False)
    assert torch.equal(found, expected)
    other = preparing(b.TorchJD(aggregator=name), OWN, num_tasks=5)
    other.load_state_dict(balancer.state_dict())
    for one in (balancer, other):
        with pytest.raises(
            ArithmeticError, match=rf"{name} has a state for the tasks with the indices \[1, 3\], .* has \[1, 2\]"
        ):
            step(one, 3, [1, 2], OWN, told=True)
        step(one, 3, [1, 3], OWN, told=True)


def test_torchjd_aggregators_with_numbers_for_each_task_need_them_all() -> None:
    balancer = preparing(b.TorchJD(aggregator="UPGrad", pref_vector=torch.ones(5).double()), OWN, num_tasks=5)
    step(balancer, 0, [0, 1, 2, 3, 4], OWN, told=True)
    with pytest.raises(ValueError, match="Found `matrix` with 2 rows"):
        step(balancer, 1, [0, 1], OWN, told=True)
