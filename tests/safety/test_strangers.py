"""All kinds of hostile folders of runs with all commands: nothing outside of the folders changes."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, slow_but
from hostile import at_most, snapshot
from test_archive import doubling, expanded, zipped
from test_archive import saved as members_of
from test_plain_text import OBEYED

import mtl
from mtl.report import report

RUN = ["task=mnist_two_head", "trainer.max_epochs=2", "data.batch_size=2000", "scheduler=none", "logger=[csv]"]
EVIL = "open({canary!r}, 'w').close()\nclass Head: pass\ndef evil(*args, **kwargs): open({canary!r}, 'w').close()\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provides the folder of a run."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = command("train", *RUN, "trainer.max_epochs=1")
    assert ended.run is not None, ended.err
    return folder / ended.run


@pytest.fixture
def own(made: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Provides a project with the user's own run, and files around it that must not change."""
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "home").mkdir()
    (here / "home/.bashrc").write_text("alias ls=ls\n")
    (here / "project").mkdir()
    monkeypatch.chdir(here / "project")
    yield Path(shutil.copytree(made, here / "project/own/mnist_two_head/2010"))
    for name in [name for name in sys.modules if name.split(".")[0] == "downloads"]:
        del sys.modules[name]  # a folder that was looked into for a name, of which nothing was run


def state_of(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the state in all of the run's checkpoints."""
    (run / "checkpoints/manifest.json").unlink()
    for path in run.glob("checkpoints/*.pt"):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)


def calling(target: str, *arguments: str, place: str = "tasks.digit.head.in_features") -> Callable[[Path], None]:
    *path, last = place.split(".")

    def make(run: Path) -> None:
        def change(state: dict[str, Any]) -> None:
            node = state["config"]
            for key in path:
                node = node[key]
            node[last] = {"_target_": target, "_args_": [each.format(run=run) for each in arguments]}
            state["code_folders"] = [str(run), str(run.parent)]

        state_of(run, change)

    return make


def linked(name: str, target: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target.format(home=os.environ["HOME"]))

    return make


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def piped(run: Path) -> None:
    (run / "metrics.json").unlink()
    os.mkfifo(run / "metrics.json")


def each_checkpoint(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / "checkpoints/manifest.json").unlink()
        for path in run.glob("checkpoints/*.pt"):
            make(path)

    return change


def bomb(path: Path) -> None:
    zipped(path, members_of({"format": mtl.training.checkpoint.FORMAT, "model": {"w": torch.zeros(2**24)}}), 8)


def exchanged(run: Path) -> None:
    best, last = run / "checkpoints/best.pt", run / "checkpoints/last.pt"
    best.rename(run / "x")
    last.rename(best)
    (run / "x").rename(last)


def obeyed(run: Path) -> None:
    metrics = {"status": "failed", "problem": "\x1b]0;x\x07=1+1", "error": "\x1b[2J\u202e", "arguments": ["\x1b[31m"]}
    (run / "metrics.json").write_text(json.dumps(metrics))
    state_of(run, lambda state: state["config"]["tasks"].update({"\x1b[2J": copy.deepcopy(state["config"]["tasks"])}))


