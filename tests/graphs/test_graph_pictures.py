"""Pictures of graphs: their content, and the messages if they can't be drawn."""

import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import batches, problem
from matplotlib.figure import Figure
from torch import nn

import mtl
from mtl.graphs import Life, Walk, backward, living_anyway, pictures
from mtl.graphs.colours import MANY, colours
from mtl.graphs.plot import plot
from mtl.graphs.walk import Leaf, Operation

needs_dot = pytest.mark.skipif(pictures.missing() is not None, reason=str(pictures.missing()))
SVG = "{http://www.w3.org/2000/svg}"


def drawn(model: mtl.MultiTaskModel, tasks: list[mtl.Task], batch: dict[str, torch.Tensor]):
    found = {}
    walk = Walk(
        model, [t.name for t in tasks], batch, lambda n, loss: found.update({n: pictures.of_task(n, loss, names)})
    )
    names = walk.named()
    with walk.recording():
        backward(mtl.Step(model, tasks, passes="joint"), batch, walk)
    return walk, found


def boxes(path: Path) -> dict[str, list[str]]:
    """Returns the colours in each node, by the first line of the node's text."""
    found = {}
    for group in ElementTree.parse(path).iter(f"{SVG}g"):
        if group.get("class") == "node":
            texts = [text.text or "" for text in group.iter(f"{SVG}text")]
            fills = [
                shape.get("fill") or "" for tag in ("polygon", "path", "ellipse") for shape in group.iter(SVG + tag)
            ]
            found["\n".join(texts)] = [fill for fill in fills if fill != "none"]
    return found


@needs_dot
def test_every_parameter_is_in_the_picture_of_its_tasks_and_no_other(tmp_path: Path) -> None:
    model, tasks = problem(2)
    walk, found = drawn(model, tasks, batches(1, 2)[0])
    for name, picture in found.items():
        svg, png = pictures.draw(picture, tmp_path / f"{name}.svg")
        texts = {text.strip() for text in "\n".join(boxes(svg)).splitlines()}
        its = {leaf.name for leaf in walk.leaves.values() if name in leaf.tasks}
        assert texts & set(walk.leaves) == its
        assert {f"loss of {name}"} <= texts
        assert png.read_bytes().startswith(b"\x89PNG")


@needs_dot
def test_the_merged_picture_is_coloured_by_task(tmp_path: Path) -> None:
    model, tasks = problem(2)
    walk, _ = drawn(model, tasks, batches(1, 2)[0])
    svg, png = pictures.draw(pictures.of_all(walk), tmp_path / "graph.svg")
    found = boxes(svg)
    one, two = colours(["t0", "t1"]).values()
    assert found["heads.t0.1\nweight 5×16\nbias 5"] == [one]
    assert found["heads.t1.1\nweight 5×16\nbias 5"] == [two]
    assert found["trunk.conv\nweight 4×1×3×3\nbias 4"] == [one, two]  # shared, and one sees it
    assert found["loss of t0"] == [one]
    (trunk,) = [fills for label, fills in found.items() if label.startswith("Convolution")]
    assert trunk == [MANY]
    texts = svg.read_text()
    assert "several tasks" in texts
    for leaf in walk.leaves.values():
        assert re.search(rf">{leaf.name.rpartition('.')[0]}(\.{leaf.name.rpartition('.')[2]})?<", texts), leaf.name
    assert png.stat().st_size > 1000


@needs_dot
def test_tied_parameters_and_frozen_ones(tmp_path: Path) -> None:
    tasks = [mtl.Task(n, head=nn.Linear(4, 4), loss=nn.MSELoss(), target="y") for n in "ab"]
    tasks[1].head.weight = tasks[0].head.weight
    model = mtl.MultiTaskModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), tasks, inputs=["x"])
    model.freeze(["trunk"])
    walk, _ = drawn(model, tasks, {"x": torch.randn(2, 3), "y": torch.randn(2, 4)})
    svg, _ = pictures.draw(pictures.of_all(walk), tmp_path / "graph.svg")
    assert "heads.a.weight\n= heads.b.weight\n4×4" in boxes(svg)
    assert "frozen, so not in the graph: parameters of trunk" in svg.read_text()


