"""Tasks that are absent from a step: the others are balanced as if alone, and the absent task's state is unchanged."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from test_balancing import NAMES, made

from mtl import balancers as b

# Besides each method as its config makes it, some whose state counts for more, or sooner.
MORE: dict[str, Callable[[], b.Balancer]] = {
    "db_mtl, sigma": lambda: b.DBMTL(sigma=0.5),
    "moco, rho": lambda: b.MoCo(beta=1.0, gamma=0.5, rho=0.1),
    "gradvac, beta": lambda: b.GradVac(beta=0.3),
    "excess_mtl, eta": lambda: b.ExcessMTL(eta=0.5),
    "stch, warm-up": lambda: b.STCH(mu=0.5, warmup_epochs=2),
    "gradnorm, lr": lambda: b.GradNorm(lr=0.2),
    "famo, lr": lambda: b.FAMO(lr=0.2, weight_decay=0.1),
}
ALL = {**{name: (lambda name=name: made(name)) for name in NAMES}, **MORE}
STATEFUL = {"db_mtl", "dwa", "excess_mtl", "famo", "gradnorm", "gradvac", "imtl", "imtl_l", "moco", "stch", "uw"}
OWN = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.25], dtype=torch.float64)
NEAR = {"rtol": 1e-9, "atol": 1e-12}


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def preparing(balancer: b.Balancer, own: torch.Tensor, num_tasks: int | None = None) -> b.Balancer:
    balancer.num_tasks = num_tasks
    if balancer.preference == "steer":
        balancer.own = own
    return balancer


def step(balancer: b.Balancer, number: int, tasks: list[int], own: torch.Tensor, *, told: bool) -> torch.Tensor:
    """Returns a balancer's results in one step: direction, weights, and factors of gradients that one task reaches.

    Args:
        balancer: The balancer.
        number: The number of the step, which determines losses and gradients.
        tasks: The tasks that take part.
        own: The weights of all tasks.
        told: Whether the balancer knows all tasks and which of them are present.
    """
    scale = own[tasks] if balancer.preference == "scale" else torch.ones(len(tasks), dtype=torch.float64)
    losses = scale * (numbers(number, len(own)).exp() + 0.1)[tasks]
    rows = scale[:, None] * numbers(number + 1000, len(own), 11)[tasks]
    if told:
        balancer.present = torch.tensor(tasks)
    if balancer.needs == "rows":
        pieces = {"a": rows[:, :4].reshape(-1, 2, 2).clone(), "b": rows[:, 4:].clone()}
        weights, direction = balancer.combine(losses, pieces)
        moved = torch.cat([direction["a"].flatten(), direction["b"]])
    else:
        seen = losses if balancer.needs in ("losses", "gramian") else torch.full_like(losses, torch.nan)
        weights = balancer.weights(seen, rows @ rows.T if balancer.needs == "gramian" else None)
        moved = weights @ rows
    assert weights.shape == (len(tasks),)
    alone = balancer.alone(losses)
    again = losses * (0.1 * numbers(number + 2000, len(own))[tasks]).exp() if balancer.needs_losses_after else None
    balancer.after(losses, again)
    return torch.cat([moved, weights, alone])


@pytest.mark.parametrize("name", list(ALL))
def test_present_tasks_are_balanced_as_if_there_were_no_others(name: str) -> None:
    tasks, own = [0, 2], OWN[:4]
    whole, part = preparing(ALL[name](), own, num_tasks=4), preparing(ALL[name](), own[tasks])
    for number in range(24):
        found = step(whole, number, tasks, own, told=True)
        torch.testing.assert_close(found, step(part, number, tasks, own, told=False), **NEAR, equal_nan=True)
        if number % 3 == 2:
            whole.epoch_end()
            part.epoch_end()


@pytest.mark.parametrize("name", list(ALL))
def test_tasks_that_never_meet_are_balanced_apart(name: str) -> None:
    """Two pairs by turns, the second from the seventh step on, are as two balancers that share nothing but draws."""
    groups, own = [[0, 2], [1, 3]], OWN[:4]
    whole = preparing(ALL[name](), own, num_tasks=4)
    parts = [preparing(ALL[name](), own[tasks]) for tasks in groups]
    if hasattr(whole, "generator"):
        parts[1].generator = parts[0].generator
    for number in range(40):
        turn = int(number > 5 and number % 3 > 0)
        found = step(whole, number, groups[turn], own, told=True)
        expected = step(parts[turn], number, groups[turn], own, told=False)
        torch.testing.assert_close(found, expected, **NEAR, equal_nan=True)
        if number % 4 == 3:
            for balancer in (whole, *parts):
                balancer.epoch_end()


@pytest.mark.parametrize("name", list(ALL))
def test_all_present_is_the_same_said_or_not(name: str) -> None:
    said, unsaid = preparing(ALL[name](), OWN, num_tasks=5), preparing(ALL[name](), OWN)
    for number in range(12):
        answers = [step(balancer, number, list(range(5)), OWN, told=balancer is said) for balancer in (said, unsaid)]
        torch.testing.assert_close(*answers, **NEAR, equal_nan=True)
        if number % 2:
            said.epoch_end()
            unsaid.epoch_end()


def slices(state: object, task: int, count: int, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Returns, by path, the parts of a state that belong to one task: slices of dimensions of size `count`."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from slices(value, task, count, f"{path}/{key}")
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            yield from slices(value, task, count, f"{path}/{index}")
    elif isinstance(state, torch.Tensor):
        for dimension in range(state.ndim):
            if state.shape[dimension] == count:
                yield f"{path}, dimension {dimension}", state.select(dimension, task)


SUBSETS = [[0, 3], [0, 1, 3], [3], [1, 2], [0, 1, 2, 3, 4], [0, 4], [1, 2, 3], [2], [0, 1, 2, 4], [1, 4]]


@pytest.mark.parametrize("name", list(ALL))
def test_an_absent_tasks_state_stays_as_it_is(name: str) -> None:
    balancer = preparing(ALL[name](), OWN, num_tasks=5)
    seen, epoch, looked, moved = set(), set(), 0, 0
    for number, tasks in enumerate(SUBSETS * 3):
        before = copy.deepcopy(balancer.state_dict())
        step(balancer, number, tasks, OWN, told=True)
        seen.update(tasks)
        epoch.update(tasks)
        touched = tasks
        if number % 2:
            balancer.epoch_end()
            touched, epoch = epoch, set()
        found = [dict(slices(balancer.state_dict(), task, 5)) for task in range(5)]
        unseen = [found[task] for task in range(5) if task not in seen]
        for task, now in enumerate(found):
            was = dict(slices(before, task, 5))
            same = {path: torch.equal(was[path], now[path]) for path in was.keys() & now.keys()}
            moved += not all(same.values())
            if task not in touched:
                looked += len(same)
                assert all(same.values()), f"{same} of task {task} in step {number} of {tasks}"
        for state in unseen:
            assert all(torch.equal(state[path], unseen[0][path]) for path in state)  # none has begun
    assert (looked >= 10, moved >= 10) == (name.split(",")[0] in STATEFUL,) * 2, (looked, moved)


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_steps_that_lack_tasks_go_on_after_a_reload(name: str, stop: int) -> None:
    answers = []
    for reloads in (False, True):
        torch.manual_seed(0)
        balancer, found = preparing(ALL[name](), OWN, num_tasks=5), []
        for number, tasks in enumerate(SUBSETS * 2):
            if reloads and number == stop:
                file = io.BytesIO()
                torch.save(balancer.state_dict(), file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                balancer, other = (preparing(ALL[name](), OWN, num_tasks=5) for _ in range(2))
                for one in (balancer, other):
                    one.load_state_dict(saved)
                step(other, 99, [0, 1, 3], OWN, told=True)  # whose state is its own
            found.append(step(balancer, number, tasks, OWN, told=True))
            if number % 3 == 2:
                balancer.epoch_end()
        answers.append(torch.cat(found))
    torch.testing.assert_close(*answers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", list(ALL))
def test_one_task_or_tasks_without_a_say_in_a_step(name: str) -> None:
    own = OWN * torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]) if ALL[name]().preference != "none" else torch.ones(5).double()
    balancer = preparing(ALL[name](), own, num_tasks=5)
    for number, tasks in enumerate([[1], [1, 3], [0], [0, 1], [1, 3], [2, 4], [1, 3], [3]] * 3):
        assert step(balancer, number, tasks, own, told=True).isfinite().all()
        if number % 3 == 2:
            balancer.epoch_end()
