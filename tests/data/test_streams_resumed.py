"""Trainings on shard files that end in the middle of an epoch, and go on."""

from pathlib import Path

import pytest
from conftest import ROOT
from streams_by_hand import made_shards
from test_torchrun import assert_same, only_run, run, state

TASK = """# @package _global_
defaults:
  - /objective@tasks.odd: classification
  - /objective@tasks.third: classification
  - _self_
  - override /data: datasets
  - override /model: hard_sharing
  - override /model/trunk: mlp
model: {inputs: [x], trunk: {in_features: 3, widths: [16, 8]}}
tasks:
  odd: {target: odd, num_outputs: 2}
  third: {target: third, num_outputs: 3}
data:
  train: {_target_: streams_by_hand.part, folder: shards, begin: 0, end: 100}
  val: {_target_: streams_by_hand.part, folder: shards, begin: 100, end: 200}
  epoch: 20
  batch_size: 16
  eval_batch_size: 32
trainer: {max_epochs: 3, monitor: {odd/accuracy: max}}
"""
ENDS = """
import os
import mtl

class Ends:
    def __init__(self, number):
        self.number = number

    def __call__(self, trainer, result):
        if trainer.global_step == 33 and not os.path.exists(f"ended{self.number}-{mtl.distributed.rank()}"):
            open(f"ended{self.number}-{mtl.distributed.rank()}", "w").close()
            raise ValueError("ended on purpose")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_run_on_shards_goes_on_with_any_number_of_processes(tmp_path: Path, how: str) -> None:
    (tmp_path / "shards").mkdir()
    made_shards(tmp_path / "shards")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "shards.yaml").write_text(TASK)
    (tmp_path / "ends.py").write_text(ENDS)
    (tmp_path / "streams_by_hand.py").write_text((ROOT / "tests/data/streams_by_hand.py").read_text())
    settings = ("--config-dir", ".", "task=shards", "checkpoint.every_steps=7", "resume=auto")
    if how == "fsdp":
        settings = (*settings, "trainer.tail=drop")  # a sharded model needs a sample in each process
    calm = run(tmp_path, 2 if how == "ddp" else 1, *settings, "output_root=calm")
    assert calm.returncode == 0, calm.stderr
    undisturbed = state(only_run(tmp_path, "calm"))
    for after, tolerance in ((2, 0.0), (3, 1e-6), (1, 1e-6)) if how == "ddp" else ((3, 1e-4),):
        ending = (
            *settings,
            f"distributed={how}",
            f"output_root=to{after}",
            f"callbacks={{a: {{_target_: ends.Ends, number: {after}}}}}",
        )
        assert "ended on purpose" in run(tmp_path, 2, *ending, "data.num_workers=1").stderr
        (tmp_path / f"ended{after}-2").touch()  # a third process does not end the run again
        done = run(tmp_path, after, *ending)
        assert done.returncode == 0, done.stderr
        assert "resume   from step 28, epoch 2" in done.stdout
        resumed = state(only_run(tmp_path, f"to{after}"))
        assert_same(resumed["model"], undisturbed["model"], tolerance)
        assert resumed["data"] == undisturbed["data"]  # the same places in all parts
