"""Pictures of autograd's graphs: torchviz's picture of each task's graph, and one picture of all tasks by colour."""

import math
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mtl.errors import first_line
from mtl.graphs.colours import MANY, colours
from mtl.graphs.walk import Leaf, Walk

if TYPE_CHECKING:
    from graphviz import Digraph

EXTRA = 'pip install "mtl-train[graph]"'
DOT = "apt install graphviz, brew install graphviz or conda install graphviz"
SECONDS = 120  # the time limit for one picture, and for converting it to PNG
MOST_PIXELS, MOST_IN_A_ROW = 40e6, 30_000  # limits of a PNG; larger graphs are scaled down
FEW = 4  # the most tasks whose colours are striped in one box
LAYOUT_OR_TYPE = {f"{name}Backward0" for name in ("T", "ToCopy", "Transpose", "Permute", "View", "UnsafeView")}
FONT = {"fontname": "Helvetica,Arial,sans-serif", "fontsize": "10"}


def missing() -> str | None:
    """Returns which packages for pictures of graphs are missing and how to install them; None if none is missing."""
    try:
        with _quiet():
            import graphviz  # noqa: F401
            import torchviz  # noqa: F401
    except ImportError as error:
        return f"no pictures of the graphs: {first_line(error)}. Install it: {EXTRA}"
    if shutil.which("dot") is None:
        return f"no pictures of the graphs: graphviz's program 'dot' is not installed. Install it: {DOT}"
    return None


def of_task(task: str, loss: Tensor, named: Mapping[str, Tensor]) -> "Digraph":
    """Returns torchviz's picture of a task's whole graph, with the names of the parameters."""
    with _quiet():
        from torchviz import make_dot

        before = sys.getrecursionlimit()
        sys.setrecursionlimit(max(before, 100_000))  # torchviz traverses the graph recursively
        try:
            picture = make_dot(loss, params={f"loss of {task}": loss, **named})
        finally:
            sys.setrecursionlimit(before)
    picture.graph_attr.pop("size", None)  # or dot would scale down large graphs
    return picture


def of_all(walk: Walk) -> "Digraph":
    """Returns a picture of the autograd graphs of all tasks, merged into one.

    A node is coloured by the tasks that reach it. Operations in a chain without branches share a box. Operations
    between a parameter and the operation that uses it are left out if they only change layout or type.
    """
    from graphviz import Digraph

    palette = colours(walk.seen)
    picture = Digraph(
        graph_attr={"ranksep": "0.25", "nodesep": "0.15", **FONT},
        node_attr={"shape": "box", "height": "0.2", "margin": "0.08,0.04", "color": "#555555", **FONT},
        edge_attr={"color": "#777777", "arrowsize": "0.6"},
    )
    inputs = _simplified(walk)
    users: dict[int | str, list[int]] = {}
    for number, node_inputs in inputs.items():
        for each in node_inputs:
            users.setdefault(each, []).append(number)
    boxes: dict[tuple[str, tuple[int, ...]], list[Leaf]] = {}
    for name, leaf in walk.leaves.items():  # the parameters of one layer share a box
        if name in users:
            boxes.setdefault((name.rpartition(".")[0], tuple(sorted(set(users[name])))), []).append(leaf)
    chains = _chains(walk, inputs, users)
    end_of = {number: chain[-1] for chain in chains for number in chain}
    for chain in chains:
        end = walk.operations[chain[-1]]
        label = "\n".join(re.sub(r"Backward\d*$", "", walk.operations[number].name) for number in chain)
        colour = palette[end.tasks[0]] if len(end.tasks) == 1 else MANY
        picture.node(str(chain[-1]), label, style="rounded,filled", fillcolor=colour)
        for each in inputs[chain[0]]:
            if isinstance(each, int):
                picture.edge(str(each), str(chain[-1]))
        for task in end.ends:
            picture.node(f"loss {task}", f"loss of {task}", shape="ellipse", style="filled", fillcolor=palette[task])
            picture.edge(str(chain[-1]), f"loss {task}")
    for index, ((_, box_users), box_leaves) in enumerate(boxes.items()):
        picture.node(f"leaf {index}", _label(box_leaves), **_style(box_leaves[0].tasks, palette))
        for number in box_users:
            picture.edge(f"leaf {index}", str(end_of[number]), color="#222222")
    _legend(picture, palette, walk)
    return picture


