"""Losses and balancers that draw random numbers draw the same ones in all processes; other seeds draw other ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import processes
from torch import Tensor, nn

import mtl
from mtl.balancers.learned import Learned
from mtl.data import Fields, Loader
from mtl.process.seeding import seed_process
from mtl.training import checkpoint
from mtl.training.trainer import Checkpoints, Trainer

FIELDS = {"x": 3, "a": 2, "b": 2}


def fields(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, size, generator=generator) for name, size in FIELDS.items()}


def sampled(prediction: Tensor, target: Tensor) -> Tensor:
    """A contrastive loss with one drawn negative for each sample, whose gradient is also drawn."""
    prediction.register_hook(lambda gradient: gradient * torch.rand(()))
    negative = target[torch.randint(len(target), (len(target),))]
    return ((prediction - target).square() - (prediction - negative).square().clamp(max=1)).mean().exp()


def of_whole(balancer: str, micro: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains with a loss of the whole batch that draws; returns the numbers of this process."""
    torch.manual_seed(0)
    tasks = [mtl.Task(n, head=nn.Linear(4, 2), loss=sampled, target=n, whole_batch=n == "a") for n in "ab"]
    tasks[1].loss = nn.MSELoss()
    model = mtl.MultiTaskModel(nn.Linear(3, 4), tasks, inputs=["x"])
    made = getattr(mtl.balancers, balancer)()
    torch.manual_seed(seed + mtl.distributed.rank())
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=made, **micro)
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    batch = {name: value[rank::world] for name, value in fields(11).items()}
    results = [step(batch, measure=number == 1) for number in range(3)]
    numbers = [[*map(float, (*r.losses.values(), *r.weights.values()))] for r in results]
    cosines = [float(cosine) for cosine in (results[1].cosines or {}).values()]
    return {
        "numbers": numbers,
        "cosines": cosines,
        "model": [p.tolist() for p in model.parameters()],
        "learned": made.learned.values.tolist() if isinstance(made.learned, Learned) else [],
    }


@pytest.mark.parametrize("micro", [{}, {"micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize("balancer", ["UW", "UPGrad", "FAMO", "Equal"])
def test_a_loss_of_the_whole_batch_is_one_function(balancer: str, micro: dict[str, Any]) -> None:
    """All processes then have the same losses, weights and parameters, and those of the balancer are learned alike."""
    results = processes(3)(of_whole, balancer, micro, 100)
    assert results[0] == results[1] == results[2]
    assert len({losses for losses, *_ in results[0]["numbers"]}) == 3  # other draws in each step
    assert results[0]["numbers"] != processes(3)(of_whole, balancer, micro, 200)[0]["numbers"]


class Noise(mtl.balancers.Balancer):
    """A balancer that draws from the global generators in each of its methods."""

    needs = "gramian"
    state_names = ("drawn",)

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def _draw(self, like: Tensor) -> Tensor:
        numbers = torch.rand(len(like), dtype=like.dtype) + 0.5
        self.drawn = [*self.drawn, *numbers.tolist()]
        return numbers

    def weights(self, losses: Tensor, gramian: Tensor | None) -> Tensor:
        return self._draw(losses)

    def alone(self, losses: Tensor) -> Tensor:
        return self._draw(losses)

    def after(self, losses: Tensor, again: Tensor | None) -> None:
        self._draw(losses)

    def epoch_end(self) -> None:
        self._draw(torch.zeros(1))


def noisy(folder: Path, seed: int, epochs: int, resumed: bool) -> list[Any]:
    """Trains a model with dropout and a balancer that draws, from the last checkpoint if it is resumed."""
    torch.manual_seed(0)
    tasks = [mtl.Task(n, head=nn.Linear(4, 2), loss=nn.MSELoss(), target=n) for n in "ab"]
    trunk = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    torch.manual_seed(seed)
    balancer = Noise()
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=balancer)
    seed_process(0)
    data, checkpoints = Loader(Fields(fields(8)), batch_size=4), Checkpoints(folder, every_steps=3)
    trainer = Trainer(step, data, None, max_epochs=epochs, checkpoints=checkpoints)
    if resumed:
        torch.manual_seed(7)
        trainer.load_state_dict(checkpoint.newest(folder, pytest.fail))
    trainer.fit()
    return [balancer.drawn, [p.tolist() for p in model.parameters()], float(torch.rand(()))]


def test_a_balancer_draws_the_same_in_all_processes_and_in_a_resumed_run(tmp_path: Path) -> None:
    first, second = processes(2)(noisy, tmp_path / "calm", 100, 3, False)
    assert first[:2] == second[:2]
    assert first[2] != second[2]  # the processes' own generators continue from where they were
    assert len(set(first[0])) == len(first[0]) == 3 * (2 * 3 * 2 + 1)  # other numbers in each call
    processes(2)(noisy, tmp_path / "run", 100, 1, False)
    assert processes(2)(noisy, tmp_path / "run", 100, 3, True) == [first, second]
    (other, _) = processes(2)(noisy, tmp_path / "other", 101, 1, False)
    assert not set(other[0]) & set(first[0])
