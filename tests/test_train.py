"""The command line from end to end, in this process."""

import csv
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Ended, command
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mtl
from mtl import train
from mtl.config.targets import make
from mtl.training.trainer import Trainer
from mtl.training.validation import Validation

FAST = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=250"]


def history(run: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    with (run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["tag"], []).append((int(row["step"]), float(row["value"])))
    return found


def test_what_a_run_writes(trained: Ended) -> None:
    names = {path.relative_to(trained.run).parts[0].split(".tfevents.")[0] for path in trained.run.rglob("*")}
    assert names == {"config.yaml", "train.log", "metrics.csv", "metrics.json", "events.out", "checkpoints"}
    assert {path.name for path in (trained.run / "checkpoints").iterdir()} == {
        "last.pt",
        "last-1.pt",
        "best.pt",
        "manifest.json",
    }
    config = OmegaConf.load(trained.run / "config.yaml")
    assert config.tasks.digit.metrics.accuracy.num_classes == 10
    assert "hydra" not in config
    assert "${" not in (trained.run / "config.yaml").read_text()
    log = (trained.run / "train.log").read_text()
    assert "MNIST, the 5,000 images" in log
    assert "digit alone" in log


def test_events_hold_the_history(trained: Ended) -> None:
    events = EventAccumulator(str(trained.run), size_guidance={"scalars": 0})
    events.Reload()
    logged = history(trained.run)
    assert set(events.Tags()["scalars"]) == set(logged)
    for tag, values in logged.items():
        read = [(event.step, event.value) for event in events.Scalars(tag)]
        assert read == [(step, np.float32(value)) for step, value in values], tag
    expected = {
        f"{kind}/{task}/{split}"
        for kind in ("loss",)
        for task in ("digit", "parity")
        for split in ("train", "val", "best", "test")
    }
    expected |= {f"metric/{task}/accuracy/{split}" for task in ("digit", "parity") for split in ("val", "best", "test")}
    expected |= {"grad_norm/digit", "grad_norm/parity", "grad_norm/total", "weight/digit", "weight/parity"}
    expected |= {"cosine/digit~parity", "lr/default", "speed/samples_per_second", "monitor/val", "monitor/best"}
    assert set(logged) == expected
    assert [step for step, _ in logged["cosine/digit~parity"]] == [1, 20, 40, 60, 80, 100, 120]
    assert all(math.isfinite(value) for values in logged.values() for _, value in values)


def test_metrics_json_holds_what_the_screen_shows(trained: Ended) -> None:
    metrics, logged = trained.metrics, history(trained.run)
    assert metrics["status"] == "finished"
    assert (metrics["steps"], metrics["epochs"], metrics["passes"]) == (126, 2, "shared")
    assert metrics["best"]["value"] == max(value for _, value in logged["monitor/val"])
    assert metrics["test"]["digit"]["accuracy"] == logged["metric/digit/accuracy/test"][-1][1]
    cosines = [value for _, value in logged["cosine/digit~parity"]]
    assert metrics["cosine"]["digit~parity"]["mean"] == pytest.approx(sum(cosines) / len(cosines))
    assert metrics["cosine"]["digit~parity"]["below_zero"] == pytest.approx(sum(c < 0 for c in cosines) / len(cosines))
    for text in (
        f"{metrics['test']['digit']['accuracy']:.4g}",
        f"{metrics['val']['parity']['loss']:.4g}",
        f"{metrics['grad_norm']['digit']:.4g}",
        "mean cosine",
        "Passes: shared",
        "One seed (0), 500 test samples",
        "tensorboard --logdir",
        "python -m mtl.evaluate run=",
        "python -m mtl.train task=mnist_two_head trainer.max_epochs=2 log.every=20 only=digit",
        "checkpoints/",
    ):
        assert text in trained.out, text
    assert metrics["unreached"] == []
    assert trained.out.index("MNIST, the 5,000 images") < trained.out.index("epoch 1/2")


@pytest.mark.parametrize(("split", "checkpoint"), [("test", "best"), ("val", "best"), ("val", "last")])
def test_evaluate_reproduces_the_figures_exactly(
    trained: Ended, here: Path, monkeypatch: pytest.MonkeyPatch, split: str, checkpoint: str
) -> None:
    seen = []
    original = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda self, loader: (seen.append(original(self, loader)), seen[-1])[1])
    ended = command("evaluate", f"run={trained.run}", f"split={split}", f"checkpoint={checkpoint}")
    assert ended.code == 0, ended.err
    if checkpoint == "best":
        assert seen == [trained.metrics[split]]
    else:
        assert seen[0]["digit"]["accuracy"] == history(trained.run)["metric/digit/accuracy/val"][-1][1]
    assert f"{seen[0]['digit']['accuracy']:.4g}" in ended.out
    assert list(here.iterdir()) == []  # nothing is written


