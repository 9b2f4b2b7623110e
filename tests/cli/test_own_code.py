"""Messages about the user's own code: the location of a mistake, and files that aren't read."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import mtl
from mtl.config.targets import find, make
from mtl.errors import is_users

FAILS = "import json\nclass Head:\n    def __init__(self): json.loads('{')\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provides a folder of code at the end of the search path, like that of --config-dir."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in ("own_heads", "sched", "code_of_two"):
        sys.modules.pop(name, None)
    return tmp_path


@pytest.mark.parametrize(
    "folder", ["mine", "mtl", "mtl/mtl", "my-site-packages", "site-packages", "site-packages-of-2024/lib", "torch"]
)
def test_a_place_in_ones_own_code_is_told_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    sys.modules.pop("own_heads", None)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "own_heads.py").write_text(FAILS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / folder)])
    with pytest.raises(mtl.UserError, match=r"JSONDecodeError: .* \(own_heads.py, line 3\)"):
        make({"_target_": "own_heads.Head"}, "here")


@pytest.mark.parametrize(
    "path",
    [
        mtl.__file__,
        str(Path(mtl.__file__).parent / "heads" / "linear.py"),
        json.__file__,
        pytest.__file__,
        "<frozen importlib._bootstrap>",
        "/somewhere/else/lib/python3.12/site-packages/x.py",
        "/usr/lib/python3/dist-packages/x.py",
        "C:\\Python312\\Lib\\site-packages\\x.py",
    ],
)
def test_other_peoples_code_is_not_ones_own(path: str) -> None:
    assert not is_users(path)


def test_a_project_that_was_cloned_into_a_folder_mtl(tmp_path: Path) -> None:
    clone = tmp_path / "mtl"
    shutil.copytree(ROOT / "mtl", clone / "mtl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", clone / "configs")
    (clone / "own_heads.py").write_text(FAILS)
    options = ["task=mnist_two_head", "tasks.digit.head={_target_: own_heads.Head}", "~tasks.digit.head.in_features"]
    there = {**os.environ, "PYTHONPATH": str(clone)}
    line = [sys.executable, "-m", "mtl.train", *options, "~tasks.digit.head.out_features"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=clone, env=there)
    assert done.returncode == 1
    assert "tasks.digit.head: own_heads.Head() failed: JSONDecodeError: " in done.stderr
    assert "(own_heads.py, line 3)" in done.stderr


def test_a_file_with_the_name_of_a_standard_module_is_named(own: Path) -> None:
    (own / "sched.py").write_text("class Warm: pass\n")
    message = (
        rf"'sched' has no 'Warm': 'sched' is Python's own, and your {own}/sched.py isn't read; give the file another"
    )
    with pytest.raises(mtl.UserError, match=message):
        find("sched.Warm", "scheduler")
    with pytest.raises(mtl.UserError, match=r"'sched' has no 'Cold': 'sched' is Python's own"):
        find("sched.Cold", "scheduler")


@pytest.mark.parametrize(
    ("file", "text", "target"),
    [
        ("random.py", "def shuffle(x): return x\n", "random.shuffle"),
        ("random.py", "class Random: pass\n", "random.Random"),
        ("random.py", "shuffle = sorted\n", "random.shuffle"),
        ("random.py", "from math import floor as shuffle\n", "random.shuffle"),
        ("time.py", "def sleep(x): return x\n", "time.sleep"),  # a built-in module, which has no file
        ("torchmetrics.py", "class Accuracy: pass\n", "torchmetrics.Accuracy"),
        ("torchmetrics/__init__.py", "class Accuracy: pass\n", "torchmetrics.Accuracy"),
        ("json/decoder.py", "class JSONDecoder: pass\n", "json.decoder.JSONDecoder"),
    ],
)
def test_a_name_that_both_modules_have_is_not_taken_silently(own: Path, file: str, text: str, target: str) -> None:
    (own / file).parent.mkdir(exist_ok=True)
    (own / file).write_text(text)
    with pytest.raises(mtl.UserError) as error:
        find(target, "here")
    assert f"here._target_: '{target}' is ambiguous: '{target.split('.')[0]}' is " in str(error.value)
    assert f"and your {own / file} isn't read; give the file another name" in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "target"),
    [
        ("random.py", "def mine(): pass\n", "random.shuffle"),  # it hasn't this name, so it wasn't meant
        ("random.py", "this is no Python\n", "random.shuffle"),
        ("random.txt", "def shuffle(x): return x\n", "random.shuffle"),
        ("own_heads.py", "class Head: pass\n", "own_heads.Head"),
        ("own_heads/__init__.py", "class Head: pass\n", "own_heads.Head"),
        ("own_heads/parts.py", "class Head: pass\n", "own_heads.parts.Head"),
        ("mtl/heads.py", "class Linear: pass\n", "mtl.heads.Linear"),  # another checkout of this project
    ],
)
def test_other_files_are_no_matter(own: Path, file: str, text: str, target: str) -> None:
    (own / file).parent.mkdir(exist_ok=True)
    (own / file).write_text(text)
    for name in [name for name in sys.modules if name.split(".")[0] == "own_heads"]:
        del sys.modules[name]
    assert callable(find(target, "here"))
    assert random.shuffle.__module__ == "random"


def test_of_two_files_of_ones_own_the_one_that_is_read_is_named(
    own: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path_factory.mktemp("first")
    monkeypatch.setattr(sys, "path", [str(first), *sys.path])
    (first / "code_of_two.py").write_text("class A: pass\nclass Both: pass\n")
    (own / "code_of_two.py").write_text("class B: pass\nclass Both: pass\n")
    assert find("code_of_two.Both", "x").__module__ == "code_of_two"  # Python's order, as everywhere
    with pytest.raises(mtl.UserError) as error:
        find("code_of_two.B", "x")
    assert f"'code_of_two' is the one in {first}/code_of_two.py, and your {own}/code_of_two.py isn't" in str(
        error.value
    )
