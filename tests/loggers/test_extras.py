"""Loggers of packages that aren't there."""

import importlib.util
from pathlib import Path

import pytest
from conftest import command

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
    with pytest.raises(mtl.UserError, match=r'the package wandb isn\'t there; pip install "mtl-train\[wandb\]"'):
        WandbLogger(tmp_path, ["a"])
    with pytest.raises(mtl.UserError, match=r'the package mlflow isn\'t there; pip install "mtl-train\[mlflow\]"'):
        MLflowLogger(tmp_path, ["a"], tracking_uri="http://localhost:1")


def test_a_database_needs_more_than_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the package mlflow isn't there")
    missing(monkeypatch, "alembic")
    with pytest.raises(mtl.UserError, match="the package alembic isn't there"):
        MLflowLogger(tmp_path, ["a"], tracking_uri="sqlite:///x.db")
    MLflowLogger(tmp_path, ["a"], tracking_uri="http://localhost:1")


def test_it_is_an_error_before_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "wandb")
    done = command("train", "task=mnist_two_head", "logger=wandb")
    assert done.code == 1
    assert 'pip install "mtl-train[wandb]"' in done.err
    assert "Traceback" not in done.err
