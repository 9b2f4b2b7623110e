"""The offline files of Weights & Biases, read back record by record."""

import csv
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, command, stopping
from test_readme import HANGS

import mtl
from mtl import tags
from mtl.loggers import Loggers, WandbLogger

wandb = pytest.importorskip("wandb", reason="the package wandb isn't there")
HEAD = ["task=mnist_two_head", "trainer.max_epochs=2", "log.every=20", "logger=[csv,wandb]"]
BLOCK = 32768
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolates the test from the account's settings and files."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "account"))


def records(path: Path) -> Iterator[Any]:
    """Yields the records of a .wandb file: seven bytes of identification, then blocks of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    assert content.startswith(b":W&B")
    position, message = 7, b""
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        piece = content[position + 7 : position + 7 + length]
        if len(piece) < length:  # the rest is yet to be written
            return
        message = piece if kind in (1, 2) else message + piece
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(message)


def files(run: Path) -> list[Path]:
    """Returns a file for each process; waits for the last one, since W&B writes for a moment after it has finished."""
    found = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    wait_for(found[-1], "exit", 1)
    return found


def wait_for(path: Path, kind: str, count: int) -> None:
    """Waits until the file has this number of records of the kind."""
    patience = time.monotonic() + HANGS
    while sum(record.WhichOneof("record_type") == kind for record in records(path)) < count:
        assert time.monotonic() < patience
        time.sleep(0.01)


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of all processes, each with its number."""
    found = []
    for path in files(run):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                found.append({name: v for name, v in items.items() if name not in ("_timestamp", "_runtime")})
    return found


def figures(run: Path) -> list[tuple[int, int, str, float]]:
    return [
        (row["step"], row["epoch"], name, float(value))
        for row in rows(run)
        for name, value in row.items()
        if name not in ("step", "epoch", "_step") and isinstance(value, int | float) and "epoch" in row
    ]


def in_csv(run: Path) -> list[tuple[int, int, str, float]]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [(int(r["step"]), int(r["epoch"]), r["tag"], float(r["value"])) for r in csv.DictReader(file)]


@pytest.mark.slow
def test_every_figure_of_a_metric_has_a_name_of_its_own(tmp_path: Path) -> None:
    """A dot in a name makes no group."""
    figures = ["within_11.25", "< 30°", "> 30°", 'bed & "sofa"', "a.b", "."]
    scalars = {tags.metric("normals", f"angle.{name}", "val"): float(i) for i, name in enumerate(figures)}
    logger = WandbLogger(tmp_path, ["normals"])
    logger.log(1, 1, scalars)
    logger.end()
    logger.close()
    (row,) = rows(tmp_path)
    assert {name: value for name, value in row.items() if name.startswith("metric/")} == scalars