def test_load_gives_the_model_back_without_hydra(trained: Ended, here: Path) -> None:
    model = mtl.load(trained.run)
    assert not model.training
    splits = mtl.data.mnist()
    predictions = model({"image": splits.test.fields["image"]})
    accuracy = (predictions["digit"].argmax(1) == splits.test.fields["digit"]).double().mean().item()
    assert accuracy == pytest.approx(trained.metrics["test"]["digit"]["accuracy"], rel=1e-6)
    with pytest.raises(mtl.UserError, match="'nowhere' is not the folder of a run"):
        mtl.load("nowhere")


def test_default_settings_reach_their_figures(here: Path) -> None:
    metrics = command("train", "task=mnist_two_head").metrics
    assert metrics["test"]["digit"]["accuracy"] >= 0.96
    assert metrics["test"]["parity"]["accuracy"] >= 0.97


def test_two_models(here: Path) -> None:
    ended = command("train", "task=mnist_two_model", "trainer.max_epochs=1", "log.every=10")
    assert ended.code == 0, ended.err
    assert ended.metrics["passes"] == "sequential"
    assert ended.metrics["cosine"] == {}
    assert "No parameter is shared" in ended.out
    model = mtl.load(ended.run)
    assert set(model.trunk) == {"digit", "parity"}
    assert len(list(model.parameters())) == 2 * 8


