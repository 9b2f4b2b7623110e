"""The wheel has the configs and the data, and trains from any folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that building leaves nothing in the checkout; what git doesn't know isn't copied.
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("mtl_train-*.whl")
    return built


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {f"mtl/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "mtl").rglob("*.py")}
    assert packed | code | {"mtl/data/mnist_5k.npz", "mtl/data/mnist_5k.md", "mtl/py.typed"} <= names
    assert not {name for name in names if name.startswith(("tests", "scripts", "configs"))}


def test_trains_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import mtl; assert mtl.__file__.startswith({str(installed)!r})\n"
        "import runpy; sys.argv = ['mtl.train', 'task=mnist_two_head', 'trainer.max_epochs=1']\n"
        "runpy.run_module('mtl.train', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (metrics,) = elsewhere.glob("outputs/mnist_two_head/*/metrics.json")
    assert '"status": "finished"' in metrics.read_text()
    assert (installed / "bin" / "mtl").exists()
