"""The command python -m mtl.graph."""

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command

from mtl import graph
from mtl.graphs import pictures

HEAD = "task=mnist_two_head"
TABLES = ("graph.md", "leaves.csv", "life.csv")
needs_dot = pytest.mark.skipif(pictures.missing() is not None, reason=str(pictures.missing()))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@needs_dot
def test_all_of_it(here: Path) -> None:
    done = command("graph", HEAD, "graph.tensorboard=true", 'model.freeze=["trunk.conv1.*"]', "balancer=upgrad")
    assert done.code == 0, done.err
    assert done.run is not None
    assert done.run.parent == here / "outputs" / "graph" / "mnist_two_head"
    pictured = [
        f"{name}.{kind}" for name in ("graph", "graph_digit", "graph_parity", "life") for kind in ("png", "svg")
    ]
    names = {path.name for path in done.run.iterdir()}
    assert {name for name in names if not name.startswith("events.out.tfevents.")} == {*pictured, *TABLES}
    assert "trunk.conv2.weight" in (done.run / "graph_digit.svg").read_text()
    assert "trunk.conv1.weight" not in (done.run / "graph_digit.svg").read_text()
    assert "Frozen, outside the graph" in done.out
    assert "trunk.conv1 (130 numbers)" in " ".join(done.out.split())
    assert f"tensorboard --logdir {os.path.relpath(done.run)}" in done.out

    leaves = {row["leaf"]: row for row in rows(done.run / "leaves.csv")}
    assert leaves["trunk.conv1.weight"]["requires_grad"] == "false"
    assert leaves["trunk.conv2.weight"]["tasks"] == "digit parity"
    life = rows(done.run / "life.csv")
    assert list(dict.fromkeys(row["passes"] for row in life)) == ["joint", "sequential", "shared"]
    sequential = [row for row in life if row["passes"] == "sequential"]
    # Graph 1 is gone before graph 2 is built.
    assert [(row["of"], row["after"], int(row["alive"]) > 0) for row in sequential] == [
        ("digit", "forward", True),
        ("digit", "backward", False),
        ("parity", "forward", True),
        ("parity", "backward", False),
    ]
    report = (done.run / "graph.md").read_text()
    assert "| trunk.conv2.weight | 16×5×5×5 | yes | digit, parity | yes |" in report


