"""Tables and sentences about a graph."""

import csv
from pathlib import Path

import torch
from conftest import batches, problem
from torch import nn

import mtl
from mtl.graphs import Life, Walk, backward, living_anyway, text
from mtl.graphs.watched import Phase


def walked(model: mtl.MultiTaskModel, tasks: list[mtl.Task], batch: dict[str, torch.Tensor]):
    walk = Walk(model, [task.name for task in tasks], batch)
    with walk.recording():
        result = backward(mtl.Step(model, tasks, passes="joint"), batch, walk, measure=True)
    return walk, result.reach


def of_many(count: int) -> tuple[Walk, dict[str, tuple[str, ...]]]:
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(4, 1), loss=nn.MSELoss(), target="y") for i in range(count)]
    trunk = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(10)))
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    return walked(model, tasks, {"x": torch.randn(2, 4), "y": torch.randn(2, 1)})


def test_few_leaves_have_a_row_each() -> None:
    model, tasks = problem(2)
    model.freeze(["trunk.conv"])
    grid = text.leaves(walked(model, tasks, batches(1, 2)[0])[0])
    assert ["trunk.conv.bias", "4", "no", "–", "no"] in grid.rows
    assert ["trunk.norm.weight", "4", "yes", "t0, t1", "yes"] in grid.rows
    assert ["heads.t1.1.weight", "5×16", "yes", "t1", "no"] in grid.rows
    assert len(grid.rows) == len(list(model.parameters()))


def test_many_leaves_go_by_module() -> None:
    """40 leaves in the trunk: by layers of two, 20 rows, and 2 in each of 3 heads."""
    walk, _ = of_many(3)
    grid = text.leaves(walk)
    assert [row[0] for row in grid.rows][:2] == ["trunk.0.0.*", "trunk.0.1.*"]
    assert grid.rows[0] == ["trunk.0.0.*", "2 tensors: 20", "yes", "all 3", "yes"]
    assert len(grid.rows) == 20 + 2 * 3
    assert len(text.leaves(walk, None).rows) == 46
    assert [row[:2] for row in text.leaves(walk, 13).rows][:1] == [["trunk.0.*", "4 tensors: 40"]]


def test_heads_of_many_tasks_are_one_row() -> None:
    walk, _ = of_many(40)
    assert text.leaves(walk).rows == [
        ["trunk.*", "40 tensors: 400", "yes", "all 40", "yes"],
        ["heads.*", "80 tensors: 200", "yes", "one each of 40", "no"],
    ]


def test_sentences_on_what_is_frozen() -> None:
    trunk = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
    tasks = [mtl.Task(n, head=nn.Linear(4, 4), loss=nn.MSELoss(), target="y") for n in "ab"]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    model.freeze(["trunk.0"])
    model.freeze(["trunk.4", "heads.a.bias"], until=30)
    walk, reach = walked(model, tasks, {"x": torch.randn(2, 3), "y": torch.randn(2, 4)})
    lines = text.notes(walk, reach, model.frozen_until)
    assert any(
        line.startswith("Frozen, outside the graph") and line.endswith(": trunk.0 (20 numbers).") for line in lines
    )
    through = "trunk.4 (24 numbers until step 30)."
    assert any(line.startswith("Frozen, above trainable parameters") and line.endswith(through) for line in lines)
    beside = "heads.a.bias (4 numbers until step 30)."
    assert any(
        line.startswith("Frozen, in modules with trainable parameters") and line.endswith(beside) for line in lines
    )
    assert "Trainable parameters that no task reaches: none." in lines


def test_sentences_on_what_is_absent_and_unreached() -> None:
    model, tasks = problem(2)
    model.trunk.idle = nn.Linear(2, 2)
    tasks[1].missing = True
    (batch,) = batches(1, 2)
    batch["y1"][:] = -100
    lines = text.notes(*walked(model, tasks, batch), {})
    assert lines[0].startswith("Tasks without labels in this batch, so without a graph: t1.")
    unreached = "trunk.idle.weight, trunk.idle.bias, heads.t1.1.weight, heads.t1.1.bias"
    assert f"Trainable parameters that no task reaches: {unreached}." in lines


