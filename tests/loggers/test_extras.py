"""Common behaviour of both loggers of extra packages: messages if these are missing, and no network access."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command

import mtl
from mtl.loggers import MLflowLogger, WandbLogger


def missing(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec

    def found(name: str, *rest: str):
        return None if name in packages else find(name, *rest)

    monkeypatch.setattr("mtl.loggers.wandb.find_spec", found)
    monkeypatch.setattr("mtl.loggers.mlflow.find_spec", found)


def test_what_to_install_is_said_at_construction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "wandb", "mlflow")
    with pytest.raises(mtl.UserError, match=r'wandb is not installed: pip install "mtl-train\[wandb\]"'):
        WandbLogger(tmp_path, ["a"])
    with pytest.raises(mtl.UserError, match=r'mlflow is not installed: pip install "mtl-train\[mlflow\]"'):
        MLflowLogger(tmp_path, ["a"], tracking_uri="http://localhost:1")


def test_a_database_needs_more_than_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the package mlflow isn't there")
    missing(monkeypatch, "alembic")
    with pytest.raises(mtl.UserError, match="alembic is not installed"):
        MLflowLogger(tmp_path, ["a"], tracking_uri="sqlite:///x.db")
    MLflowLogger(tmp_path, ["a"], tracking_uri="http://localhost:1")


def test_it_is_an_error_before_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "wandb")
    done = command("train", "task=mnist_two_head", "logger=wandb")
    assert done.code == 1
    assert 'pip install "mtl-train[wandb]"' in done.err
    assert "Traceback" not in done.err


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace isn't there")
@pytest.mark.parametrize(
    ("package", "made"),
    [
        ("wandb", "WandbLogger(Path.cwd(), ['a'])"),
        ("mlflow", "MLflowLogger(Path.cwd(), ['a'], tracking_uri='sqlite:///x.db')"),
    ],
)
def test_nobody_is_called(here: Path, package: str, made: str) -> None:
    """No name is looked up and no connection made but within the machine, by other processes of a package neither."""
    pytest.importorskip(package, reason=f"the package {package} isn't there")
    code = (
        "from pathlib import Path\n"
        "from mtl.loggers import MLflowLogger, WandbLogger\n"
        f"logger = {made}\n"
        "logger.log(1, 1, {'loss/a/train': 0.5}); logger.flush(); logger.end(); logger.close()\n"
    )
    line = ["strace", "-f", "-e", "trace=connect,sendto,sendmmsg", "-o", "calls.txt", sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    done = subprocess.run(line, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(here.rglob("*.wandb")) or (here / "x.db").is_file()
    assert "AF_INET" not in (here / "calls.txt").read_text()
