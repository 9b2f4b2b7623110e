"""The content of MLflow, read back by its own client."""

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, command, stopping
from hypothesis import given, settings
from hypothesis import strategies as st

import mtl
from mtl import tags
from mtl.loggers import Loggers, MLflowLogger
from mtl.loggers.mlflow import LONGEST_NAME, clean
from mtl.loggers.names import Names
from mtl.process.signals import Ended

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
pytest.importorskip("mlflow", reason="the package mlflow isn't there")
pytest.importorskip("sqlalchemy", reason="the package sqlalchemy isn't there")
pytest.importorskip("alembic", reason="the package alembic isn't there")
HEAD = ["task=mnist_two_head", "trainer.max_epochs=2", "log.every=20", "logger=[csv,mlflow]"]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provides a database without a run, since creating one takes seconds."""
    logger = logger_of(tmp_path_factory.mktemp("empty"))
    logger.log(1, 1, {})
    logger._client.delete_run(logger._run)
    return logger._database


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def folder(tmp_path: Path, empty: Path) -> Path:
    shutil.copy(empty, tmp_path / "runs.db")
    return tmp_path


def client(database: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{database}")


def only_run(database: Path, experiment: str = "mtl"):
    store = client(database)
    (run,) = store.search_runs([store.get_experiment_by_name(experiment).experiment_id])
    return run


def history(database: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns, by key, steps and values in the order of arrival."""
    store, run = client(database), only_run(database)
    return {
        key: [(m.step, m.value) for m in sorted(store.get_metric_history(run.info.run_id, key), key=lambda m: m.step)]
        for key in run.data.metrics
    }


def in_csv(run: Path) -> dict[str, list[tuple[int, float]]]:
    found = defaultdict(list)
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["tag"].replace("~", "-")].append((int(row["step"]), float(row["value"])))
    return dict(found)


def test_all_figures_of_a_run_exactly(here: Path) -> None:
    done = command("train", *HEAD)
    assert done.code == 0, done.err
    assert done.run is not None
    found = history(here / "outputs" / "mlflow.db")
    epochs = found.pop("epoch")
    assert found == in_csv(done.run)
    assert set(epochs) == {(step, epoch) for step, epoch in epochs if epoch == math.ceil(step / 63)}
    run = only_run(here / "outputs" / "mlflow.db")
    assert run.info.run_name == done.run.name
    assert run.info.status == "FINISHED"
    assert run.data.params["balancer"] == "equal"
    assert run.data.params["seed"] == "0"
    assert run.data.tags["folder"] == str(done.run)
    pictures = [path.relative_to(here / "outputs" / "mlflow") for path in here.rglob("*.png")]
    assert any(path.parts[-3:-1] == ("cosine", "matrix") for path in pictures)
    assert {path.name for path in here.iterdir()} == {"outputs"}
    assert "mlflow" not in done.err


def test_a_run_that_goes_on_is_one_run(here: Path, empty: Path) -> None:
    (here / "outputs").mkdir()
    shutil.copy(empty, here / "outputs" / "mlflow.db")
    stopped = command("train", *stopping(90), *HEAD)
    assert stopped.code == 128 + signal.SIGTERM
    assert only_run(here / "outputs" / "mlflow.db").info.status == "KILLED"
    again = command("train", *HEAD, "resume=auto")
    assert again.code == 0, again.err
    found = history(here / "outputs" / "mlflow.db")
    del found["epoch"]
    assert stopped.run is not None
    assert found == in_csv(stopped.run)
    assert only_run(here / "outputs" / "mlflow.db").info.status == "FINISHED"


def logger_of(folder: Path) -> MLflowLogger:
    return MLflowLogger(folder, ["a"], tracking_uri=f"sqlite:///{folder / 'runs.db'}")


