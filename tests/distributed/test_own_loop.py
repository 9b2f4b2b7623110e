"""A step in loops of one's own: the documentation's script, and Lightning with replicated and sharded parameters."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

SAVE = """
torch.save(model.state_dict(), f"rank{RANK}.pt")
"""
LIGHTNING = """
import os
import sys

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

import mtl
from mtl.distributed.sharding import whole

devices, out, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)


class Module(lightning.LightningModule):
    def __init__(self, model, tasks):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.tasks, self.multi_task = model, tasks, None

    def configure_model(self):
        if self.multi_task is None:
            if how == "fsdp":
                mtl.distributed.prepare(self.model, "fsdp")
            self.multi_task = mtl.Step(self.model, self.tasks, balancer=mtl.balancers.UPGrad())

    def training_step(self, batch, _):
        result = self.multi_task.backward(batch)
        self.optimizers().step()
        self.multi_task.after(batch)
        self.log_dict({f"loss/{name}": loss for name, loss in result.losses.items()})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=0.01)


n = 22
data = {"x": torch.randn(n, 5), "a": torch.randn(n, 1), "b": torch.randint(3, (n,)), "c": torch.randn(n, 2)}
data["a"][torch.rand(n) < 0.4] = torch.nan
tasks = [
    mtl.Task("a", head=nn.Linear(4, 1), loss=nn.MSELoss(), target="a"),
    mtl.Task("b", head=nn.Linear(4, 3), loss=nn.CrossEntropyLoss(), target="b"),
    mtl.Task("c", head=nn.Linear(4, 2), loss=nn.L1Loss(), target="c"),
]
model = mtl.MultiTaskModel(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), tasks, inputs=["x"])
samples = [{name: value[i] for name, value in data.items()} for i in range(n)]
loader = torch.utils.data.DataLoader(samples, batch_sampler=mtl.distributed.Sampler(n, 8))
trainer = lightning.Trainer(
    accelerator="cpu", devices=devices, max_epochs=4, logger=False,
    strategy="auto" if devices == 1 else ModelParallelStrategy() if how == "fsdp" else "ddp",
    enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
)
trainer.fit(Module(model, tasks), loader)
assert loader.batch_sampler.epoch == 3
torch.save({name: whole(value) for name, value in model.state_dict().items()}, f"{out}-{trainer.global_rank}.pt")
"""


def run(folder: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_loop_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs/howto/processes.md").read_text()
    (script,) = [block for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) if "destroy_process" in block]
    script = script.replace("dist.destroy", "RANK = dist.get_rank()\ndist.destroy").replace("range(2)", "range(1)")
    assert script.count("        step(batch)\n") == 1
    few = "        step(batch)\n        if step.num_taken == 8:  # before the rounding of sums has grown\n            break\n"
    assert script.count("LeNet(") == 1
    script = script.replace("LeNet(", "LeNet(dropout=0.0, ")  # it draws other numbers for a share than for a batch
    seeded = "import torch\n\ntorch.manual_seed(0)\n"
    (tmp_path / "script.py").write_text(seeded + script.replace("        step(batch)\n", few) + SAVE)
    saved = []
    for count in (1, 2):
        run(tmp_path, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "script.py")
        saved += [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(count)]
    alone, first, second = saved
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-5)  # a step of AdamW moves a parameter by up to 1e-3


def test_the_lightning_module_of_the_documentation(tmp_path: Path) -> None:
    """With nothing changed but the trainer's arguments, the sampler, and dropout, which would draw other numbers."""
    page = (ROOT / "docs/howto/own_loop.md").read_text()
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Digits" in block]
    for old, new in (
        ("import lightning\n", "import sys\n\nimport lightning\n"),
        ("tasks = [", "torch.manual_seed(0)\ntasks = ["),
        ("LeNet(", "LeNet(dropout=0.0, "),
        ("batch_size=64, shuffle=True", "batch_sampler=mtl.distributed.Sampler(4000, batch_size=64)"),
        ('accelerator="cpu"', 'accelerator="cpu", devices=int(sys.argv[1]), strategy=sys.argv[2], **ARGUMENTS'),
    ):
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    arguments = "ARGUMENTS = dict(use_distributed_sampler=False, limit_train_batches=8, enable_progress_bar=False)\n"
    save = '\ntorch.save(model.state_dict(), f"{sys.argv[1]}-{mtl.distributed.rank()}.pt")\n'
    (tmp_path / "script.py").write_text(arguments + script + save)
    run(tmp_path, "script.py", "1", "auto")
    run(tmp_path, "script.py", "2", "ddp")
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_lightning_trains_like_one_process(tmp_path: Path, how: str) -> None:
    (tmp_path / "script.py").write_text(LIGHTNING)
    run(tmp_path, "script.py", "1", "one", how)
    run(tmp_path, "script.py", "2", "two", how)
    one = torch.load(tmp_path / "one-0.pt")
    ranks = [torch.load(tmp_path / f"two-{rank}.pt") for rank in range(2)]
    for name, value in one.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-9, atol=1e-9)