@pytest.mark.slow
def test_sweep_gives_each_job_the_numbers_it_has_alone(here: Path) -> None:
    swept = command("train", "-m", *FAST, "optimizer.lr=1e-3,3e-3", "seed=0,1")
    assert swept.code == 0, swept.err
    runs = sorted(path.parent for path in here.glob("outputs/multirun/*/*/metrics.json"))
    assert [run.name for run in runs] == [
        "0_lr-0.001_seed-0",
        "1_lr-0.001_seed-1",
        "2_lr-0.003_seed-0",
        "3_lr-0.003_seed-1",
    ]
    for run, (lr, seed) in zip(runs, [(lr, seed) for lr in ("1e-3", "3e-3") for seed in (0, 1)], strict=True):
        alone = command("train", *FAST, f"optimizer.lr={lr}", f"seed={seed}")
        expected, found = history(alone.run), history(run)
        for speed in (expected, found):
            del speed["speed/samples_per_second"]
        assert found == expected
        left, right = (torch.load(r / "checkpoints" / "last.pt")["model"] for r in (run, alone.run))
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_sweep_goes_on_after_a_job_that_fails_and_returns_validation_figures(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned = []
    original = train.train
    monkeypatch.setattr(train, "train", lambda config: (returned.append(original(config)), returned[-1])[1])
    ended = command("train", "-m", *FAST, "model.freeze=[nothing],[trunk.conv1]")
    assert ended.code == 1
    assert "model.freeze: no parameter matches 'nothing'" in ended.err
    assert "Traceback" not in ended.err
    states = {p.parent.name[0]: p for p in here.glob("outputs/multirun/*/*/metrics.json")}
    assert '"status": "failed"' in states["0"].read_text()
    assert '"status": "finished"' in states["1"].read_text()
    assert "2 jobs in" in ended.out
    assert re.search(rf"  1_freeze-\S+ +done {returned[0]:.4f}\n", ended.out)
    assert returned == [json.loads(states["1"].read_text())["best"]["value"]]


def test_init_from(trained: Ended, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "configs" / "task").mkdir(parents=True)
    (here / "configs" / "task" / "three.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - mnist_two_head\n  - /objective@tasks.again: classification\n  - _self_\n"
        "tasks:\n  parity: {num_outputs: 3}\n  again: {target: digit, num_outputs: 10}\n"
    )
    first: list[dict[str, torch.Tensor]] = []

    class Looks(Trainer):
        def fit(self) -> None:
            self.step.model.eval()
            with torch.no_grad():
                first.append(self.step.model({"image": mtl.data.mnist().val.fields["image"]}))
            super().fit()

    monkeypatch.setattr("mtl.config.trainer.Trainer", Looks)
    ended = command("train", "--config-dir", "configs", "task=three", *FAST[1:], f"init_from={trained.run}")
    assert ended.code == 0, ended.err
    before = mtl.load(trained.run)({"image": mtl.data.mnist().val.fields["image"]})
    assert torch.equal(first[0]["digit"], before["digit"])  # bit-equal, before the first step
    lines = {line.split()[1]: line for line in ended.out.splitlines() if line.startswith("init")}
    assert "trunk.conv1.weight" in lines["loaded:"]
    assert "heads.digit.bias" in lines["loaded:"]
    assert "heads.again.weight" in lines["new:"]
    assert "heads.parity.weight (shape (2, 20) in the run, shape (3, 20) in this model)" in lines["new:"]
    wrong = command("train", *FAST, "init_from=nowhere")
    assert wrong.code == 1
    assert "'nowhere' is not the folder of a run" in wrong.err


def test_groups_freeze_and_clip_from_the_command_line(here: Path) -> None:
    ended = command(
        "train",
        *FAST,
        "optimizer.groups={trunk: {lr: 1e-4}}",
        'model.freeze=["trunk.conv1.*"]',
        "trainer.clip_norm=0.5",
        "precision=bf16",
    )
    assert ended.code == 0, ended.err
    logged = history(ended.run)
    assert (logged["lr/trunk"][0][1], logged["lr/default"][0][1]) == (1e-4, 5e-3)
    start = command("train", *FAST, "optimizer.lr=0.0")
    frozen, other = (torch.load(run / "checkpoints/last.pt")["model"] for run in (ended.run, start.run))
    assert torch.equal(frozen["trunk.conv1.weight"], other["trunk.conv1.weight"])
    assert not torch.equal(frozen["trunk.conv2.weight"], other["trunk.conv2.weight"])
    assert "of them frozen" in ended.out


NO_DECAY = "optimizer.groups={*.bias: {weight_decay: 0.0}, trunk.conv1: {lr: 1e-4}, trunk: {lr: 1e-3}}"


def test_a_parameter_belongs_to_the_first_group_that_matches_it(here: Path) -> None:
    """The parameters after a step are those of a plain loop with groups written by hand."""
    once = ["data.batch_size=4000", "model.trunk.dropout=0.0", "scheduler=none", "optimizer.weight_decay=0.3"]
    ended = command("train", *FAST[:1], "trainer.max_epochs=1", *once, NO_DECAY)
    assert ended.code == 0, ended.err
    start = command("train", *FAST[:1], "trainer.max_epochs=1", *once, "optimizer=sgd", "optimizer.lr=0.0")
    before, after = (torch.load(run / "checkpoints/last.pt") for run in (start.run, ended.run))
    by_hand = {
        "*.bias": [name for name in before["model"] if name.endswith(".bias")],
        "trunk.conv1": ["trunk.conv1.weight"],
        "trunk": ["trunk.conv2.weight", "trunk.linear.weight"],
        "default": ["heads.digit.weight", "heads.parity.weight"],
    }
    assert sorted(sum(by_hand.values(), [])) == sorted(before["model"])
    groups = after["step"]["optimizer"]["param_groups"]
    assert {group["name"]: len(group["params"]) for group in groups} == {n: len(v) for n, v in by_hand.items()}
    values = {"*.bias": (5e-3, 0.0), "trunk.conv1": (1e-4, 0.3), "trunk": (1e-3, 0.3), "default": (5e-3, 0.3)}
    for group, names in by_hand.items():
        lr, decay = values[group]
        for name in names:  # AdamW's first step is the decay, and one learning rate against the gradient's sign
            decayed = before["model"][name] * (1 - lr * decay)
            moved = (after["model"][name] - decayed).abs()
            assert moved.max() <= lr * 1.001 + 1e-7, name
            assert moved.median() == pytest.approx(lr, rel=1e-2), name


@pytest.mark.parametrize("passes", ["sequential", "shared"])
def test_every_kind_of_passes_trains_alike(here: Path, passes: str) -> None:
    ended = command("train", *FAST, f"passes={passes}")
    reference = command("train", *FAST, "passes=joint")
    assert ended.metrics["passes"] == passes
    for tag, values in history(reference.run).items():
        if not tag.startswith("speed"):
            got = history(ended.run)[tag]
            assert [v for _, v in got] == pytest.approx([v for _, v in values], rel=2e-3, abs=5e-3), tag


MISTAKES = [
    (["task=nope"], "task: there is no 'nope'"),
    ([], "You must specify 'task'"),
    (["task=mnist_two_head", "optimizer=adm"], "optimizer: there is no 'adm'; did you mean 'adam'?"),
    (["task=mnist_two_head", "logger=null"], "logger"),
    (["task=mnist_two_head", "model.inputs=[digit]"], "the trunk can't take its inputs digit, of shape (500,)"),
    (["task=mnist_two_head", "trainer.max_epoch=1"], "there is no key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
    (["task=mnist_two_head", "tasks.digit.targt=x"], "did you mean 'tasks.digit.target'?"),
    (["task=mnist_two_head", "+tasks.digit.targt=x"], "tasks.digit.targt: there is no such key; did you mean 'target'?"),
    (["task=mnist_two_head", "passes=both"], "passes is 'both'; it must be one of"),
    (["task=mnist_two_head", "tasks.digit.weight=-1"], "tasks.digit.weight is -1"),
    (["task=mnist_two_head", "~tasks.digit", "~tasks.parity"], "a problem needs at least one"),
    (["task=mnist_two_head", "tasks.parity.target=partiy"], "task 'parity': target 'partiy' not in batch; the dataset gives: image, digit, parity"),
    (["task=mnist_two_head", "model.inputs=[picture]"], "model.inputs: 'picture' not in batch; the dataset gives: image"),
    (["task=mnist_two_head", "tasks.digit.loss._target_=torch.nn.CrossEntropyLos"], "tasks.digit.loss._target_: 'torch.nn' has no 'CrossEntropyLos'; did you mean 'CrossEntropyLoss'?"),
    (["task=mnist_two_head", "model.trunk._target_=nowhere.Trunk"], "model.trunk._target_: 'nowhere.Trunk' can't be imported: there is no module 'nowhere'"),
    (["task=mnist_two_head", "tasks.digit.head.in_features=30"], "task 'digit': its head can't take the trunk's features, of shape (500, 20)"),
    (["task=mnist_two_head", "tasks.digit.num_outputs=5"], "task 'digit': its loss failed on a prediction of shape (500, 5)"),
    (["task=mnist_two_head", "tasks.digit.output=probabilities"], "task 'digit': output is probabilities, but its loss, CrossEntropyLoss, takes logits"),
    (["task=mnist_two_head", "tasks.digit.output=logit"], "tasks.digit.output is 'logit'; it must be one of logits, multilabel_logits, probabilities"),
    (["task=mnist_two_head", "+tasks.digit.mean_over=pixels"], "tasks.digit.mean_over is 'pixels'; it must be one of samples, elements, positions"),
    (["task=mnist_two_head", "+tasks.digit.metrics.auc._target_=torchmetrics.classification.BinaryAUROC"], "its metric 'auc', BinaryAUROC, takes one prediction for each yes or no"),
    (["task=mnist_two_head", "+tasks.digit.metrics.f1._target_=torchmetrics.F2Score"], "tasks.digit.metrics.f1._target_: 'torchmetrics' has no 'F2Score'"),
    (["task=mnist_two_head", "optimizer.lr=1e30"], "its loss is nan at step 2 (epoch 1, samples "),
    (["task=mnist_two_head", "model.freeze=[conv1]"], "model.freeze: no parameter matches 'conv1'; the parameters are: trunk.conv1.weight"),
    (["task=mnist_two_head", "optimizer.groups={trunk: {lrr: 1}}"], "optimizer.groups.trunk.lrr: torch.optim.AdamW has no 'lrr'; it takes: params, lr"),
    (["task=mnist_two_head", "optimizer.groups={trunk: {lr: 1}, trunk.conv1: {lr: 2}}"], "optimizer.groups.trunk.conv1: no parameter is left for this group. A parameter belongs to the first pattern that matches it, and all that match 'trunk.conv1' belong to 'trunk' already; write 'trunk.conv1' before"),
    (["task=mnist_two_head", "trainer.monitor={digit/acuracy: max}"], "did you mean 'digit/accuracy'?"),
    (["task=mnist_two_head", "trainer.monitor={digit/accuracy: max, parity/loss: min}"], "have unlike units"),
    (["task=mnist_two_head", "output_root=a_file"], "a_file"),
    (["task=mnist_two_head", "device=cuda:7"], "device: there is no 'cuda:7' here"),
    (["task=mnist_two_head", "seed=["], "seed=["),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[o[-1] if o else "nothing" for o, _ in MISTAKES])
def test_mistakes(here: Path, overrides: list[str], message: str) -> None:
    (here / "a_file").touch()
    ended = command("train", *overrides)
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert ended.err.removeprefix("error: ").startswith(message) or not message.startswith("In ")
    assert message in ended.err
    assert "Traceback" not in ended.err + ended.out
    assert ended.run is None or (ended.run / "metrics.csv").exists()  # what never began leaves no folder
    if ended.run is not None:
        assert ended.metrics["status"] == "failed"
        assert message in ended.metrics["error"]


def test_traceback_on_request(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ["task=mnist_two_head", "tasks.parity.target=partiy"]
    assert "Traceback" in command("train", *wrong, "debug=true").err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert "Traceback" in command("train", *wrong).err


def test_mistakes_of_evaluate(trained: Ended, here: Path) -> None:
    for overrides, message in (
        (["run=nowhere"], "'nowhere' is not the folder of a run"),
        ([], "run"),
        ([f"run={trained.run}", "split=tset"], "split: 'tset' is not one of train, val, test"),
        ([f"run={trained.run}", "checkpoint=first"], "checkpoint: 'first' is not one of best, last"),
    ):
        ended = command("evaluate", *overrides)
        assert ended.code == 1
        assert message in ended.err
        assert "Traceback" not in ended.err


def test_help_needs_no_task(here: Path) -> None:
    ended = command("train", "--help")
    assert ended.code == 0
    for text in ("mnist_two_head, mnist_two_model", "optimizer: adagrad, adam, adamw, sgd", "trainer.max_epochs"):
        assert text in ended.out


def test_own_config_of_a_name_that_mtl_has_is_warned_about(here: Path) -> None:
    (here / "mine" / "optimizer").mkdir(parents=True)
    (here / "mine" / "optimizer" / "sgd.yaml").write_text("_target_: torch.optim.Adagrad\ngroups: null\n")
    ended = command("train", "--config-dir", "mine", *FAST, "optimizer=sgd")
    assert "sgd.yaml is not read: mtl's own file of that name comes first" in ended.out


BALANCERS = sorted(path.stem for path in (ROOT / "configs" / "balancer").glob("*.yaml"))


@pytest.mark.parametrize("name", BALANCERS)
def test_with_one_task_every_balancer_is_plain_training(here: Path, name: str) -> None:
    gradients = {}
    for balancer in ("equal", name):
        torch.manual_seed(0)
        tasks = [mtl.Task("digit", head=torch.nn.Linear(20, 10), loss=torch.nn.CrossEntropyLoss(), target="digit")]
        model = mtl.MultiTaskModel(mtl.trunks.LeNet(dropout=0.0), tasks, inputs=["image"])
        node = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "balancer" / f"{balancer}.yaml"))
        node = {key: 0 if value == "${seed}" else value for key, value in node.items()}
        step = mtl.Step(model, tasks, balancer=make(node, "balancer"))
        step.backward(mtl.data.mnist().train.take(torch.arange(64)))
        gradients[balancer] = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
    assert torch.equal(gradients["equal"], gradients[name])


DRAWN = """
import torch


class Points(torch.utils.data.Dataset):
    def __init__(self, count):
        self.x = torch.randn(count, 4)  # from the global generator, which only a seed fixes

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "sign": (self.x[index, 0] > 0).long(), "size": self.x[index].norm()}


class Trunk(torch.nn.Linear):
    def __init__(self, num_features):
        super().__init__(4, num_features)


class Seen:
    steps = []

    def __call__(self, trainer, result):
        self.steps.append((trainer.global_step, sorted(result.losses)))
"""
OWN = """# @package _global_
defaults:
  - /objective@tasks.sign: classification
  - _self_
  - override /data: datasets
  - override /model: hard_sharing
  - override /model/trunk: custom
model:
  inputs: [x]
  trunk: {_target_: drawn_points.Trunk, num_features: 8}
tasks:
  sign: {target: sign, num_outputs: 2}
  size:
    target: size
    head: {_target_: torch.nn.Sequential, _args_: [{_target_: torch.nn.Linear, in_features: 8, out_features: 1}, {_target_: torch.nn.Flatten, start_dim: 0}]}
    loss: {_target_: torch.nn.MSELoss}
    metrics: {error: {_target_: torchmetrics.MeanAbsoluteError}}
data:
  train: {_target_: drawn_points.Points, count: 200}
  val: {_target_: drawn_points.Points, count: 50}
  test: {_target_: drawn_points.Points, count: 50}
trainer:
  max_epochs: 2
  monitor: {sign/accuracy: {mode: max, scale: 0.01}, size/error: {mode: min, scale: 0.1}}
"""


@pytest.fixture
def own(here: Path) -> list[str]:
    (here / "mine" / "task").mkdir(parents=True)
    (here / "mine" / "drawn_points.py").write_text(DRAWN)
    (here / "mine" / "task" / "own.yaml").write_text(OWN)
    return ["--config-dir", "mine", "task=own"]


def test_evaluate_reproduces_figures_of_data_that_are_drawn(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = command("train", *own)
    assert run.code == 0, run.err
    seen = []
    original = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda self, loader: (seen.append(original(self, loader)), seen[-1])[1])
    torch.rand(3)
    assert command("evaluate", f"run={run.run}").code == 0
    assert seen == [run.metrics["test"]]


def test_printed_commands_for_one_task_run_as_they_are(own: list[str]) -> None:
    run = command("train", *own, "seed=3")
    printed = [line.split("python -m mtl.train ")[1] for line in run.out.splitlines() if " alone " in line]
    assert len(printed) == 2
    for line, task in zip(printed, ("sign", "size"), strict=True):
        alone = command("train", *shlex.split(line))
        assert alone.code == 0, alone.err
        assert list(alone.metrics["test"]) == [task]


def test_monitor_and_groups_on_the_command_line_replace_the_tasks_own(own: list[str]) -> None:
    run = command("train", *own, "trainer.monitor={sign/loss: min}", "optimizer.groups={heads: {lr: 1e-4}}")
    assert run.code == 0, run.err
    assert run.metrics["best"]["monitor"] == "sign/loss (min)"
    assert "trainer.monitor={sign/loss: min}" in run.metrics["arguments"]
    again = command("train", *run.metrics["arguments"])
    assert again.metrics["test"] == run.metrics["test"]
    swept = command("train", "-m", *own, "trainer.monitor={sign/loss: min},{size/error: min}")
    assert swept.code == 0, swept.err
    monitors = [
        json.loads(p.read_text())["best"]["monitor"]
        for p in sorted(Path.cwd().glob("outputs/multirun/*/*/metrics.json"))
    ]
    assert monitors == ["sign/loss (min)", "size/error (min)"]


def test_a_callback_from_the_config_sees_every_step(own: list[str]) -> None:
    run = command("train", *own, "+callbacks.seen._target_=drawn_points.Seen")
    assert run.code == 0, run.err
    import drawn_points

    assert drawn_points.Seen.steps[-8:] == [(step, ["sign", "size"]) for step in range(1, 9)]


def test_monitor_without_validation_data_is_refused(own: list[str]) -> None:
    ended = command("train", *own, "data.val=null")
    assert ended.code == 1
    assert "need validation data" in ended.err
    assert command("train", *own, "data.val=null", "trainer.monitor=null").code == 0


def test_a_monitor_that_is_missing_is_told_with_a_command_that_works(own: list[str]) -> None:
    ended = command("train", *own, "trainer.monitor=null")
    assert ended.code == 1
    assert "resume with" not in ended.out  # a run of another monitor is another run
    proposed = shlex.split(ended.err[ended.err.index("'trainer.monitor=") :].splitlines()[0])[0]
    again = command("train", *own, proposed)
    assert again.code == 0, again.err


def test_a_null_learning_rate_is_the_optimizers_own(own: list[str]) -> None:
    ended = command("train", *own, "optimizer.lr=null", "trainer.max_epochs=1", "log.every=1")
    assert ended.code == 0, ended.err
    assert {rate for _, rate in history(ended.run)["lr/default"]} == {
        torch.optim.AdamW([torch.zeros(1)]).defaults["lr"]
    }


def test_without_loggers_and_what_is_said_of_it(here: Path) -> None:
    ended = command("train", *FAST, "logger=[]")
    assert ended.code == 0, ended.err
    files = ended.out.split("Written to ")[1].replace("\n", " ")
    assert "metrics.csv" not in files
    assert "tensorboard" not in ended.out
    for name in ("config.yaml", "checkpoints/best.pt", "checkpoints/last.pt", "metrics.json", "train.log"):
        assert name in files


def test_test_figures_are_those_of_the_best_parameters_in_the_runs_precision(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command("train", *FAST, "trainer.max_epochs=6", "optimizer.lr=0.05", "precision=bf16", "scheduler=none")
    assert run.metrics["best"]["epoch"] < 6  # else this would show nothing
    seen = []
    original = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda self, loader: (seen.append(original(self, loader)), seen[-1])[1])
    for checkpoint in ("best", "last"):
        assert command("evaluate", f"run={run.run}", f"checkpoint={checkpoint}").code == 0
    assert seen[0] == run.metrics["test"]
    assert seen[1] != run.metrics["test"]
    model = mtl.load(run.run)
    with torch.no_grad():
        exact = model({"image": mtl.data.mnist().test.fields["image"]})["digit"]
    loss = torch.nn.functional.cross_entropy(exact, mtl.data.mnist().test.fields["digit"]).item()
    assert loss != run.metrics["test"]["digit"]["loss"]  # bf16 shows


def test_what_is_no_yaml(own: list[str]) -> None:
    Path("mine/task/own.yaml").write_text("a: [1\n")
    ended = command("train", *own)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert "own.yaml" in ended.err


OWN_MISTAKES = {
    "callback": ("class Breaks:\n    def __call__(self, trainer, result):\n        {}['gone']\n", ["+callbacks.b._target_=drawn_points.Breaks"], "callback Breaks failed at step 1: KeyError: 'gone' (drawn_points.py, line 30)"),
    "sample": ("class Breaks(Points):\n    def __getitem__(self, index):\n        return {}['gone']\n", ["data.val._target_=drawn_points.Breaks"], "data.val: sample 0 of Breaks fails: KeyError: 'gone' (drawn_points.py, line 30)"),
    "backward": ("class Breaks(Trunk):\n    def forward(self, x):\n        features = super().forward(x).exp()\n        return features.relu_() if features.add_(1).sum() else features\n", ["model.trunk._target_=drawn_points.Breaks"], "the backward pass at step 1, in epoch 1 failed: RuntimeError: one of the variables needed for gradient computation has been modified by an inplace operation"),
    "later sample": ("class Breaks(Points):\n    def __getitem__(self, index):\n        return super().__getitem__(index) if index < 9 else {}['gone']\n", ["data.train._target_=drawn_points.Breaks"], "data: a batch of Breaks (train) can't be loaded: sample 164: KeyError: 'gone' (drawn_points.py, line 30)"),
    "unequal shapes": ("class Breaks(Points):\n    def __getitem__(self, index):\n        return {**super().__getitem__(index), 'x': torch.zeros(index + 1)}\n", ["data.train._target_=drawn_points.Breaks"], "data: a batch of Breaks (train) can't be loaded: field 'x' is float32 of shape ("),
    "trunk": ("class Breaks(Trunk):\n    def forward(self, x):\n        return y\n", ["model.trunk._target_=drawn_points.Breaks"], "the trunk can't take its inputs x, of shape (50, 4): NameError: name 'y' is not defined (drawn_points.py, line 30)"),
    "no training data": ("", ["data.train=null"], "data.train is null; a problem needs training data"),
    "all frozen": ("", ["model.freeze=['*']"], "model.freeze freezes every parameter"),
    "no weight": ("", ["tasks.sign.weight=0", "+tasks.size.weight=0"], "every task's weight is 0"),
    "learning rate": ("", ["optimizer.lr=abc"], "optimizer.lr is 'abc'; it must be a finite number of at least 0, or null"),
    "output root": ("", ["output_root="], "output_root is ''; it must be the name of a folder"),
    "no key=value": ("", ["own"], "'own' can't be read: missing EQUAL at '<EOF>'; values are written key=value"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OWN_MISTAKES))
def test_mistakes_in_the_users_own_code_and_values(own: list[str], name: str) -> None:
    code, overrides, message = OWN_MISTAKES[name]
    path = Path("mine/drawn_points.py")
    path.write_text(path.read_text() + "\n\n" + code)
    sys.modules.pop("drawn_points", None)
    ended = command("train", *own, *overrides)
    assert ended.code == 1
    assert message in ended.err
    assert "Traceback" not in ended.err
    sys.modules.pop("drawn_points", None)


def test_load_leaves_the_random_state_alone(trained: Ended) -> None:
    draws = torch.get_rng_state()
    mtl.load(trained.run)
    assert torch.equal(draws, torch.get_rng_state())


def test_environment_is_left_as_it_was(here: Path) -> None:
    command("train", "--help")
    assert "HYDRA_FULL_ERROR" not in os.environ
