"""A training that is resumed with another number of processes, or sharded, differs by rounding only."""

from pathlib import Path

import pytest
import torch
from processes import processes
from torch import Tensor, nn

import mtl
from mtl.data import Fields, Loader
from mtl.distributed.sharding import whole
from mtl.training import checkpoint
from mtl.training.layouts import fitted
from mtl.training.options import Checkpoints
from mtl.training.trainer import Trainer


def trained(folder: Path, how: str, balancer: str, epochs: int, resumed: bool) -> dict[str, Tensor]:
    """Trains for epochs of ten steps of SGD, from the last checkpoint if it is resumed; returns the parameters."""
    torch.manual_seed(int(resumed))
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(76, 6, generator=generator)
    fields = {"x": x, "a": (x[:, 0] > 0).long(), "b": x[:, 1:3] ** 2}
    fields["b"][torch.rand(76, 2, generator=generator) < 0.3] = torch.nan
    tasks = [
        mtl.Task("a", head=nn.Linear(16, 2), loss=nn.CrossEntropyLoss(), target="a"),
        mtl.Task("b", head=nn.Linear(16, 2), loss=nn.MSELoss(), target="b"),
    ]
    trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    mtl.distributed.prepare(model, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)())
    loader = Loader(Fields(fields), batch_size=8, shuffle=True)
    trainer = Trainer(step, loader, max_epochs=epochs, checkpoints=Checkpoints(folder))
    if resumed:
        state = checkpoint.newest(folder, pytest.fail, whole=False)
        trainer.load_state_dict(fitted(state, model, step.descent.parameters()))
    trainer.fit()
    assert trainer.global_step == 10 * epochs
    return {name: whole(value).detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("balancer", ["UPGrad", "Equal", "UW"])
@pytest.mark.parametrize(
    ("before", "how", "after", "then"),
    [(2, "ddp", 3, "ddp"), (2, "ddp", 1, "ddp"), (2, "ddp", 2, "fsdp"), (3, "fsdp", 2, "ddp"), (2, "fsdp", 4, "fsdp")],
)
def test_twenty_steps_after_a_resume(
    tmp_path: Path, before: int, how: str, after: int, then: str, balancer: str
) -> None:
    """The differences are those that docs/concepts/resume.md names, relative to the largest value."""
    calm = processes(before)(trained, tmp_path / "calm", how, balancer, 3, False)[0]
    processes(before)(trained, tmp_path / "run", how, balancer, 1, False)
    resumed = (tmp_path / "run", then, balancer, 3, True)
    results = processes(after)(trained, *resumed) if after > 1 else [trained(*resumed)]
    for parameters in results:
        for name, value in calm.items():
            assert float((parameters[name] - value).abs().max()) <= 1e-6 * float(value.abs().max()), name
