"""Folders from somebody else with links, pipes and devices: nothing outside is read, changed or created."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import command, slow_but
from hostile import at_most, snapshot
from made_runs import run
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

import mtl
from mtl.cli.sweep import _newest_first
from mtl.files import write_whole
from mtl.loggers import CsvLogger, TensorBoardLogger
from mtl.report import report
from mtl.runs.loading import read
from mtl.runs.resume import config_of, newest_unfinished
from mtl.safety.regular import check_folder, make_folder, regular
from mtl.training import checkpoint

SMALL = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=1000", "log.every=2"]


def link_to_file(path: Path) -> None:
    path.symlink_to(Path("outside/bashrc").resolve())


def link_to_nothing(path: Path) -> None:
    path.symlink_to(Path("outside/canary").resolve())


def link_to_folder(path: Path) -> None:
    path.symlink_to(Path("outside").resolve())


def link_within(path: Path) -> None:
    inside = path.with_name("inside")
    inside.write_text("1")
    path.symlink_to(inside.name)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # absolute ones may be too long


LINKS = [link_to_file, link_to_nothing, link_to_folder, link_within, link_to_device]
ODD = [*LINKS, pipe, unix_socket]


@pytest.fixture
def surroundings(here: Path) -> Iterator[Path]:
    """Provides the current folder, with files outside of the run that must not change."""
    (here / "outside/below").mkdir(parents=True)
    (here / "outside/bashrc").write_text("alias ls=ls\n")
    (here / "outside/below/secret.json").write_text('{"status": "finished", "secret": 1}')
    before = snapshot(here / "outside")
    yield here
    assert snapshot(here / "outside") == before


@pytest.mark.parametrize("kind", slow_but([link_to_file, link_within, pipe], ODD))
@pytest.mark.parametrize("name", ["metrics.json", "config.yaml"])
def test_a_report_reads_no_odd_file(surroundings: Path, name: str, kind: Callable[[Path], None]) -> None:
    run(surroundings / "runs/equal0")
    run(surroundings / "runs/odd", seed=3)
    (surroundings / "runs/odd" / name).unlink()
    kind(surroundings / "runs/odd" / name)
    before = snapshot(surroundings / "runs")
    with at_most():
        report([Path("runs")], out=Path("there"))
    assert snapshot(surroundings / "runs") == before
    text = (surroundings / "there/report.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| can't be read | ")]
    named = {pipe: "a pipe", unix_socket: "a socket"}.get(kind, "a symbolic link")
    assert f"runs/odd | {name.replace('_', chr(92) + '_')} is {named}; in a run's folder only regular files" in line
    assert "| runs/equal0 |" in text


@pytest.mark.parametrize("kind", slow_but([link_to_file, pipe], ODD))
def test_a_report_without_the_curves_of_an_odd_file(surroundings: Path, kind: Callable[[Path], None]) -> None:
    run(surroundings / "runs/equal0")
    kind(surroundings / "runs/equal0/metrics.csv")
    with at_most():
        report([Path("runs")], out=Path("there"))
    assert "No curves of equal: a run has no metrics.csv" in (surroundings / "there/report.md").read_text()


WRITTEN = ["report", *(f"report/{each}" for each in ("figures", "report.csv", "report.md", "report.html"))]
WRITTEN += ["report/figures/made-1-reached.svg"]


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_but(
        [*[(name, link_to_nothing) for name in WRITTEN], *[("report/report.csv", kind) for kind in ODD]],
        [(name, kind) for name in WRITTEN for kind in ODD],
    ),
)
def test_a_report_is_written_through_no_link(surroundings: Path, name: str, kind: Callable[[Path], None]) -> None:
    run(surroundings / "runs/equal0")
    place = surroundings / "runs" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    kind(place)
    with (
        at_most(),
        pytest.raises(mtl.UserError, match=f"the report isn't written: runs/{name} is a .*; choose a folder"),
    ):
        report([Path("runs")])


def test_the_folder_of_a_report_that_is_named_may_be_a_link(surroundings: Path) -> None:
    run(surroundings / "elsewhere/equal0")
    Path("runs").symlink_to("elsewhere")
    Path("there").mkdir()
    Path("link").symlink_to("there")
    report([Path("runs")], out=Path("link"))
    report([Path("runs")])
    assert Path("there/report.csv").read_text() == Path("elsewhere/report/report.csv").read_text()


def test_a_link_in_a_circle_and_a_folder_that_cannot_be_listed(
    surroundings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(surroundings / "runs/equal0")
    (surroundings / "runs/circle").symlink_to("..")
    (surroundings / "runs/self").symlink_to("self")
    (surroundings / "runs/closed").mkdir()
    scandir = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refused)
    report([Path("runs")], out=Path("there"))
    text = Path("there/report.md").read_text()
    assert "1 finished of 2 runs in runs" in text
    assert "| can't be read | – | runs/closed | the folder can't be listed: Permission denied |" in text


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provides an unfinished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = command("train", *SMALL, "output_root=runs")
        assert ended.code == 0, ended.err
        (folder / "runs").rename(folder / "kept")
        (made,) = (folder / "kept/mnist_two_head").iterdir()
        (made / "metrics.json").write_text('{"status": "running"}')
        return made


@pytest.fixture
def stopped(stopped_once: Path, surroundings: Path) -> Path:
    shutil.copytree(stopped_once, "run")
    return Path("run")


OPENED = ["train.log", "metrics.csv", "nonfinite.jsonl", "metrics.json", "config.yaml", "events.out.tfevents.1.x.2"]
OPENED += ["checkpoints", "checkpoints/last.pt", "checkpoints/last-1.pt", "checkpoints/best.pt", "checkpoints/last.tmp"]
OPENED += ["checkpoints/manifest.json", "checkpoints/manifest.json.tmp", "whole.tmp", "wandb", "report", "of one's own"]


@pytest.mark.parametrize("name", OPENED)
def test_every_odd_file_is_found_before_anything_is_opened(surroundings: Path, name: str) -> None:
    for number, kind in enumerate(ODD):
        folder = Path(f"run{number}")
        (folder / "checkpoints" if "checkpoints/" in name else folder).mkdir(parents=True)
        kind(folder / name)
        with pytest.raises(mtl.UserError, match=f"run{number}/{name} is a .*; in a run's folder only regular files"):
            check_folder(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("train.log", kind) for kind in (link_to_file, link_to_nothing, link_within, pipe)],
        *(("checkpoints", link_to_folder), ("checkpoints/last.pt", link_to_device), ("config.yaml", link_to_file)),
    ],
)
def test_a_run_does_not_go_on_through_a_link(stopped: Path, name: str, kind: Callable[[Path], None]) -> None:
    """Nothing in its folder is opened, Hydra's log included, which is opened before the job begins."""
    odd = stopped / name
    shutil.rmtree(odd) if odd.is_dir() else odd.unlink()
    kind(odd)
    before = snapshot(Path())
    with at_most():
        ended = command("train", *SMALL, "trainer.max_epochs=2", "resume=run")
    assert ended.code == 1
    assert ended.err.startswith(f"error: resume: run/{name} is a "), ended.err
    assert "only regular files and folders" in ended.err
    assert snapshot(Path()) == before