def _simplified(walk: Walk) -> dict[int, list[int | str]]:
    """Returns the inputs of each operation, without layout or type changes between a leaf and its first use."""

    def source(each: int | str) -> int | str:
        end = each
        while isinstance(end, int):
            operation = walk.operations[end]
            if operation.name not in LAYOUT_OR_TYPE or len(operation.inputs) != 1:
                return each
            end = operation.inputs[0]
        return end

    return {
        number: [source(each) for each in operation.inputs]
        for number, operation in walk.operations.items()
        if operation.ends or isinstance(source(number), int)
    }


def _chains(
    walk: Walk, inputs: Mapping[int, Sequence[int | str]], users: Mapping[int | str, Sequence[int]]
) -> list[list[int]]:
    """Returns chains of operations in which each operation's only input is used by that operation alone."""

    def before(number: int) -> int | None:
        node_inputs = inputs[number]
        if (
            len(node_inputs) != 1
            or not isinstance(node_inputs[0], int)
            or len(users[node_inputs[0]]) > 1
            or walk.operations[node_inputs[0]].ends
        ):
            return None
        return node_inputs[0]

    following = {previous: number for number in inputs if (previous := before(number)) is not None}
    chains = []
    for start in inputs:
        if before(start) is None:
            chains.append([start])
            while chains[-1][-1] in following:
                chains[-1].append(following[chains[-1][-1]])
    return chains


def _label(leaves: Sequence[Leaf]) -> str:
    def sizes(leaf: Leaf) -> str:
        return "×".join(map(str, leaf.shape)) or "1"

    if len(leaves) == 1:
        return "\n".join([leaves[0].name, *(f"= {other}" for other in leaves[0].also), sizes(leaves[0])])
    parts = [f"{leaf.name.rpartition('.')[2]} {sizes(leaf)}" for leaf in leaves]
    return "\n".join([leaves[0].name.rpartition(".")[0], *parts])


def _style(tasks: Sequence[str], palette: Mapping[str, str]) -> dict[str, str]:
    """Returns the style of a node: stripes and a thick line if several tasks share it."""
    if len(tasks) == 1:
        return {"style": "filled", "fillcolor": palette[tasks[0]]}
    if len(tasks) <= FEW:
        return {"style": "striped", "fillcolor": ":".join(palette[task] for task in tasks), "penwidth": "2"}
    return {"style": "filled", "fillcolor": MANY, "penwidth": "2"}


def _legend(picture: "Digraph", palette: Mapping[str, str], walk: Walk) -> None:
    tasks = list(palette)
    rows = [f'<td bgcolor="{colour}">{task}</td>' for task, colour in palette.items()]
    if any(leaf.shared for leaf in walk.leaves.values()):
        rows.append(f'<td bgcolor="{MANY}">several tasks</td>')
    rows += [f"<td>{name}: not in this batch</td>" for name in walk.names if name not in tasks]
    if frozen := list(walk.frozen()):
        suffix = f" and {len(frozen) - FEW} more" if len(frozen) > FEW else ""
        rows.append(f"<td>frozen, so not in the graph: parameters of {', '.join(frozen[:FEW])}{suffix}</td>")
    lines = "".join(f"<tr>{''.join(rows[start : start + 8])}</tr>" for start in range(0, len(rows), 8))
    table = f'<table border="0" cellborder="1" cellspacing="0" cellpadding="5">{lines}</table>'
    picture.attr(label=f"<{table}>", labelloc="t")


def draw(picture: "Digraph", path: Path) -> list[Path]:
    """Writes the picture as SVG and PNG.

    Raises:
        OSError: If dot fails.
    """
    files = [path.with_suffix(".svg"), path.with_suffix(".png")]
    laid_out = _dot(picture.source.encode(), "-Tsvg", "-o", str(files[0]), "-Tdot")
    size_match = re.search(r'<svg width="(\d+)pt" height="(\d+)pt"', files[0].read_text(encoding="utf-8"))
    assert size_match is not None
    width, height = (float(size) / 72 for size in size_match.groups())
    dpi = min(96.0, math.sqrt(MOST_PIXELS / (width * height)), MOST_IN_A_ROW / max(width, height))
    files[1].write_bytes(_dot(laid_out, "-Kneato", "-n2", "-Tpng", f"-Gdpi={dpi:.1f}"))  # keeps the positions
    return files


def _dot(source: bytes, *options: str) -> bytes:
    try:
        done = subprocess.run(["dot", *options], input=source, capture_output=True, check=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"dot did not finish the picture within {SECONDS} seconds") from error
    except subprocess.CalledProcessError as error:
        raise OSError(f"dot failed: {error.stderr.decode(errors='replace').strip()}") from error
    output: bytes = done.stdout
    return output


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides a deprecation warning: torchviz uses distutils to compare torch's version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