@needs_dot
def test_the_graph_of_a_resnet_is_drawn(tmp_path: Path) -> None:
    trunk = mtl.trunks.Torchvision("resnet18")
    tasks = [mtl.Task(n, head=nn.Linear(512, 2), loss=nn.MSELoss(), target="y") for n in "ab"]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    walk, found = drawn(model, tasks, {"x": torch.randn(2, 3, 32, 32), "y": torch.randn(2, 2)})
    for picture in (found["a"], pictures.of_all(walk)):
        svg, _ = pictures.draw(picture, tmp_path / "graph.svg")
        texts = svg.read_text()
        assert "trunk.model.layer4.1.conv2.weight" in texts
        assert "trunk.model.bn1" in texts


@needs_dot
def test_a_deep_graph_is_drawn_without_running_out_of_stack(tmp_path: Path) -> None:
    x = torch.ones((), requires_grad=True)
    loss = x
    for _ in range(3000):
        loss = loss * 1.0
    assert pictures.of_task("deep", loss, {"x": x}).source.count("MulBackward0") == 3000


@needs_dot
def test_large_pictures_keep_to_what_a_png_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    model, tasks = problem(1)
    walk, _ = drawn(model, tasks, batches(1, 1)[0])
    monkeypatch.setattr(pictures, "MOST_PIXELS", 40_000)
    _, png = pictures.draw(pictures.of_all(walk), tmp_path / "graph.svg")
    with Image.open(png) as picture:
        assert 30_000 < picture.width * picture.height < 44_000


@needs_dot
def test_nor_is_a_row_of_pixels_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    model, tasks = problem(1)
    walk, _ = drawn(model, tasks, batches(1, 1)[0])
    monkeypatch.setattr(pictures, "MOST_IN_A_ROW", 150)
    _, png = pictures.draw(pictures.of_all(walk), tmp_path / "graph.svg")
    with Image.open(png) as picture:
        assert 140 < max(picture.size) < 160


@needs_dot
def test_a_graph_is_laid_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    dot = pictures._dot
    monkeypatch.setattr(pictures, "_dot", lambda source, *options: (calls.append(options), dot(source, *options))[1])
    model, tasks = problem(2)
    walk, _ = drawn(model, tasks, batches(1, 2)[0])
    svg, png = pictures.draw(pictures.of_all(walk), tmp_path / "graph.svg")
    assert ["-n2" in options for options in calls] == [False, True]  # that is: take the places that are given
    subprocess.run(["dot", "-Tsvg", "-o", "whole.svg"], input=pictures.of_all(walk).source.encode(), cwd=tmp_path)
    assert svg.read_bytes() == (tmp_path / "whole.svg").read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")


def by_hand(operations: dict[int, Operation], leaves: list[Leaf], names: list[str], seen: list[str]) -> Walk:
    walk = Walk(problem(1)[0], names, {})
    walk.leaves = {leaf.name: leaf for leaf in leaves}
    walk.operations = operations
    walk.without_graph = [name for name in seen if not any(name in each.ends for each in operations.values())]
    return walk


def operations_in(source: str) -> dict[str, str]:
    return dict(re.findall(r'^\t(\d+) \[label="?([\w\n]+)"? fillcolor', source, re.MULTILINE))