def test_all_figures_of_a_run_exactly(here: Path) -> None:
    done = command("train", *HEAD)
    assert done.code == 0, done.err
    assert done.run is not None
    assert sorted(figures(done.run)) == sorted(in_csv(done.run))
    assert [row["_step"] for row in rows(done.run)] == list(range(len(rows(done.run))))
    (path,) = files(done.run)
    (run,) = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
    assert run.display_name == done.run.name
    assert run.project == "mtl"
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["balancer"] == "equal"
    assert config["seed"] == 0
    (ended,) = [record.exit for record in records(path) if record.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 0
    pictures = {name.removesuffix("._type") for row in rows(done.run) for name in row if name.endswith("._type")}
    assert "cosine/matrix" in pictures
    assert list(path.parent.glob("files/media/images/cosine/matrix_*.png"))
    assert "wandb/" in " ".join(done.out.split())
    assert "offline-run" not in done.out
    assert not (here / "wandb").exists()


def test_a_run_that_goes_on_is_one_run(here: Path) -> None:
    stopped = command("train", *stopping(90), *HEAD)
    assert stopped.code == 128 + signal.SIGTERM
    again = command("train", *HEAD, "resume=auto")
    assert again.code == 0, again.err
    run = stopped.run
    assert run is not None
    assert len(files(run)) == 2
    assert len({path.name for path in files(run)}) == 1  # of one id
    assert sorted(figures(run)) == sorted(in_csv(run))
    assert [row["_step"] for row in rows(run)] == list(range(len(rows(run))))


def test_what_was_logged_after_the_last_state_of_a_killed_process_is_there_once(tmp_path: Path) -> None:
    first = WandbLogger(tmp_path, ["a"])
    first.log(1, 1, {"loss/a/train": 0.1})
    first.log(2, 1, {"loss/a/train": 0.2})
    first.flush()
    state = first.state_dict()
    first.log(3, 1, {"loss/a/train": 0.3})
    first._run.finish()  # the process is gone, and with it what it held
    time.sleep(1.1)  # W&B names a process's folder by the second
    assert json.loads(json.dumps(state)) == state
    second = WandbLogger(tmp_path, ["a"])
    second.load_state_dict(state)
    second.log(3, 1, {"loss/a/train": 0.3})
    second.log(4, 2, {"loss/a/train": float("nan")})
    second.close()
    assert [(row["_step"], row["step"]) for row in rows(tmp_path)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    values = [row["loss/a/train"] for row in rows(tmp_path)]
    assert values[:3] == [0.1, 0.2, 0.3]
    assert np.isnan(values[3])
    ends = [r.exit.exit_code for p in files(tmp_path) for r in records(p) if r.WhichOneof("record_type") == "exit"]
    assert ends[-1] == 1  # it wasn't finished


@pytest.mark.slow
def test_a_run_that_was_killed_and_goes_on_has_every_figure_once(here: Path) -> None:
    """In both logs; killed in the middle of an epoch, when figures had been logged since the last checkpoint."""
    from test_mlflow import history
    from test_mlflow import in_csv as by_tag

    (here / "code").mkdir()
    (here / "code" / "dies.py").write_text(
        "import os, signal\n"
        "from pathlib import Path\n"
        "from test_wandb import wait_for\n"
        "class At:\n"
        "    def __call__(self, trainer, result):\n"
        "        if trainer.global_step == 110:  # and W&B has written what it was given at step 63\n"
        "            (path,) = Path().glob('outputs/*/*/wandb/offline-run-*/*.wandb')\n"
        "            (logger,) = [x for x in trainer.loggers._loggers if type(x).__name__ == 'WandbLogger']\n"
        "            wait_for(path, 'history', logger._rows)\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = [*HEAD[:-1], "logger=[csv,wandb,mlflow]"]
    line = [sys.executable, "-m", "mtl.train", "--config-dir", "code", *arguments, "+callbacks.x._target_=dies.At"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE)))}
    killed = subprocess.run(line, cwd=here, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (run,) = here.glob("outputs/mnist_two_head/*")
    before = in_csv(run)
    assert max(step for step, *_ in before) == 100  # and 63 in the checkpoint
    again = command("train", *arguments, "resume=auto")
    assert "resume   from step 63" in again.out
    assert sorted(figures(run)) == sorted(in_csv(run))
    assert [row["_step"] for row in rows(run)] == list(range(len(rows(run))))
    found = history(here / "outputs" / "mlflow.db")
    del found["epoch"]
    assert found == by_tag(run)


def test_pictures_and_histograms(tmp_path: Path) -> None:
    from PIL import Image

    logger = WandbLogger(tmp_path, ["a"])
    picture = np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)
    logger.picture("cosine/matrix", 5, picture)
    logger.histogram("parameter/w", 6, torch.tensor([[0.0, 1.0], [1.0, float("nan")]]))
    logger.end()
    logger.close()
    (path,) = tmp_path.rglob("*.png")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), picture)
    shown, counted = rows(tmp_path)
    assert shown["step"] == 5
    counts, edges = counted["parameter/w.values"], counted["parameter/w.bins"]
    assert (counts[0], counts[-1], sum(counts)) == (1, 2, 3)
    assert (edges[0], edges[-1]) == (0, 1)


def test_a_tag_that_is_a_column_and_a_figure_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    logger = WandbLogger(tmp_path, ["a"])
    loggers = Loggers([logger], lines.append)
    loggers.log(1, 1, {"step": 0.5, "_step": 0.75, "lr/*.bias": 0.1})
    log = type(logger._run).log

    def refuses(self: Any, row: dict[str, Any], **options: Any) -> None:
        if "odd" in row:
            raise TypeError("no number")
        log(self, row, **options)

    monkeypatch.setattr(type(logger._run), "log", refuses)
    loggers.log(2, 1, {"odd": object(), "loss/a/train": 0.25})
    loggers.state_dict()

    def fails(self: Any, row: dict[str, Any], **options: Any) -> None:
        raise wandb.Error("its process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(type(logger._run), "log", fails)
        loggers.log(3, 2, {"loss/a/train": 0.125})
        assert loggers.state_dict()["WandbLogger"]["rows"] == 2
    loggers.close()
    assert lines == [
        "warning  WandbLogger can't log 'odd': no number",
        "error    WandbLogger can't write: its process is gone. Training goes on; it will try again",
    ]
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert (found[0]["step-2"], found[0]["_step-2"], found[0]["lr/*.bias"]) == (0.5, 0.75, 0.1)
    assert [row.get("loss/a/train") for row in found] == [None, 0.25, 0.125]


def test_a_multirun_is_a_group(tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "0_seed-1"
    folder.mkdir(parents=True)
    logger = WandbLogger(folder, ["a"], project="other")
    logger.begin("seed: 1\n", {"seed": 1}, ["seed"], [])
    logger.log(1, 1, {"loss/a/train": 0.5})
    logger.close()
    (run,) = [r.run for r in records(files(folder)[0]) if r.WhichOneof("record_type") == "run"]
    assert (run.run_group, run.project, run.display_name) == ("sweep", "other", "0_seed-1")


def test_nothing_is_begun_before_there_is_a_figure(tmp_path: Path) -> None:
    logger = WandbLogger(tmp_path, ["a"])
    assert logger.state_dict()["rows"] == 0
    logger.close()
    assert not list(tmp_path.glob("wandb"))


def test_online_without_an_account_says_what_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuses)
    logger = WandbLogger(tmp_path, ["a"], mode="online")
    with pytest.raises(mtl.UserError, match=re.escape("No API key configured") + ".*logger.wandb.mode=offline"):
        logger.log(1, 1, {"loss/a/train": 0.5})
    with pytest.raises(mtl.UserError, match="logger.wandb"):
        WandbLogger(tmp_path, ["a"], mode="offlien").log(1, 1, {})
