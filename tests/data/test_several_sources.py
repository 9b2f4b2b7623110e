"""Problems whose tasks have separate data sets, or half of the labels, from the command line."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import command, slow_but, stopping
from test_resume import same_runs

import mtl
from mtl.training import checkpoint

SMALL = [
    "task=mnist_two_source",
    "data.epoch=5",
    "data.batch_size={single: 50, pairs: 100}",
    "trainer.max_epochs=3",
    "log.every=4",
]


@pytest.mark.parametrize(
    "sampling", slow_but(["all", "temperature"], ["all", "round_robin", "proportional", "temperature"])
)
def test_resumed_within_an_epoch_it_is_as_if_it_had_not_stopped(here: Path, sampling: str) -> None:
    options = [*SMALL, f"data.sampling={sampling}", "balancer=gradnorm" if sampling == "all" else "balancer=uw"]
    whole = command("train", *options)
    assert whole.code == 0, whole.err
    assert whole.metrics["steps"] == 15
    for at in (3, 7, 10):
        stopped = command("train", *stopping(at), *options, "output_root=stopped")
        assert stopped.code == 128 + signal.SIGTERM, stopped.err
        again = command("train", *options, "resume=auto", "output_root=stopped")
        assert f"resume   from step {at}" in again.out, again.err
        run = max(Path("stopped/mnist_two_source").iterdir())
        same_runs(run, whole.run)
        state = checkpoint.load(run / "checkpoints/last.pt")
        assert set(state["data"]) == {"digit", "left", "right"}  # by task name


def test_figures_are_those_of_each_tasks_own_data(here: Path) -> None:
    ended = command("train", "task=mnist_two_source", "trainer.max_epochs=2")
    assert ended.code == 0, ended.err
    model = mtl.load(ended.run)
    single, pairs = mtl.data.mnist().test.fields, mtl.data.multi_mnist().test.fields
    for task, fields in (("digit", single), ("left", pairs), ("right", pairs)):
        with torch.no_grad():
            found = model({"image": fields["image"]})[task].argmax(1)
        share = (found == fields[task]).double().mean().item()
        assert ended.metrics["test"][task]["accuracy"] == pytest.approx(share, abs=1e-6)
    evaluated = command("evaluate", f"run={ended.run}")
    assert f"{ended.metrics['test']['left']['accuracy']:.3f}".rstrip("0") in evaluated.out


def test_half_of_the_labels(here: Path) -> None:
    train = mtl.data.mnist(disjoint=True).train.fields
    known = mtl.data.mnist().train.fields
    assert torch.equal(train["digit"][::2], known["digit"][::2])
    assert torch.equal(train["parity"][1::2], known["parity"][1::2])
    assert (train["digit"][1::2] == -100).all()
    assert (train["parity"][::2] == -100).all()
    ended = command("train", "task=mnist_disjoint", "trainer.max_epochs=4")
    assert ended.code == 0, ended.err
    assert ended.metrics["test"]["digit"]["accuracy"] > 0.9
    assert ended.metrics["test"]["parity"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tasks.left.source=pear"],
            "tasks.left.source: the task names the source 'pear'; the sources are: single, pairs",
        ),
        (["tasks.left.source=null"], "tasks.left.source: the task names no source; the sources are: single, pairs"),
        (
            ["tasks.left.source=single"],
            "task 'left': target 'left' not in batch; the dataset gives: image, digit, parity",
        ),
        (["data.sampling=some"], "data.sampling: 'some' is not one of all, round_robin, proportional, temperature"),
        (["data.epoch=0"], "data.epoch is 0; it must be one of min, max, sum, or a number of steps"),
        (
            ["~data.batch_size", "+data.batch_size={single: 5}"],
            "data.batch_size has single, but no number for the source 'pairs'",
        ),
        (
            ["data.batch_size=x"],
            "data.batch_size is 'x'; it must be a whole number of at least 1, and below 2^63, or such",
        ),
        (["data.sources.pairs._target_=mtl.data.Fields"], "data.sources.pairs: mtl.data.Fields"),
    ],
)
def test_mistakes(here: Path, overrides: list[str], message: str) -> None:
    ended = command("train", "task=mnist_two_source", *overrides)
    assert ended.code == 1
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not list(Path().glob("outputs/mnist_two_source/*"))


def test_a_renamed_source_or_task_is_a_difference(here: Path) -> None:
    assert command("train", *stopping(3), *SMALL).code == 143
    (run,) = Path("outputs/mnist_two_source").iterdir()
    ended = command("train", *SMALL, f"resume={run}", "~tasks.right")
    assert ended.code == 1
    assert "tasks.right" in ended.err
    ended = command("train", *SMALL, f"resume={run}", "data.epoch=7", "resume_allow=[data.epoch]")
    assert ended.code == 0, ended.err
    assert json.loads((run / "metrics.json").read_text())["steps"] == 3 * 7


@pytest.mark.parametrize(
    ("kind", "first", "domains"),
    [
        ("office31", "amazon", ["amazon", "dslr", "webcam"]),
        ("office_home", "art", ["Art", "Clipart", "Product", "Real World"]),
    ],
)
def test_one_folder_a_domain_is_one_task(here: Path, kind: str, first: str, domains: list[str]) -> None:
    from PIL import Image

    for domain in domains:
        for number, name in enumerate(("mug", "pen", "bike")):
            for index in range(5):
                path = here / "office" / domain / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 32), (80 * number, 20 * index, 9)).save(path)
    sizes = [
        f"+data.sources.{source}.size=32" for source in ({"Real World": "world"}.get(d, d.lower()) for d in domains)
    ]
    small = [f"task={kind}", "trainer.max_epochs=1", "data.batch_size=3", "data.num_workers=0", *sizes]
    missing = command("train", *small)
    assert missing.code == 1
    assert f"there are no pictures in {here}/data/" in missing.err
    ended = command("train", *small, f"data.sources.{first}.root=office")
    assert ended.code == 0, ended.err
    assert ended.metrics["steps"] == 3
    assert len(ended.metrics["test"]) == len(domains)


def test_staged_unfreezing_by_config_goes_on_where_it_stopped(here: Path) -> None:
    options = [
        "task=mnist_two_head",
        "trainer.max_epochs=2",
        "data.batch_size=500",
        "model.freeze_until={trunk: 10}",
    ]
    whole = command("train", *options)
    start = checkpoint.load(whole.run / "checkpoints/last.pt")["model"]
    for at in (4, 12):
        stopped = command("train", *stopping(at), *options, "output_root=stopped")
        assert stopped.code == 128 + signal.SIGTERM, stopped.err
        again = command("train", *options, "resume=auto", "output_root=stopped")
        assert f"resume   from step {at}" in again.out, again.err
        same_runs(max(Path("stopped/mnist_two_head").iterdir()), whole.run)
    never = command("train", *options[:3], "model.freeze=[trunk]")
    frozen = checkpoint.load(never.run / "checkpoints/last.pt")["model"]
    assert not torch.equal(frozen["trunk.conv1.weight"], start["trunk.conv1.weight"])