def test_a_run_whose_folder_hydra_was_given_does_not_go_on_through_a_link(stopped: Path) -> None:
    """The check is there wherever the folder comes from."""
    (stopped / "train.log").unlink()
    link_to_nothing(stopped / "train.log")
    before = snapshot(Path())
    ended = command("train", *SMALL, "hydra.run.dir=run")
    assert ended.code == 1
    assert "run/train.log is a symbolic link" in ended.err
    assert snapshot(Path()) == before


@pytest.mark.parametrize("name", ["graph.md", "leaves.csv", "graph.svg", "life.png"])
def test_a_graph_is_written_through_no_link(surroundings: Path, name: str) -> None:
    Path("run").mkdir()
    link_to_nothing(Path("run") / name)
    before = snapshot(Path())
    ended = command("graph", *SMALL, "hydra.run.dir=run")
    assert ended.code == 1
    assert f"run/{name} is a symbolic link" in ended.err
    assert snapshot(Path()) == before


def test_a_run_does_not_go_on_with_a_hard_link(stopped: Path) -> None:
    """What is written at the end of such a file is written to the file of the other name as well."""
    (stopped / "metrics.csv").unlink()
    os.link("outside/bashrc", stopped / "metrics.csv")
    ended = command("train", *SMALL, "trainer.max_epochs=2", "resume=run")
    assert ended.code == 1
    assert ended.err.startswith("error: resume: run/metrics.csv has another hard link")


def test_the_folder_of_a_run_may_be_a_link(stopped: Path) -> None:
    stopped.rename("elsewhere")
    Path("run").symlink_to("elsewhere")
    ended = command("train", *SMALL, "resume=run")
    assert ended.code == 0, ended.err
    assert json.loads(Path("elsewhere/metrics.json").read_text())["status"] == "finished"
    assert Path("run").is_symlink()


@pytest.mark.parametrize("name", ["best.pt", "manifest.json", ""])
@pytest.mark.parametrize("kind", ODD)
def test_a_checkpoint_that_is_no_regular_file(stopped: Path, name: str, kind: Callable[[Path], None]) -> None:
    odd = stopped / "checkpoints" / name
    shutil.rmtree(odd) if odd.is_dir() else odd.unlink()
    kind(odd)
    with at_most():
        if name == "manifest.json":  # a file is then judged by itself
            assert read(stopped)["format"] == checkpoint.FORMAT
        else:
            with pytest.raises(mtl.UserError, match=f"run/checkpoints{f'/{name}' * bool(name)} is a "):
                mtl.load(stopped)


