"""A loss that is not finite in one process ends the training in all of them, with the same message."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import processes
from torch import Tensor, nn

import mtl
from mtl.data import Fields, Loader
from mtl.training.options import Checkpoints, Logs
from mtl.training.trainer import Trainer


class Faulty(nn.Module):
    """A squared error that is NaN, or has an infinite gradient, for labels above 10."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = (prediction - target).square()
        if self.what == "loss":
            return torch.where(target > 10, math.nan, error).mean()
        return (error + torch.where(target > 10, prediction - prediction.detach(), 1.0).sqrt()).mean()


def ended(folder: str, balancer: str, what: str) -> tuple[str, int]:
    """Trains until the loss or the gradient of task b isn't finite, and returns the message and the steps taken."""
    torch.manual_seed(0)
    fields = {name: torch.randn(40, size) for name, size in (("x", 3), ("a", 1), ("b", 1))}
    fields["b"][27] = 20.0  # in the fourth batch of 8 samples, the share of the process of rank 1
    losses: dict[str, Any] = {"a": nn.MSELoss(), "b": Faulty(what)}
    tasks = [
        mtl.Task(n, head=nn.Linear(4, 1), loss=losses[n], target=n, mean_over="samples" if n == "b" else None)
        for n in "ab"
    ]
    model = mtl.MultiTaskModel(nn.Linear(3, 4), tasks, inputs=["x"])
    mtl.distributed.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)())
    record = Path(folder, "nonfinite.jsonl") if mtl.distributed.rank() == 0 else None
    logs = Logs(every=2, report=lambda line: None, nonfinite=record)
    loader = Loader(Fields(fields), batch_size=8)
    trainer = Trainer(step, loader, max_epochs=2, checkpoints=Checkpoints(Path(folder)), logs=logs)
    try:
        trainer.fit()
    except mtl.UserError as error:
        return str(error), trainer.global_step
    return "nothing", trainer.global_step


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("balancer", ["UPGrad", "Equal"])
def test_all_processes_end_with_the_message_of_one(tmp_path: Path, balancer: str, what: str, world: int) -> None:
    """A balancer that needs gradients notices it in the step; otherwise the losses are read in the next line of the log.

    An infinite gradient makes the parameters, and thereby all losses of the next step, NaN.
    """
    (tmp_path / "alone").mkdir()
    (tmp_path / "together").mkdir()
    alone = ended(str(tmp_path / "alone"), balancer, what)
    assert "task 'b': its " in alone[0]
    assert alone[0].count("samples 24, 25, 26, 27, 28, 29, 30, 31") == 1
    assert processes(world)(ended, str(tmp_path / "together"), balancer, what) == [alone] * world
    records = [(tmp_path / each / "nonfinite.jsonl").read_text() for each in ("alone", "together")]
    assert records[0] == records[1]
    assert len(records[0].splitlines()) == 1