def test_every_figure_of_a_metric_has_a_name_of_its_own(folder: Path) -> None:
    """MLflow refuses <, >, ° and quotes; figures whose names are the same without these are numbered."""
    figures = ["within_11.25", "< 30°", "> 30°", "Straße", 'bed & "sofa"', "a.b", "."]
    scalars = {tags.metric("normals", f"angle.{name}", "val"): float(i) for i, name in enumerate(figures)}
    logger = logger_of(folder)
    logger.log(1, 1, scalars)
    logger.picture("metric/s/confusion.°/val", 1, np.zeros((8, 8, 3), dtype=np.uint8))
    logger.close()
    found = history(folder / "runs.db")
    assert sorted(value for key in found if key != "epoch" for _, value in found[key]) == list(scalars.values())
    assert found["metric/normals/angle.within_11.25/val"] == [(1, 0.0)]
    assert found["metric/normals/angle.- 30-/val"] == [(1, 1.0)]
    assert found["metric/normals/angle.- 30-/val-2"] == [(1, 2.0)]
    run = only_run(folder / "runs.db").info.run_id
    (picture,) = client(folder / "runs.db").list_artifacts(run, "metric/s/confusion.-/val")
    assert picture.path.endswith(".png")


def test_what_was_logged_after_the_last_state_of_a_killed_process_is_there_once(folder: Path) -> None:
    first = logger_of(folder)
    first.log(1, 1, {"loss/a/train": 0.1})
    first.flush()
    state = first.state_dict()
    first.log(2, 1, {"loss/a/train": 0.2})  # the process is gone, and with it what it held
    second = logger_of(folder)
    second.load_state_dict(state)
    second.log(2, 1, {"loss/a/train": 0.2})
    second.log(3, 2, {"loss/a/train": float("nan")})
    second.end()
    second.close()
    found = history(folder / "runs.db")["loss/a/train"]
    assert found[:2] == [(1, 0.1), (2, 0.2)]
    assert found[2][0] == 3
    assert math.isnan(found[2][1])
    assert len(found) == 3


def test_an_older_state_writes_again_only_what_came_out_otherwise(folder: Path) -> None:
    first = logger_of(folder)
    first.log(1, 1, {"loss/a/train": 0.1, "speed": 100.0})
    first.flush()
    older = first.state_dict()
    first.log(2, 1, {"loss/a/train": 0.2, "speed": 101.0})
    first.flush()  # the checkpoint that follows will be damaged
    second = logger_of(folder)
    second.load_state_dict(older)
    second.log(2, 1, {"loss/a/train": 0.2, "speed": 99.0})
    second.log(3, 1, {"loss/a/train": 0.3, "speed": 98.0})
    second.close()
    found = history(folder / "runs.db")
    assert found["loss/a/train"] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert sorted(found["speed"]) == [(1, 100.0), (2, 99.0), (2, 101.0), (3, 98.0)]


def test_more_than_mlflow_takes_at_once(folder: Path) -> None:
    logger = logger_of(folder)
    logger.begin("", {f"option.{n}": "x" * 7000 for n in range(150)} | {"tasks.a~b": 1}, [], [])
    for step in range(1, 60):
        logger.log(step, 1, {f"tag/{n}": step + n / 7 for n in range(25)})
    logger.close()
    run = only_run(folder / "runs.db")
    assert len(run.data.params) == 151
    assert run.data.params["tasks.a-b"] == "1"
    found = history(folder / "runs.db")
    assert all(found[f"tag/{n}"] == [(step, step + n / 7) for step in range(1, 60)] for n in range(25))


def test_pictures_are_artifacts_beside_the_database(folder: Path, empty: Path) -> None:
    from PIL import Image

    logger = logger_of(folder)
    picture = np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)
    logger.picture("cosine/a~b", 5, picture)
    logger.close()
    (path,) = (empty.parent / "runs").rglob("a-b/*.png")
    assert path.parts[-3:] == ("cosine", "a-b", "00000005.png")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), picture)


ODD = [
    *("lr/*.bias", "lr/?.bias", "lr/-.bias", "lr/[a].bias", "lr/trunk.*", "cosine/a~b", "cosine/a-b", "lr/a:b", "é/ü"),
    *("/leading", "trailing/", "a//b", "a/../b", "../up", "..", ".", "", "a/./b", "a\\b", "a\nb", "a\tb", "a b", "𝛼"),
    *(
        "x" * 249 + "/y",
        "x" * 260,
        "x" * 261,
        "x" * 248 + "/..",
        "epoch",
        "step",
        "%s",
        "a=b",
        "a,b",
        "(a)",
        "{a}",
        '"a"',
    ),
]