@needs_dot
def test_a_box_ends_where_a_loss_does() -> None:
    """One task's loss is part of another's."""
    operations = {
        0: Operation("TanhBackward0", ["w"], ["a", "b"]),
        1: Operation("MseLossBackward0", [0], ["a", "b"], ["a"]),
        2: Operation("MulBackward0", [1], ["b"]),
        3: Operation("SumBackward0", [2], ["b"], ["b"]),
    }
    leaf = Leaf("w", "parameter", (3,), True, ["a", "b"])
    source = pictures.of_all(by_hand(operations, [leaf], ["a", "b", "c"], ["a", "b"])).source
    assert operations_in(source) == {"1": "Tanh\nMseLoss", "3": "Mul\nSum"}
    edges = re.findall(r'^\t("[\w ]+"|\w+) -> ("[\w ]+"|\w+)', source, re.MULTILINE)
    assert edges == [("1", '"loss a"'), ("1", "3"), ("3", '"loss b"'), ('"leaf 0"', "1")]
    assert "<td>c: not in this batch</td>" in source


@needs_dot
def test_what_only_changes_a_parameter_s_layout_is_no_box() -> None:
    tasks = [mtl.Task("a", head=nn.Linear(4, 4), loss=nn.MSELoss(), target="y")]
    model = mtl.MultiTaskModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), tasks, inputs=["x"])
    walk, _ = drawn(model, tasks, {"x": torch.randn(2, 3), "y": torch.randn(2, 4)})
    assert [o.name for o in walk.operations.values()].count("TBackward0") == 2
    assert list(operations_in(pictures.of_all(walk).source).values()) == ["Addmm\nMseLoss", "Addmm\nTanh"]


def test_what_many_tasks_share_is_of_no_task_s_colour() -> None:
    names = [f"t{index}" for index in range(5)]
    palette = colours(names)
    assert pictures._style(names[:4], palette)["fillcolor"].split(":") == [palette[name] for name in names[:4]]
    assert pictures._style(names, palette) == {"style": "filled", "fillcolor": MANY, "penwidth": "2"}


@needs_dot
def test_dot_that_fails_or_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphviz import Digraph

    broken = Digraph(node_attr={"shape": "box"})
    broken.body.append("]")
    with pytest.raises(OSError, match="dot failed: .*syntax error"):
        pictures.draw(broken, tmp_path / "x.svg")
    monkeypatch.setattr(pictures, "SECONDS", 1e-4)
    with pytest.raises(OSError, match="dot did not finish the picture within"):
        pictures.draw(Digraph(), tmp_path / "x.svg")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install graphviz, brew install graphviz" in str(pictures.missing())
    monkeypatch.setitem(__import__("sys").modules, "torchviz", None)
    assert 'pip install "mtl-train[graph]"' in str(pictures.missing())


@pytest.mark.parametrize("count", [1, 2, 8, 9, 40])
def test_every_task_has_a_colour_of_its_own(count: int) -> None:
    found = colours([f"t{index}" for index in range(count)])
    assert len(set(found.values())) == count
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in found.values())


def test_plot_of_a_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    model, tasks = problem(3)
    (batch,) = batches(1)
    lives = {}
    for kind in ("joint", "sequential", "shared"):
        lives[kind] = Life(living_anyway(model, batch))
        with lives[kind].counting():
            backward(mtl.Step(model, tasks, passes=kind), batch, lives[kind])
    svg, png = plot(lives, tmp_path / "life.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    drawing = svg.read_text()
    for text in (*(f"{kind}: peak {life.peak / 1000:.4g} kB" for kind, life in lives.items()), "trunk", "backward"):
        assert f"<!-- {text} -->" in drawing
    for colour in colours(["t0", "t1", "t2"]).values():
        assert colour in drawing
    for panel, life in zip(figures[0].axes, lives.values(), strict=True):
        assert panel.get_ylabel() == "kB"
        assert [1000 * alive for alive in panel.lines[0].get_ydata()] == pytest.approx(life.ticks)
        phases = [event.phase for event in life.events if event.phase.kind != "between"]
        hatches = [("///" if phase.kind == "backward" else None) for phase in phases for _ in phase.of or ("trunk",)]
        assert [patch.get_hatch() for patch in panel.patches] == hatches
