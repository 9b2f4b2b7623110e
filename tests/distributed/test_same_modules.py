"""Sharded models whose samples decide which modules run: right if the same modules run everywhere, refused if not."""

import pytest
import torch
from processes import processes
from torch import Tensor, nn

import mtl
from mtl.distributed.sharding import whole


class Routed(nn.Module):
    """Experts, of which only those run that samples are sent to.

    Args:
        widths: The width of each expert.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, n), nn.Tanh(), nn.Linear(n, 4)) for n in widths)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        mixed = x.new_zeros(len(x), 4)
        for number, each in enumerate(self.experts):
            if (expert == number).any():
                mixed = mixed.index_put((expert == number,), each(x[expert == number]))
        return mixed


def routed(how: str, widths: list[int], experts: list[int]) -> tuple[str, list[list[float]]]:
    """Takes a step in which sample n is sent to an expert, and returns the message or the parameters."""
    torch.manual_seed(0)
    tasks = [mtl.Task(n, head=nn.Linear(4, 1), loss=nn.MSELoss(), target=n) for n in "ab"]
    model = mtl.MultiTaskModel(Routed(widths), tasks, inputs=["x", "expert"])
    drawn = {name: torch.randn(len(experts), size) for name, size in (("x", 3), ("a", 1), ("b", 1))}
    mtl.distributed.prepare(model, how)
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=mtl.balancers.UPGrad())
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    batch = {name: value[rank::world] for name, value in {**drawn, "expert": torch.tensor(experts)}.items()}
    try:
        step(batch)
    except mtl.UserError as error:
        return str(error), []
    return "", [whole(p.detach()).flatten().tolist() for p in model.parameters()]


def test_experts_that_other_processes_do_not_run_are_refused() -> None:
    """The experts have the same size, so that the processes would mix the parts of both."""
    for message, _ in processes(2)(routed, "fsdp", [5, 5], [0, 1, 0, 1]):
        assert message.startswith("the processes of rank 0 and 1 ran different modules in this step: ")
        assert "'trunk.experts.0" in message
        assert "'trunk.experts.1" in message
        assert "take distributed=ddp" in message


@pytest.mark.parametrize("experts", [[0, 0, 0, 1, 1, 1], [1, 0, 0, 1]])
def test_experts_that_all_processes_run_are_right(experts: list[int]) -> None:
    _, alone = routed("ddp", [5, 5], experts)
    for message, parameters in processes(2)(routed, "fsdp", [5, 5], experts):
        assert message == ""
        for ours, theirs in zip(parameters, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_replicas_may_run_different_experts() -> None:
    _, alone = routed("ddp", [5, 5], [0, 1, 0, 1])
    for message, parameters in processes(2)(routed, "ddp", [5, 5], [0, 1, 0, 1]):
        assert message == ""
        for ours, theirs in zip(parameters, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
