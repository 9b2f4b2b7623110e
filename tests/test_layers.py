"""Which modules may import which."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mtl

PACKAGE = Path(__file__).parents[1] / "mtl"

# A package, or a module on top, may import those of the levels below its own.
LEVELS = [
    {
        "text",
        "balancers",
        "losses",
        "metrics",
        "heads",
        "optimizers",
        "choices",
        "tags",
        "quoting",
        "snapshots",
        "seeds",
    },
    {"errors"},
    {"distributed", "safety", "batch", "outputs", "schedule", "schedulers", "recompute", "chosen_tasks"},
    {"process", "gradients", "files", "task", "schema"},
    {"data", "labels", "model", "loggers"},
    {"trunks"},
    {"architectures", "problems", "step"},
    {"training", "graphs"},
    {"config"},
    {"runs"},
    {"build", "reporting"},
    {"cli"},
    {"train", "evaluate", "graph", "report", "__init__", "__main__"},
]


def imports_of(path: Path) -> set[str]:
    """Returns the parts of mtl that are imported when the module runs, without imports for type annotations."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "mtl":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mtl."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mtl.")}
    return found


def files() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).with_suffix("").parts[0], path) for path in sorted(PACKAGE.rglob("*.py"))]


def test_every_module_has_a_level() -> None:
    assert {part for part, _ in files()} <= set().union(*LEVELS)


@pytest.mark.parametrize(("part", "path"), files(), ids=[str(p.relative_to(PACKAGE)) for _, p in files()])
def test_imports_go_down(part: str, path: Path) -> None:
    level = next(index for index, parts in enumerate(LEVELS) if part in parts)
    below = set().union(*LEVELS[:level]) | {part}
    assert imports_of(path) <= below


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {path: ".".join(("mtl", *path.relative_to(PACKAGE).with_suffix("").parts)) for _, path in files()}
    graph: dict[str, set[str]] = {}
    for path, module in modules.items():
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
        named = {f"{node.module}.{alias.name}" for node in top for alias in node.names} | {node.module for node in top}
        graph[module] = named & set(modules.values())
    assert len(list(TopologicalSorter(graph).static_order())) >= len(modules)


def test_hydra_is_in_the_entry_points_alone() -> None:
    for part, path in files():
        uses = any(line.strip().startswith(("import hydra", "from hydra")) for line in path.read_text().splitlines())
        assert not uses or part in {"cli", "train", "evaluate", "graph"}, path


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import mtl.train, mtl.evaluate, mtl.graph, mtl.report, mtl.schema", ["torch", "rich", "numpy"]),
        (
            "import mtl.training.trainer, mtl.config.training, mtl.loggers",
            ["torchvision", "pandas", "pyarrow", "PIL", "torchmetrics", "tensorboard", "matplotlib", "hydra"],
        ),
        (
            "import mtl; mtl.Step, mtl.Task, mtl.load",
            ["torchvision", "pandas", "pyarrow", "PIL", "torchmetrics", "tensorboard", "matplotlib", "hydra"],
        ),
    ],
)
def test_heavy_modules_come_when_they_are_needed(code: str, heavy: list[str]) -> None:
    look = f"{code}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_dir_lists_the_public_names() -> None:
    assert dir(mtl) == sorted([*mtl.__all__, "__version__"])
    assert all(hasattr(mtl, name) for name in dir(mtl))
    assert {"Gradients", "MultiTaskModel", "Step", "Task", "Update", "balancers", "load", "loggers"} <= set(dir(mtl))


@pytest.mark.parametrize("path", [path for _, path in files()], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= (150 if path == PACKAGE / "train.py" else 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name
