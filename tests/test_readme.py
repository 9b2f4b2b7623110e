"""The statements of README.md; test_docs.py runs its commands and snippets."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT
from pages import PAGES

import mtl

README = PAGES[0]
HANGS = 1800  # seconds after which a command is taken to hang; nothing is right or wrong for the time it takes


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_first_block_is_the_two_commands() -> None:
    assert README.blocks[0] == (
        "bash",
        'pip install -e . && python -m mtl.train task=mnist_two_head\npip install -e ".[test]" && python -m pytest\n',
    )


def test_it_is_short() -> None:
    assert len(README.text.splitlines()) <= 250


def test_config_that_is_explained_is_the_one_that_is_used() -> None:
    (shown,) = [text for kind, text in README.blocks if kind == "yaml" and text not in README.files.values()]
    assert shown == (ROOT / "configs" / "task" / "mnist_two_head.yaml").read_text()


def test_the_loop_is_short() -> None:
    (loop,) = [text for kind, text in README.blocks if kind == "python" and "step(batch)" in text]
    assert len(loop.split("import mtl\n")[1].strip().splitlines()) <= 10


def test_help_of_the_command(tmp_path: Path) -> None:
    assert "train a problem" in run([sys.executable, "-m", "mtl", "--help"], tmp_path)
    assert "mnist_two_head, mnist_two_model" in run([sys.executable, "-m", "mtl", "train", "--help"], tmp_path)
    wrong = subprocess.run(
        [sys.executable, "-m", "mtl", "trian"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert wrong.returncode == 1
    assert "did you mean 'train'?" in wrong.stderr


def test_the_version_has_one_source(tmp_path: Path) -> None:
    assert run([sys.executable, "-m", "mtl", "--version"], tmp_path) == f"mtl {mtl.__version__}\n"
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert mtl.__version__ not in project
    assert re.search(f"^## {re.escape(mtl.__version__)} ", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert f"version: {mtl.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    if version("mtl-train") != mtl.__version__:
        pytest.skip("the package was installed before its version was changed")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(([^)#:]+)[^):]*\)", README.text))))
def test_pages_and_pictures_that_it_links_exist(name: str) -> None:
    assert (ROOT / name).stat().st_size > (10_000 if name.endswith(".png") else 300)