TOUCH = "__import__('os').system('touch {run}/../canary')"
KINDS: dict[str, Callable[[Path], None]] = {
    "eval": calling("builtins.eval", TOUCH),
    "eval of the data": calling("builtins.eval", TOUCH, place="data.root"),
    "eval of the trunk": calling("builtins.exec", TOUCH, place="model.trunk"),
    "system": calling("os.system", "touch {run}/../canary"),
    "through torch": calling("torch.os.system", "touch {run}/../canary"),
    "partial": calling("functools.partial", "x"),
    "torch.load": calling("torch.load", "{run}/checkpoints/best.pt"),
    "file of the run": calling("evil_code.evil"),
    "file beside the run": calling("beside_code.evil"),
    "package of the run": calling("downloads.run.evil_code.evil"),
    "report": linked("report", "{home}"),
    "report.csv": linked("report/report.csv", "{home}/.bashrc"),
    "train.log": linked("train.log", "{home}/.bashrc"),
    "metrics.csv": linked("metrics.csv", "{home}/canary"),
    "metrics.json": linked("metrics.json", "{home}/canary"),
    "best.pt": linked("checkpoints/best.pt", "/dev/zero"),
    "last.pt": linked("checkpoints/last.pt", "/dev/zero"),
    "checkpoints": linked("checkpoints", "{home}"),
    "last.tmp": linked("checkpoints/last.tmp", "{home}/canary"),
    "config.yaml": linked("config.yaml", "/dev/zero"),
    "pipe": piped,
    "aliases": written("config.yaml", "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(9))),
    "deep": written("metrics.json", "[" * 100_000),
    "numbers": written("metrics.json", '{"status": "finished", "best": {"value": 1e999}}'),
    "long numbers": written("metrics.json", '{"status": "finished", "steps": ' + "9" * 10_000 + "}"),
    "zip bomb": each_checkpoint(bomb),
    "tensors without numbers": each_checkpoint(expanded),
    "doubling": each_checkpoint(doubling),
    "exchanged": exchanged,
    "obeyed": obeyed,
}


UNFIT = [  # which nobody can go on with
    *(
        "train.log",
        "metrics.csv",
        "metrics.json",
        "last.pt",
        "checkpoints",
        "last.tmp",
        "config.yaml",
        "pipe",
        "aliases",
    ),
    *("deep", "numbers", "long numbers", "zip bomb", "tensors without numbers", "doubling", "exchanged"),
]


def around(folder: Path, *left_out: Path) -> dict[str, Any]:
    """Returns all content below the folder, except for that of some subfolders."""
    return {
        name: what for name, what in snapshot(folder).items() if not any(Path(name).is_relative_to(x) for x in left_out)
    }


def hostile(own: Path, folder: Path, name: str) -> Path:
    """A run of this kind with code in it and beside it, all of which leaves a file behind when it is run."""
    run = Path(shutil.copytree(own, folder / "run"))
    for path in (run / "evil_code.py", folder / "beside_code.py", run / "sitecustomize.py"):
        path.write_text(EVIL.format(canary=str(folder / "canary")))
    (run / "metrics.json").write_text('{"status": "stopped"}')
    KINDS[name](run)
    return run


@pytest.mark.parametrize("name", slow_but(["eval", "file beside the run", "report.csv", "best.pt", "obeyed"], KINDS))
def test_nothing_outside_changes(own: Path, here: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    run, new = hostile(own, here / "project/downloads", name), here / "project/new"
    before = around(here, run, new)
    told = []
    with at_most(60):
        try:
            mtl.load(run)
        except mtl.UserError as error:
            told.append(str(error))
        report([own, run], out=new / "report")
        for module, *typed in (
            ("evaluate", f"run={run}"),
            ("train", *RUN, f"init_from={run}", "trainer.max_epochs=1", "output_root=new"),
            ("train", *RUN, f"resume={run}"),
        ):
            ended = command(module, *typed)
            assert "Traceback" not in ended.err + ended.out, ended.err
            told += [ended.err, ended.out]
    told += capfd.readouterr()
    told += [path.read_text() for path in new.glob("report/*.*")]
    assert not [text for text in told if OBEYED.search(text)]
    assert not list(here.rglob("*canary*"))
    assert around(here, run, new) == before


def test_all_of_them_beside_a_run_to_go_on_with(own: Path, here: Path) -> None:
    """The newer ones that can't go on are passed over, and a report has the one that is finished."""
    for number, name in enumerate(KINDS):
        run = hostile(own, here / f"project/x/{number}", name)
        if name in UNFIT:
            shutil.move(run, own.parent / f"2030-{number:02}")
    (Path(shutil.copytree(own, own.parent / "2020")) / "metrics.json").write_text('{"status": "stopped"}')
    before = around(here, own.parent, here / "project/there")
    with at_most(60):
        report([Path("own")], out=Path("there"))
        auto = command("train", *RUN, "output_root=own", "resume=auto")
    assert auto.code == 0, auto.err
    assert "own/mnist_two_head/2020" in auto.out
    assert f"1 finished of {len(UNFIT) + 2} runs in own" in Path("there/report.md").read_text()
    assert not list(here.rglob("*canary*"))
    assert around(here, own.parent, here / "project/there") == before