class Stops(torch.autograd.Function):
    """A function whose first input is in the graph and gets no gradient."""

    @staticmethod
    def forward(ctx, first, second):
        return first * second

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


def test_a_parameter_in_the_graph_that_is_given_no_gradient_is_named() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Stops.apply(self.scale, x + self.shift)

    tasks = [mtl.Task("a", head=nn.Linear(4, 1), loss=nn.MSELoss(), target="y")]
    model = mtl.MultiTaskModel(Trunk(), tasks, inputs=["x"])
    lines = text.notes(*walked(model, tasks, {"x": torch.randn(2, 4), "y": torch.randn(2, 1)}), {})
    assert "In the graph, but without a gradient from some task: trunk.scale." in lines


def test_it_is_enough_that_one_task_gives_none() -> None:
    class Head(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(Stops.apply(x, torch.ones_like(x).requires_grad_()))

    tasks = [mtl.Task(n, head=h, loss=nn.MSELoss(), target="y") for n, h in (("a", Head(4, 1)), ("b", nn.Linear(4, 1)))]
    model = mtl.MultiTaskModel(nn.Linear(3, 4), tasks, inputs=["x"])
    walk, reach = walked(model, tasks, {"x": torch.randn(2, 3), "y": torch.randn(2, 1)})
    assert reach["trunk.weight"] == ("b",)
    assert "In the graph, but without a gradient from some task: trunk.weight, trunk.bias." in text.notes(
        walk, reach, {}
    )


def test_bytes_for_people() -> None:
    assert [text.size(count) for count in (0, 999, 1000, 2_345_678)] == ["0 bytes", "999 bytes", "1.000 kB", "2.346 MB"]
    lives = {kind: Life([]) for kind in ("joint", "shared")}
    for life, count in zip(lives.values(), (500, 250), strict=True):
        phase = Phase(1, "forward", ("a",))
        life.begin(phase)
        life.change(torch.zeros(count), +1)
        life.end(phase)
    assert text.peaks(lives, "shared") == "Peak of saved memory: joint 2.000 kB, shared 1.000 kB (this config)."
    assert text.life(lives).rows == [
        ["joint", "a forward", "2.000 kB", "2.000 kB"],
        ["shared", "a forward", "1.000 kB", "1.000 kB"],
    ]


def test_csv_says_the_same(tmp_path: Path) -> None:
    model, tasks = problem(2)
    (batch,) = batches(1, 2)
    walk, reach = walked(model, tasks, batch)
    text.write_leaves(walk, tmp_path / "leaves.csv")
    with (tmp_path / "leaves.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["leaf"]: tuple(row["tasks"].split()) for row in rows} == reach
    assert all((row["shared"] == "true") == (len(reach[row["leaf"]]) > 1) for row in rows)
    assert all(row["requires_grad"] == "true" and row["kind"] == "parameter" for row in rows)

    life = Life(living_anyway(model, batch))
    with life.counting():
        backward(mtl.Step(model, tasks, passes="shared"), batch, life)
    text.write_life({"shared": life}, tmp_path / "life.csv")
    with (tmp_path / "life.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["of"], row["after"], int(row["alive"]), int(row["peak"])) for row in rows] == [
        (" ".join(event.phase.of) or "trunk", event.phase.kind, event.alive, event.peak) for event in life.events
    ]
    grid = text.life({"shared": life})
    assert [row[1] for row in grid.rows] == [str(event.phase) for event in life.events]
    assert text.life({"shared": life}, 4).left_out == len(life.events) - 4


def test_markdown() -> None:
    grid = text.Grid(("a", "b"), [["x|y", "1"]], (1,))
    assert grid.markdown() == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"


def test_names_in_a_line() -> None:
    assert text.listed(["a", "b", "c", "d"]) == "a, b, c, d"
    assert text.listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
