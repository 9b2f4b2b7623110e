"""Sums over processes that run while the passes do: those of the gradients, and the counts of labels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtl
from mtl.batch import take
from mtl.gradients import overlap
from mtl.step import shares

DTYPE = torch.float64


class Routed(nn.Module):
    """Layers that only some samples reach; the gradient of `twice` arrives once or twice in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right, self.twice = (nn.Linear(4, 4) for _ in range(4))
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        out = torch.zeros_like(y)
        for place, layer in ((x[:, 0] > 0, self.left), (x[:, 0] <= 0, self.right)):
            if place.any():
                routed = checkpoint(self.twice, layer(y[place]), use_reentrant=True)
                out = out.index_put((place.nonzero()[:, 0],), routed)
        return out


def transpose_layout(parameter: Tensor) -> None:
    """Replaces a gradient with an equal one whose columns are contiguous."""
    assert parameter.grad is not None
    parameter.grad = parameter.grad.t().contiguous().t()


def train(passes: str, sizes: list[int], large: int = overlap.LARGE) -> tuple[list[Any], list[str]]:
    """Takes steps with this process's share of each batch; returns the gradients of each, and what happened.

    Gradients of `large` bytes or more are summed without a copy. Odd ranks have gradients in another memory layout.
    """
    torch.manual_seed(0)
    tasks = [mtl.Task(f"t{n}", head=nn.Linear(4, 1), loss=nn.MSELoss(), target=f"y{n}") for n in range(3)]
    model = mtl.MultiTaskModel(Routed(), tasks, inputs=["x"]).to(DTYPE)
    names = {parameter: name for name, parameter in model.named_parameters()}
    events: list[str] = []
    for parameter in model.trunk.first.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: events.append(f"arrived {names[p]}"))
    model.trunk.first.register_forward_pre_hook(lambda *_: events.append("forward"))
    begin, late, count = overlap.begin_sum, overlap.sum_tensors, shares.begin_sum_of_numbers
    if mtl.distributed.rank() % 2:
        model.trunk.first.weight.register_post_accumulate_grad_hook(transpose_layout)
    before = overlap.LARGE, overlap.FIRST, overlap.FOLLOWING
    overlap.LARGE, overlap.FIRST, overlap.FOLLOWING = large, 1, 1  # one parameter in each bucket

    def begin_sum(flat: Tensor) -> Any:
        events.append("sum")
        return begin(flat)

    def sum_tensors(tensors: list[Tensor]) -> None:
        events.extend(["late"] * len(tensors))
        late(tensors)

    def begin_sum_of_numbers(numbers: list[float]) -> Callable[[], list[float]]:
        wait = count(numbers)
        return lambda: events.append("counts") or wait()

    overlap.begin_sum, overlap.sum_tensors, shares.begin_sum_of_numbers = begin_sum, sum_tensors, begin_sum_of_numbers
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), passes=passes)
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    generator = torch.Generator().manual_seed(1)
    gradients = []
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for number, n in enumerate(sizes):
            events.append(f"step {number}")
            batch = {"x": torch.randn(n, 4, generator=generator, dtype=DTYPE)}
            for task in tasks:
                batch[task.target] = torch.randn(n, 1, generator=generator, dtype=DTYPE)
            batch["y1"][torch.arange(n) % 4 == 1] = torch.nan
            if number % 3 == 1:
                batch["y2"][:] = torch.nan
            step(take(batch, n, list(range(n))[rank::world]) if n > rank else {})
            events.append("end")
            gradients.append({names[p]: None if p.grad is None else p.grad.tolist() for p in model.parameters()})
            kept += [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
        assert all(torch.equal(gradient, copy) for gradient, copy in kept)  # a later step doesn't change them
    finally:
        overlap.begin_sum, overlap.sum_tensors, shares.begin_sum_of_numbers = begin, late, count
        overlap.LARGE, overlap.FIRST, overlap.FOLLOWING = before
    return gradients, events


def of_steps(events: list[str]) -> list[list[str]]:
    """Divides a list of events into those of each step."""
    starts = [number for number, event in enumerate(events) if event.startswith("step")]
    return [events[start + 1 : end] for start, end in zip(starts, [*starts[1:], len(events)], strict=True)]


@pytest.mark.parametrize(("passes", "large"), [("joint", 1), ("joint", 64), ("shared", 1000), ("sequential", 1000)])
def test_sums_begin_before_the_backward_ends(passes: str, large: int) -> None:
    for _, events in processes(2)(train, passes, [64] * 6, large):
        first, second, third, *others = of_steps(events)
        assert [first.count("late"), second.count("late")] == [14, 12]  # the first steps with these tasks
        assert "sum" not in first + second
        for count, step in ((14, third), (14, others[0]), (12, others[1]), (14, others[2])):
            assert [step.count("sum"), step.count("late")] == [count, 0]
            last = max(number for number, event in enumerate(step) if event.startswith("arrived"))
            assert step[:last].count("sum") >= count - 2


@pytest.mark.parametrize("passes", ["joint", "shared"])  # sequential passes need weights before each forward pass
def test_counts_arrive_during_the_forward_pass(passes: str) -> None:
    for _, events in processes(2)(train, passes, [64] * 3):
        step = of_steps(events)[2]
        assert step.index("forward") < step.index("counts") < step.index("sum")


@pytest.mark.parametrize(("passes", "large"), [("joint", 64), ("shared", 1), ("sequential", 1000)])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_reach_different_parameters(world: int, passes: str, large: int) -> None:
    sizes = [9, 6, 1, 2, 12, 1, 3, 7, 2, 12, 2, 1, 5]  # with one sample, the other processes have none
    alone, _ = train(passes, sizes)
    results = processes(world)(train, passes, sizes, large)
    for gradients, events in results:
        assert gradients == results[0][0]
        assert any("sum" in step and "late" in step for step in of_steps(events))
        for ours, theirs in zip(gradients, alone, strict=True):
            assert {name for name, g in ours.items() if g is None} == {name for name, g in theirs.items() if g is None}
            for name, gradient in theirs.items():
                if gradient is not None:
                    torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(gradient), rtol=1e-5, atol=1e-6)