def test_files_are_opened_as_regular_ones_alone(surroundings: Path) -> None:
    """Whatever is there in time between the look at the folder and the opening."""
    for number, kind in enumerate(ODD):
        kind(Path(f"odd{number}"))
        for mode in ("rb", "ab", "r+b", "wb"):
            with (
                at_most(),
                pytest.raises(mtl.UserError, match=f"odd{number} is a "),
                open(f"odd{number}", mode, opener=regular),
            ):
                pass
        with pytest.raises(mtl.UserError, match=f"odd{number} is a "):
            write_whole(Path(f"odd{number}"), "x")
        with pytest.raises(mtl.UserError, match=f"odd{number} is a "):
            make_folder(Path(f"odd{number}"))


def test_the_loggers_open_no_link(surroundings: Path) -> None:
    for number, kind in enumerate(ODD):
        folder = Path(f"run{number}")
        folder.mkdir()
        kind(folder / "metrics.csv")
        with at_most(), pytest.raises(mtl.UserError, match=r"metrics\.csv is a "):
            CsvLogger(folder, ["a"])
        kind(folder / "events.out.tfevents.1.x")
        with at_most(), pytest.raises(mtl.UserError, match=r"events\.out\.tfevents\.1\.x is a "):
            TensorBoardLogger(folder, ["a"]).load_state_dict(3)


def test_events_that_claim_to_be_longer_than_the_memory(surroundings: Path) -> None:
    """They are read when a run goes on; what TensorBoard's reader takes of them is kept."""
    for number, length in enumerate((2**62, 2**44)):
        head = struct.pack("<Q", length)
        content = head + struct.pack("<I", masked_crc32c(head)) + b"x" * 100
        Path(f"events.out.tfevents.{number}.x").write_bytes(content)
    with at_most():
        TensorBoardLogger(Path(), ["a"]).load_state_dict(3)
    assert [path.name for path in Path().glob("events*")] == ["events.out.tfevents.0000000000.kept"]


def test_auto_passes_over_what_it_cannot_go_on_with(
    stopped: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Newer than the good run: links, what can't be read, checkpoints that can't; it is taken all the same."""
    ours = config_of(stopped)
    Path("runs").mkdir()
    stopped.rename("runs/2020")

    def another(name: str) -> Path:
        return Path(shutil.copytree("runs/2020", f"runs/{name}"))

    def replaced(path: Path, kind: Callable[[Path], None]) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        kind(path)

    replaced(another("2021 log") / "train.log", link_to_file)
    replaced(another("2022 config") / "config.yaml", link_to_file)
    replaced(another("2023 metrics") / "metrics.json", pipe)
    replaced(another("2024 checkpoints") / "checkpoints", link_to_folder)
    (another("2025 deep") / "metrics.json").write_text("[" * 100_000)
    (another("2026 bomb") / "config.yaml").write_text("a: &a [1, 1]\nb: [*a, *a]\n")
    (another("2027 types") / "config.yaml").write_text("seed: [1]\noptimizer: 3\n? [1, 2]\n: 4\n")
    (another("2028 list") / "metrics.json").write_text("[1]")
    for path in another("2029 damaged").glob("checkpoints/last*.pt"):
        path.write_bytes(b"x")
    for path in another("2030 no manifest").glob("checkpoints/*"):
        path.write_bytes(b"PK")
    with at_most():
        assert newest_unfinished(Path("runs"), ours) == Path("runs/2020")
    told = [record.message for record in caplog.records]
    assert [line[5:9] for line in told] == [str(year) for year in range(2030, 2020, -1)]
    assert all(" is skipped: " in line for line in told)


def test_one_bad_job_stops_no_other_job_of_a_multirun(surroundings: Path) -> None:
    sweep = ["-m", *SMALL, "seed=0,1", "logger=[]"]
    assert command("train", *sweep).code == 0
    (folder,) = Path("outputs/multirun").iterdir()
    first, second = sorted(path for path in folder.iterdir() if path.is_dir())
    (first / "metrics.json").write_text("[" * 100_000)
    for name in ("train.log", "metrics.json"):
        (second / name).unlink()
    link_to_nothing(second / "train.log")
    shutil.copytree(first, folder / "2_another")
    with (folder / "jobs.jsonl").open("a") as file:
        file.write('{"by": "x", "job": ' + "[" * 100_000 + "\n" + "1" * 200_000 + "\n[1]\n")
    ended = command("train", *sweep, f"resume={folder}")
    assert ended.code == 1
    assert "metrics.json is nested more than 100 levels deep" in ended.err
    assert "train.log is a symbolic link" in ended.err
    assert "2 jobs in" in ended.out

    for name in ("sweep.json", "jobs.jsonl", "multirun.yaml", first.name):
        kept = (folder / name).rename("kept")
        link_to_file(folder / name)
        before = snapshot(Path())
        ended = command("train", *sweep, f"resume={folder}")
        assert ended.code == 1
        assert ended.err.startswith(f"error: resume: {folder}/{name} is a symbolic link"), ended.err
        assert snapshot(Path()) == before
        assert list(_newest_first("outputs/multirun")) == []
        (folder / name).unlink()
        kept.rename(folder / name)
    assert [path for path, _ in _newest_first("outputs/multirun")] == [folder]