@pytest.mark.parametrize("tag", ODD)
def test_names_are_such_as_mlflow_takes(tag: str) -> None:
    from mlflow.utils.validation import _validate_metric, _validate_param

    name = Names(clean, longest=LONGEST_NAME)[tag]
    _validate_metric(name, 0.5, 1, 1)
    _validate_param(name, "x")
    assert 0 < len(name) <= 250


@given(st.lists(st.text(max_size=300), max_size=12, unique=True))
@settings(max_examples=200)
def test_no_two_tags_have_one_name(tags: list[str]) -> None:
    from mlflow.utils.validation import _validate_metric

    names = Names(clean, longest=LONGEST_NAME, taken=["epoch"])
    given_names = [names[tag] for tag in tags]
    for name in given_names:
        _validate_metric(name, 0.5, 1, 1)
    assert len({*given_names, "epoch"}) == len(tags) + 1
    again = Names(clean, longest=LONGEST_NAME, taken=["epoch"])
    again.load_state_dict(names.state_dict())
    for tag in reversed(tags):  # a run that goes on has the same ones, in whatever order they come
        if tag in names.state_dict():
            assert again[tag] == names[tag]


def test_tags_that_mlflow_does_not_take_as_they_are(folder: Path) -> None:
    """Every figure of every tag is there, none mixed with another's."""
    first = logger_of(folder)
    first.begin("", {tag: str(number) for number, tag in enumerate(ODD)}, [], [])
    for step in (1, 2):
        first.log(step, 1, {tag: step + number / 64 for number, tag in enumerate(ODD)})
        first.flush()
    second = logger_of(folder)
    second.load_state_dict(first.state_dict())
    second.log(3, 2, {tag: 3 + number / 64 for number, tag in reversed(list(enumerate(ODD)))})
    second.end()
    second.close()
    found = history(folder / "runs.db")
    assert found.pop("epoch") == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert len(found) == len(ODD)
    expected = [[(step, step + number / 64) for step in (1, 2, 3)] for number in range(len(ODD))]
    assert sorted(found.values()) == sorted(expected)
    assert found["lr/-.bias"] == expected[ODD.index("lr/*.bias")]
    run = only_run(folder / "runs.db")
    assert sorted(run.data.params.values(), key=int) == [str(number) for number in range(len(ODD))]
    assert run.info.status == "FINISHED"


def test_a_refused_figure_costs_only_itself(folder: Path) -> None:
    lines: list[str] = []
    logger = logger_of(folder)
    logger.begin("", {"seed": 1, "odd": "x"}, [], [])
    loggers = Loggers([logger], lines.append)
    values = {f"tag/{number}": number / 8 for number in range(1200)}
    loggers.log(1, 1, {**values, "tag/7": "a text", "tag/1100": None})
    loggers.state_dict()
    loggers.log(2, 1, dict.fromkeys(values, 0.5))
    loggers.end()
    loggers.close()
    assert len(lines) == 1
    assert lines[0].startswith("warning  MLflowLogger can't log 'tag/7': ")
    assert "; 'tag/1100': " in lines[0]
    found = history(folder / "runs.db")
    refused = ("tag/7", "tag/1100")
    assert {tag: figures for tag, figures in found.items() if tag not in (*refused, "epoch")} == {
        tag: [(1, value), (2, 0.5)] for tag, value in values.items() if tag not in refused
    }
    assert all(found[tag] == [(2, 0.5)] for tag in refused)  # the next one of that tag is there
    assert only_run(folder / "runs.db").info.status == "FINISHED"


def test_a_store_that_fails_for_a_time_gets_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowException

    lines: list[str] = []
    logger = logger_of(folder)
    loggers = Loggers([logger], lines.append)
    loggers.log(1, 1, {"loss/a/train": 0.5})

    def fails(*_: object, **__: object) -> None:
        raise MlflowException("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(logger._client, "log_batch", fails)
        state = loggers.state_dict()["MLflowLogger"]
        loggers.log(2, 1, {"loss/a/train": 0.25})
        assert loggers.state_dict()["MLflowLogger"]["run"] == state["run"]
        assert [each[0] for each in state["held"]] == ["loss/a/train", "epoch"]
    assert len(lines) == 1
    assert "error    MLflowLogger can't write: no space left. Training goes on; it will try again" in lines[0]
    other = logger_of(folder)  # a process that goes on from the checkpoint of then has what was held
    other.load_state_dict(state)
    other.log(2, 1, {"loss/a/train": 0.25})
    other.end()
    other.close()
    assert history(folder / "runs.db")["loss/a/train"] == [(1, 0.5), (2, 0.25)]
    loggers.close()


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (mtl.UserError, "FAILED"), (SystemExit, "FAILED")]
    + [(KeyboardInterrupt, "KILLED"), (Ended, "KILLED")],
)
def test_no_run_stays_running(folder: Path, raised: type[BaseException] | None, status: str) -> None:
    """Also where figures and parameters are refused."""
    logger = logger_of(folder)
    logger.begin("", {"a": "x"}, [], [])
    with suppress(BaseException), Loggers([logger], lambda line: None) as loggers:
        loggers.log(1, 1, {"a": "a text"})
        if raised is not None:
            raise raised
        loggers.end()
    assert only_run(folder / "runs.db").info.status == status