@needs_dot
def test_tensorboard_shows_pictures_table_and_numbers(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = command("graph", HEAD, "graph.tensorboard=true")
    assert done.run is not None
    events = EventAccumulator(str(done.run), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"graph", "graph_digit", "graph_parity", "life"}
    (image,) = events.Images("graph_digit")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    (table,) = events.Tensors("graph/text_summary")
    assert table.tensor_proto.string_val[0].decode() == (done.run / "graph.md").read_text()
    for kind in ("joint", "sequential", "shared"):
        expected = [float(row["alive"]) for row in rows(done.run / "life.csv") if row["passes"] == kind]
        assert [event.value for event in events.Scalars(f"life/{kind}")] == expected
        (peak,) = events.Scalars(f"life_peak/{kind}")
        assert peak.value == max(float(row["peak"]) for row in rows(done.run / "life.csv") if row["passes"] == kind)


def test_nothing_is_trained(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    inspect = graph.inspect

    def viewing(problem, *rest):
        state = problem.model.state_dict()
        models.append((problem.model, {name: value.clone() for name, value in state.items()}))
        return inspect(problem, *rest)

    def step(*_: object, **__: object) -> None:
        raise AssertionError("an optimizer took a step")

    monkeypatch.setattr(graph, "inspect", viewing)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    done = command(
        "graph",
        HEAD,
        "balancer=gradnorm",
        "model/trunk=cnn",
        "model.trunk.in_channels=1",
        "model.trunk.batch_norm=true",
    )
    assert done.code == 0, done.err
    ((model, before),) = models
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_dot_there_are_tables_and_numbers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    done = command("graph", HEAD)
    assert done.code == 0, done.err
    assert done.run is not None
    assert "apt install graphviz, brew install graphviz or conda install graphviz" in done.out
    assert {"leaves.csv", "life.csv", "graph.md"} <= {path.name for path in done.run.iterdir()}
    assert not list(done.run.glob("graph*.svg"))
    assert "trunk.conv1.weight" in done.out
    assert "Peak of saved memory: joint" in done.out


def test_without_the_extra_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchviz", "graphviz"):
        monkeypatch.setitem(sys.modules, name, None)
    done = command("graph", HEAD)
    assert done.code == 0, done.err
    assert done.run is not None
    assert 'pip install "mtl-train[graph]"' in done.out
    assert {path.name for path in done.run.iterdir()} == {*TABLES, "life.png", "life.svg"}


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the drawing of pictures, which takes seconds and is tested in other files."""
    monkeypatch.setattr(graph.Pictures, "draw", lambda *_: None)


@needs_dot
def test_pictures_that_fail_are_told_and_end_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphviz import Digraph

    draw = pictures.draw

    def of_task(task: str, *rest: object) -> Digraph:
        if task == "digit":
            raise AttributeError("odd graph\nand more")
        return Digraph()

    def drawing(picture: Digraph, path: Path) -> list[Path]:
        if path.stem == "graph_parity":
            raise OSError("dot failed: odd picture")
        return draw(picture, path)

    monkeypatch.setattr(pictures, "of_task", of_task)
    monkeypatch.setattr(pictures, "draw", drawing)
    done = command("graph", HEAD)
    assert done.code == 0, done.err
    assert done.run is not None
    assert "warning  torchviz can't draw the graph of digit: odd graph\n" in done.out
    assert "warning  no picture graph_parity: dot failed: odd picture\n" in done.out
    pictured = {"graph.png", "graph.svg", "life.png", "life.svg"}
    assert {path.name for path in done.run.iterdir()} == {*pictured, *TABLES}


def test_tensorboard_is_given_no_larger_pictures_than_it_shows(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (8192, 64), "white").save(tmp_path / "wide.png")
    graph.write_events({}, "", tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("wide")
    assert (image.width, image.height) == (4096, 32)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "out of memory: Default"),
        (MemoryError(), "out of memory: MemoryError. A smaller data.batch_size has the same graph"),
        (RuntimeError("mat1 and mat2 don't fit"), "RuntimeError: mat1 and mat2 don't fit"),
    ],
)
def test_what_runs_out_of_memory_is_told_so_and_nothing_else(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(graph, "_graph", fails)
    done = command("graph", HEAD)
    assert done.code == 1
    assert message in done.err
    assert ("out of memory" in done.err) == message.startswith("out of memory")


@pytest.mark.usefixtures("no_pictures")
def test_a_source_of_gradients_that_goes_with_one_kind_alone_hides_no_other(here: Path) -> None:
    done = command("graph", HEAD, "balancer=upgrad", "passes=shared", "gradients.source=layerwise")
    assert done.code == 0, done.err
    assert done.run is not None
    assert {row["passes"] for row in rows(done.run / "life.csv")} == {"joint", "sequential", "shared"}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ("mnist_two_model", ["joint", "sequential"]),
        ("mnist_disjoint", ["joint", "sequential", "shared"]),
        ("mnist_two_source", ["joint", "sequential", "shared"]),
        ("mnist_reconstruct", ["joint", "sequential", "shared"]),
        ("multi_mnist", ["joint", "sequential", "shared"]),
        ("made_ctr", ["joint", "sequential", "shared"]),
        ("burgers", ["joint", "sequential", "shared"]),
    ],
)
def test_every_problem_whose_data_are_here(here: Path, task: str, kinds: list[str]) -> None:
    done = command("graph", f"task={task}")
    assert done.code == 0, done.err
    assert done.run is not None
    life = rows(done.run / "life.csv")
    assert list(dict.fromkeys(row["passes"] for row in life)) == kinds
    assert all(
        int(life[index]["alive"]) == 0
        for index in range(len(life))
        if index + 1 == len(life) or life[index + 1]["passes"] != life[index]["passes"]
    )
    peaks = {kind: max(int(row["peak"]) for row in life if row["passes"] == kind) for kind in kinds}
    assert sorted(kinds, key=lambda kind: peaks[kind])[-1] == "joint" or len(set(peaks.values())) == 1
    assert "Trainable parameters that no task reaches: none." in done.out
    leaves = rows(done.run / "leaves.csv")
    assert {row["kind"] for row in leaves} == ({"parameter", "input"} if task == "burgers" else {"parameter"})
    assert any(row["shared"] == "true" for row in leaves) == (task != "mnist_two_model")


@pytest.mark.usefixtures("no_pictures")
def test_thaw_micro_batches_and_a_start_from_a_run(here: Path, trained) -> None:
    done = command(
        "graph", HEAD, "model.freeze_until={trunk.conv1: 30}", "trainer.num_micro_batches=2", f"init_from={trained.run}"
    )
    assert done.code == 0, done.err
    assert "trunk.conv1 (130 numbers until step 30)" in " ".join(done.out.split())
    assert "loaded: trunk.conv1.weight" in done.out
    assert done.run is not None
    assert {row["micro_batch"] for row in rows(done.run / "life.csv")} == {"1", "2"}


@pytest.mark.usefixtures("no_pictures")
def test_a_task_that_is_not_in_the_batch(here: Path) -> None:
    done = command("graph", "task=mnist_two_source", "data.sampling=round_robin")
    assert done.code == 0, done.err
    out = " ".join(done.out.split())
    assert "Tasks without labels in this batch, so without a graph: " in out


def test_a_balancer_that_training_would_refuse(here: Path) -> None:
    """What can be seen is shown; then comes what training would say."""
    done = command("graph", "task=mnist_two_model", "balancer=upgrad")
    assert done.code == 1
    assert "the tasks share no parameter, so there is nothing to balance" in done.err
    assert "trunk.digit.conv1.weight" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["graph.tensorbord=true"], "there is no key 'graph.tensorbord'; did you mean 'graph.tensorboard'?"),
        (["graph.tensorboard=3"], "graph.tensorboard is 3; it must be true or false"),
        (["graph=3"], "graph is 3; it must be a mapping"),
        (["resume=auto"], "mtl.graph doesn't train, so it can't resume a run"),
        (["optimizer.lr=-1"], "optimizer.lr is -1"),
        (["passes=both"], "passes is 'both'"),
        (["seed=0,1", "-m"], "mtl.graph shows one problem at a time"),
    ],
)
def test_messages(here: Path, arguments: list[str], message: str) -> None:
    done = command("graph", HEAD, *arguments)
    assert done.code == 1
    assert done.err.count(message) == 1
    assert not list(here.glob("outputs/graph/*/*"))


def test_training_does_not_take_it_for_a_run(here: Path) -> None:
    assert command("graph", HEAD).code == 0
    done = command("train", HEAD, "trainer.max_epochs=1", "resume=auto")
    assert done.code == 0
    assert "resume   from" not in done.out
    assert done.run is not None
    assert done.run.parent == here / "outputs" / "mnist_two_head"


def test_two_looks_say_the_same(here: Path) -> None:
    runs = [command("graph", HEAD, "seed=3").run for _ in range(2)]
    digests = [
        hashlib.sha256((run / name).read_bytes()).hexdigest() for run in runs for name in ("leaves.csv", "life.csv")
    ]
    assert digests[:2] == digests[2:]


def test_help_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['mtl.graph', '--help']\n"
        "import runpy; runpy.run_module('mtl.graph', run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "graph.tensorboard" in done.stdout
    assert "mnist_two_head, mnist_two_model" in done.stdout