def test_parameters_that_fail_leave_the_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient, MlflowException

    original = MlflowClient.log_batch

    def no_parameters(self: Any, *given: Any, params: Any = (), **options: Any) -> None:
        if params:
            raise MlflowException("too long", error_code=1000)  # INVALID_PARAMETER_VALUE
        original(self, *given, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", no_parameters)
    lines: list[str] = []
    logger = logger_of(folder)
    logger.begin("", {"a": 1, "b": 2}, [], [])
    with Loggers([logger], lines.append) as loggers:
        loggers.log(1, 1, {"loss/a/train": 0.5})
        loggers.end()
    assert lines == ["warning  MLflowLogger can't log 'a': too long; 'b': too long"]
    assert history(folder / "runs.db")["loss/a/train"] == [(1, 0.5)]
    assert only_run(folder / "runs.db").info.status == "FINISHED"


def test_groups_of_an_optimizer_by_pattern(here: Path, empty: Path) -> None:
    """As the documentation recommends them."""
    (here / "outputs").mkdir()
    shutil.copy(empty, here / "outputs" / "mlflow.db")
    groups = "optimizer.groups={*.bias: {weight_decay: 0}, trunk: {lr: 1e-4}}"
    done = command("train", *HEAD, groups)
    assert done.code == 0, done.err
    assert "MLflow" not in done.out
    found = history(here / "outputs" / "mlflow.db")
    del found["epoch"]
    expected = {tag.replace("*", "-"): figures for tag, figures in in_csv(done.run).items()}
    assert "lr/-.bias" in expected
    assert found == expected
    assert only_run(here / "outputs" / "mlflow.db").info.status == "FINISHED"


def test_a_store_that_is_none_is_a_mistake_of_the_users(folder: Path) -> None:
    logger = MLflowLogger(folder, ["a"], tracking_uri="nowhere://x")
    with pytest.raises(mtl.UserError, match=r"logger.mlflow: nowhere://x: "):
        logger.log(1, 1, {"loss/a/train": 0.5})


def test_a_store_that_fails_later_ends_nothing(folder: Path) -> None:
    from mlflow import MlflowException

    logger = logger_of(folder)
    logger.log(1, 1, {"loss/a/train": 0.5})

    def fails(*_: object, **__: object) -> None:
        raise MlflowException("no space left")

    logger._client.log_batch = fails
    with pytest.raises(OSError, match="no space left"):
        logger.flush()


def test_processes_that_make_one_database_at_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from mtl.loggers import MLflowLogger\n"
        "logger = MLflowLogger(Path.cwd(), ['a'], tracking_uri='sqlite:///runs.db')\n"
        "for step in range(9): logger.log(step, 1, {'loss/a/train': step / 7}); logger.flush()\n"
        "logger.end(); logger.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    jobs = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) for _ in range(3)]
    assert [job.wait(120) for job in jobs] == [0, 0, 0]
    store = client(tmp_path / "runs.db")
    runs = store.search_runs([store.get_experiment_by_name("mtl").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    for run in runs:
        found = store.get_metric_history(run.info.run_id, "loss/a/train")
        assert sorted((metric.step, metric.value) for metric in found) == [(step, step / 7) for step in range(9)]


def test_nothing_is_begun_before_there_is_a_figure(tmp_path: Path) -> None:
    logger = logger_of(tmp_path)
    assert logger.state_dict() == {"run": "", "step": 0}
    logger.close()
    assert not list(tmp_path.iterdir())
